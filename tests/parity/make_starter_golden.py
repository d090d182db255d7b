"""Writes golden/starter.safetensors: what transformers and diffusers compute in f32 on the bundled starter model.

The digests of its weight files go along, so that the Rust test notices when the model has been replaced and these values
have not.

    python tests/parity/make_starter_golden.py [MODEL_FOLDER]
"""

import hashlib
import pathlib
import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from make_golden import values

torch.set_num_threads(1)
tests = pathlib.Path(__file__).resolve().parent.parent
model = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else tests.parent / "daemon" / "starter" / "model"
PROMPT = "a small red car left of a house on the beach"


def load(kind, part):
    return kind.from_pretrained(model / part, torch_dtype=torch.float32).eval().requires_grad_(False)


tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
text, unet, vae = load(CLIPTextModel, "text_encoder"), load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
encoded = tokenizer(PROMPT, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
context = text(encoded.input_ids)[0]
size = unet.config.sample_size
latents = values("latents", (1, unet.config.in_channels, size, size)) * 1.7
pixels = size * 2 ** (len(vae.config.block_out_channels) - 1)
posterior = vae.encode(values("picture", (1, 3, pixels, pixels))).latent_dist
golden = {
    "ids": encoded.input_ids.to(torch.int64),
    "text": context,
    "unet": unet(latents, torch.tensor([601.0]), encoder_hidden_states=context).sample,
    "mean": posterior.mean,
    "logvar": posterior.logvar,
    "picture": vae.decode(latents / vae.config.scaling_factor).sample,
}
digests = {
    path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(model.glob("*/*model.safetensors"))
}
save_file({k: v.contiguous() for k, v in golden.items()}, tests / "golden" / "starter.safetensors", digests | {"prompt": PROMPT})
(tests / "golden" / "starter.safetensors").chmod(0o644)
print({key: (tuple(value.shape), float(value.float().std())) for key, value in golden.items()}, digests)

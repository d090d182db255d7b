"""Writes golden/model/: small models in the layouts of SD 1.5, SD 2.1 and the starter, and what PyTorch computes on them.

No weights are written: every tensor's values are an integer formula of its name, which the Rust tests compute, too
(see `values`). Per layout there are the folder's configs, shapes.json with the names and shapes of all tensors, and
golden.safetensors with the outputs.

    python tests/parity/make_golden.py
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)
ROOT = pathlib.Path(__file__).resolve().parent.parent / "golden" / "model"
PROMPTS = [
    "a photo of the cat on a beach",
    "",
    "A PHOTO of THE   cat's 3 hats... left of a dog!!",
    "na\u00efve caf\u00e9\tdog <|endoftext|> photo \u4e2d",
]
MASK64 = (1 << 64) - 1


def values(name, shape, kind="input"):
    """Uniform numbers in [-1, 1): the top 24 bits of splitmix64, seeded with FNV-1a of the name; then scaled.

    kind "weight" scales to what keeps activations of order 1: matrices and kernels by sqrt(3 / inputs), scales of
    normalisations to 1 +- 0.2, biases by 0.1, embeddings by 0.5.
    """
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & MASK64
    with np.errstate(over="ignore"):
        index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        z = np.uint64(seed) + index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    x = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    if kind == "weight":
        if "embedding.weight" in name:
            x = x * np.float32(0.5)
        elif len(shape) > 1:
            x = x * np.sqrt(np.float32(3) / np.float32(np.prod(shape[1:])))
        elif "norm" in name and name.endswith(".weight"):
            x = np.float32(1) + x * np.float32(0.2)
        else:
            x = x * np.float32(0.1)
    return torch.from_numpy(x.reshape(shape))


def tokenizer_folder(folder, pad, written):
    """A byte-level BPE over all bytes with some merges; `written` chooses the newer or the older files."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = [
        ("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("p", "h"), ("o", "t"), ("ph", "ot"),
        ("phot", "o</w>"), ("d", "o"), ("do", "g</w>"), ("'", "s</w>"), (".", "."), ("..", ".</w>"), ("o", "f</w>"),
        ("e", "a"), ("b", "ea"), ("c", "h</w>"), ("bea", "c"),
    ]  # fmt: skip
    vocabulary += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(vocabulary)}
    tokens = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token=pad)
    if written == "new":
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24, **tokens).save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        (folder / "vocab.json").write_text(json.dumps(vocab, separators=(",", ":"), ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        # As in SD 2: the config names another padding token than the map, and the map decides.
        config = tokens | dict(tokenizer_class="CLIPTokenizer", model_max_length=24, pad_token="<|endoftext|>")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    return len(vocabulary)


LAYOUTS = {
    "sd15": dict(
        tokenizer=("<|endoftext|>", "old"),
        text=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  hidden_act="quick_gelu"),
        unet=dict(in_channels=4, out_channels=4, block_out_channels=(32, 64, 64, 64), layers_per_block=2,
                  attention_head_dim=8, cross_attention_dim=32, norm_num_groups=16, sample_size=8),
        vae=dict(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4,
                 scaling_factor=0.18215, sample_size=64),
        latents=(2, 4, 8, 8), picture=(1, 3, 32, 32),
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                                steps_offset=1),
    ),
    "sd21": dict(
        tokenizer=("!", "old"),
        text=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3,
                  hidden_act="gelu"),
        unet=dict(in_channels=4, out_channels=4, block_out_channels=(16, 32, 48, 48), layers_per_block=2,
                  attention_head_dim=[1, 2, 3, 3], cross_attention_dim=48, norm_num_groups=8, sample_size=8,
                  use_linear_projection=True, upcast_attention=True),
        vae=dict(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8,
                 scaling_factor=0.18215, sample_size=16),
        # Odd sizes on the way down: 9, 5, 3, 2.
        latents=(1, 4, 9, 8), picture=(1, 3, 16, 24),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"),
    ),
    "starter": dict(
        tokenizer=("<|endoftext|>", "new"),
        text=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3,
                  hidden_act="quick_gelu"),
        unet=dict(in_channels=8, out_channels=8, block_out_channels=(16, 24, 32), layers_per_block=1,
                  attention_head_dim=(2, 3, 4), cross_attention_dim=24, norm_num_groups=8, sample_size=8,
                  down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3),
        vae=dict(latent_channels=8, block_out_channels=(8, 12, 16), layers_per_block=1, norm_num_groups=4,
                 scaling_factor=1.3, sample_size=32),
        latents=(2, 8, 8, 8), picture=(1, 3, 16, 16),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    ),
}  # fmt: skip


def stored_name(component, name):
    """The text encoder's parameters are stored below `text_model.`, whatever this version of transformers calls them."""
    if component == "text_encoder" and not name.startswith("text_model."):
        return "text_model." + name
    return name


def build(layout, folder):
    """The three networks and the tokenizer of a layout; writes their configs and shapes."""
    vocabulary = tokenizer_folder(folder / "tokenizer", *layout["tokenizer"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, max_position_embeddings=24, **layout["text"]))
    unet = UNet2DConditionModel(**layout["unet"])
    blocks = len(layout["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **layout["vae"]
    )
    text.config.architectures = ["CLIPTextModel"]
    models = dict(text_encoder=text, unet=unet, vae=vae)
    shapes = {}
    for component, model in models.items():
        (folder / component).mkdir()
        model.config.to_json_file(folder / component / "config.json") if component == "text_encoder" else \
            model.save_config(folder / component)
        tree = shapes[component] = {}
        for name, parameter in model.named_parameters():
            node = tree
            *path, leaf = stored_name(component, name).split(".")
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = list(parameter.shape)
    layout["scheduler"].save_pretrained(folder / "scheduler")
    index = dict(_class_name="StableDiffusionPipeline", feature_extractor=[None, None], safety_checker=[None, None],
                 scheduler=["diffusers", type(layout["scheduler"]).__name__], text_encoder=["transformers", "CLIPTextModel"],
                 tokenizer=["transformers", "CLIPTokenizer"], unet=["diffusers", "UNet2DConditionModel"],
                 vae=["diffusers", "AutoencoderKL"])  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "shapes.json").write_text(json.dumps(shapes, separators=(",", ":")))
    for component, model in models.items():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                full = f"{component}.{stored_name(component, name)}"
                parameter.copy_(values(full, tuple(parameter.shape), "weight"))
        model.eval().requires_grad_(False)
    return tokenizer, text, unet, vae


def outputs(layout, tokenizer, text, unet, vae):
    """What the networks compute on formula inputs."""
    out = {}
    encoded = tokenizer(PROMPTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    ids = out["ids"] = encoded.input_ids.to(torch.int64)
    with torch.no_grad():
        out["text"] = text(ids)[0][[0, 2]].contiguous()
        latents = values("latents", layout["latents"])
        timesteps = torch.tensor([981.0, 1.0][: latents.shape[0]])
        context = values("context", (latents.shape[0], 24, text.config.hidden_size))
        out["unet"] = unet(latents, timesteps, encoder_hidden_states=context).sample
        picture = values("picture", layout["picture"])
        posterior = vae.encode(picture).latent_dist
        out["mean"], out["logvar"] = posterior.mean.contiguous(), posterior.logvar.contiguous()
        z = values("z", tuple(posterior.mean.shape))
        out["picture"] = vae.decode(z).sample.contiguous()
        out["alphas_cumprod"] = layout["scheduler"].alphas_cumprod[[0, 1, 500, 999]].contiguous()
    return out


if __name__ == "__main__":
    from make_gradient_golden import gradients

    shutil.rmtree(ROOT, ignore_errors=True)
    for name, layout in LAYOUTS.items():
        folder = ROOT / name
        folder.mkdir(parents=True)
        parts = build(layout, folder)
        golden = outputs(layout, *parts)
        if name == "starter":
            golden |= gradients(layout, *parts, values)
        save_file(golden, folder / "golden.safetensors")
        print(name, {key: (tuple(value.shape), float(value.float().std())) for key, value in golden.items() if "." not in key})
    (ROOT / "prompts.json").write_text(json.dumps(PROMPTS))

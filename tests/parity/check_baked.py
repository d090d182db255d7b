"""Checks that a folder written by `blocklora merge` draws the same picture in diffusers as `blocklora generate` does.

    python tests/parity/check_baked.py BLOCKLORA ADAPTER [--base MODEL_FOLDER]

BLOCKLORA is the built command. Plain words need no help in diffusers. Layer-wise words do: the prompt is encoded once
for each cross-attention, and an attention processor hands each its own encoding.
"""

import argparse
import pathlib
import subprocess
import tempfile

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from philox import LATENTS, normals
from PIL import Image
from safetensors import safe_open

torch.set_num_threads(1)
STEPS, SEED, GUIDANCE = 20, 3, 7.5


class LayerWise(AttnProcessor):
    """Reads slice `layer` of encodings [B, L * T, d] that were put one after another."""

    def __init__(self, layer, layers):
        super().__init__()
        self.layer, self.layers = layer, layers

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        own = encoder_hidden_states.chunk(self.layers, dim=1)[self.layer]
        return super().__call__(attn, hidden_states, own, **kwargs)


def set_layer_wise(unet):
    """Numbers the cross-attentions in forward order: down blocks, middle, up blocks."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    attentions = [a for block in blocks for t in getattr(block, "attentions", []) for a in t.transformer_blocks]
    for i, block in enumerate(attentions):
        block.attn2.set_processor(LayerWise(i, len(attentions)))
    return len(attentions)


def encode(pipe, prompt, vectors, layers):
    """[1, L * T, d]: the prompt with the words' rows of the embedding table set to each layer's vectors in turn."""
    table = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer(
        pipe.maybe_convert_prompt(prompt, pipe.tokenizer), padding="max_length", return_tensors="pt"
    ).input_ids
    encodings = []
    for layer in range(layers):
        for word, values in vectors.items():
            table.data[pipe.tokenizer.convert_tokens_to_ids(word)] = values[layer % len(values)]
        encodings.append(pipe.text_encoder(ids)[0])
    return torch.cat(encodings, 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("blocklora")
    parser.add_argument("adapter")
    parser.add_argument("--base")
    options = parser.parse_args()
    base = ["--base", options.base] if options.base else []
    folder = pathlib.Path(tempfile.mkdtemp())
    baked, ours = folder / "baked", folder / "ours.png"
    subprocess.run([options.blocklora, "merge", options.adapter, "-o", baked, *base], check=True)
    with safe_open(baked / "blocklora_tokens.safetensors", "pt") as file:
        names = sorted(file.keys())
        concept = names[0].split(".")[0]
        tokens = [file.get_tensor(name) for name in names]
    prompt = f"a <{concept}> on the beach"
    # From the baked folder, so that both use the same rounded weights.
    settings = ["--steps", STEPS, "--seed", SEED, "--guidance", GUIDANCE, "--sampler", "ddim", "--base", baked]
    subprocess.run([options.blocklora, "generate", prompt, "-o", ours, *map(str, settings)], check=True)

    pipe = StableDiffusionPipeline.from_pretrained(baked, safety_checker=None, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    shape = (1, pipe.unet.config.in_channels, side, side)
    start = torch.from_numpy(normals(SEED, LATENTS, 0, 0, int(np.prod(shape))).reshape(shape))
    settings = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=start)
    words = [f"<{concept}>", *(f"<{concept}>_{i}" for i in range(1, len(tokens)))]
    with torch.no_grad():
        if max(len(t) for t in tokens) == 1:
            image = pipe(prompt, **settings).images[0]
        else:
            layers = set_layer_wise(pipe.unet)
            vectors = dict(zip(words, tokens))
            positive = encode(pipe, prompt, vectors, layers)
            negative = encode(pipe, "", vectors, layers)
            image = pipe(prompt_embeds=positive, negative_prompt_embeds=negative, **settings).images[0]
    theirs, ours = np.asarray(image).astype(int), np.asarray(Image.open(ours)).astype(int)
    difference = np.abs(theirs - ours).max()
    print(f"{options.adapter}: largest difference of a pixel {difference}/255, deviation of the picture {ours.std():.0f}")
    raise SystemExit(int(difference > 2))


if __name__ == "__main__":
    main()

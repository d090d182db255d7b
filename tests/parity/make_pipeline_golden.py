"""Writes golden/pipeline/: a tiny random Stable Diffusion folder, and pictures.json with what diffusers makes with it.

Latents and sampler noise are the engine's (philox.py), so that a seed means the same picture in both. With a model
folder as argument it makes pictures with that instead and writes them to the given file:

    python tests/parity/make_pipeline_golden.py
    python tests/parity/make_pipeline_golden.py MODEL_FOLDER PICTURES.json
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_module
from philox import LATENTS, SAMPLER, normals
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)
golden = pathlib.Path(__file__).resolve().parent.parent / "golden"


def make_model(folder):
    """A model of some 40,000 parameters, with weights that make its pictures depend on everything."""
    torch.manual_seed(11)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tokenizer").mkdir(parents=True)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(golden / "clip" / name, folder / "tokenizer")
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(["eos_token", "pad_token", "unk_token"], "<|endoftext|>")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, **special})
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=12, hidden_act="quick_gelu", projection_dim=16,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=16, latent_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.8,
    )  # fmt: skip
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight.mul_(20.0)
        for name, p in unet.named_parameters():
            if "attn2" in name and p.ndim == 2:
                p.mul_(3.0)
        unet.conv_out.weight.mul_(2.0)
        vae.decoder.conv_out.weight.mul_(2.0)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder)
    # transformers 5 leaves out the prefix that every Stable Diffusion checkpoint has.
    path = folder / "text_encoder" / "model.safetensors"
    weights = {"text_model." + name.removeprefix("text_model."): w for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    for name in ["tokenizer.json", "special_tokens_map.json"]:
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(golden / "clip" / name, folder / "tokenizer")


def load(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, sampler, prompt, negative, steps, guidance, seed, width, height, prediction):
    config = dict(pipe.scheduler.config) | {"prediction_type": prediction}
    pipe.scheduler = {
        "ddim": DDIMScheduler,
        "dpmpp-2m": DPMSolverMultistepScheduler,
        "euler-a": EulerAncestralDiscreteScheduler,
    }[sampler].from_config(config)
    shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    n = int(np.prod(shape))
    step = iter(range(steps))
    euler_module.randn_tensor = lambda *_args, **_kwargs: torch.from_numpy(
        normals(seed, SAMPLER, next(step), 0, n).reshape(shape)
    )
    start = torch.from_numpy(normals(seed, LATENTS, 0, 0, n).reshape(shape))
    return pipe(
        prompt, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, latents=start,
        width=width, height=height,
    ).images[0]  # fmt: skip


def run(pipe, case):
    image = picture(pipe, **case)
    pixels = np.asarray(image)
    print(case, "mean", pixels.mean().round(1), "deviation", pixels.std().round(1))
    return {**case, "pixels": pixels.tobytes().hex()}


base = dict(sampler="ddim", negative="", steps=20, guidance=7.5, seed=3, prediction="epsilon")
if len(sys.argv) == 3:
    pipe = load(sys.argv[1])
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    base |= dict(prompt="a dog on the beach, noto style", width=side, height=side)
    base["prediction"] = pipe.scheduler.config.prediction_type
    cases = [base, base | dict(sampler="dpmpp-2m", seed=4), base | dict(sampler="euler-a", negative="a cat")]
    out = pathlib.Path(sys.argv[2])
else:
    make_model(golden / "pipeline")
    pipe = load(golden / "pipeline")
    base |= dict(prompt="a photo of a cat", width=16, height=16)
    cases = [
        base,
        base | dict(prompt="dog"),
        base | dict(guidance=1.0),
        base | dict(sampler="dpmpp-2m", negative="dog", seed=2**63 + 5),
        base | dict(sampler="euler-a", width=24, height=8),
        base | dict(prediction="v_prediction"),
        base | dict(sampler="euler-a", prediction="v_prediction", guidance=3.0),
    ]
    out = golden / "pipeline" / "pictures.json"
out.write_text(json.dumps([run(pipe, case) for case in cases]) + "\n")

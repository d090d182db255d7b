"""Writes the Stable Diffusion folder (model/) and the scorer (clip/), all f16.

With --from, a part that was not trained in this work folder stays as it is in the output.
"""
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from common import read_json, write_json
from train_unet import BETAS

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


def scheduler():
    """SD 1.x: epsilon prediction, scaled-linear betas."""
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon")


def export_model(out, destination):
    destination = Path(destination)
    temporary = destination.with_name(destination.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = CLIPTokenizer.from_pretrained(str(out / "tokenizer"))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"), text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder"),
        tokenizer=tokenizer, unet=UNet2DConditionModel.from_pretrained(out / "unet"), scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.to(torch.float16).save_pretrained(temporary)
    for name in TOKENIZER_FILES:
        shutil.copy(out / "tokenizer" / name, temporary / "tokenizer" / name)
    # newer transformers drop the "text_model." prefix that every SD checkpoint has
    path = temporary / "text_encoder/model.safetensors"
    weights = load_file(path)
    save_file({"text_model." + k.removeprefix("text_model."): v.contiguous() for k, v in weights.items()
               if not k.endswith("position_ids")}, path, {"format": "pt"})
    for config in temporary.glob("*/config.json"):      # no path of the training machine
        values = read_json(config)
        values.pop("_name_or_path", None)
        write_json(config, values)
    shutil.copy(out / "unet.json", temporary / "training.json")
    # what `blocklora` draws and trains with where nothing is said: more guidance burns the colours of learnt words
    shutil.copy(Path(__file__).with_name("defaults.json"), temporary / "blocklora.json")
    _swap(temporary, destination)


def export_clip(out, destination, cfg):
    destination = Path(destination)
    temporary = destination.with_name(destination.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    CLIPModel.from_pretrained(out / "scorer").half().save_pretrained(temporary)
    for name in TOKENIZER_FILES:
        shutil.copy(out / "tokenizer" / name, temporary / name)
    write_json(temporary / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": cfg["size"]}, "do_center_crop": True,
        "crop_size": {"height": cfg["size"], "width": cfg["size"]}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [.5] * 3, "image_std": [.5] * 3})
    _swap(temporary, destination)


def _swap(temporary, destination):
    old = destination.with_name(destination.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    temporary.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def run(cfg, out, destination):
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for part, trained, export in (("model", "unet", lambda to: export_model(out, to)),
                                  ("clip", "scorer", lambda to: export_clip(out, to, cfg))):
        if (out / trained).exists():
            export(destination / part)
        elif not (destination / part).exists():
            raise SystemExit(f"{destination / part}: nothing to leave as it is, and no {trained} was trained in {out}")
    size = sum(p.stat().st_size for d in ("model", "clip") for p in (destination / d).rglob("*") if p.is_file())
    print(f"model + clip {size / 1e6:.1f} MB")

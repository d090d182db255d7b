"""Goes on from a finished starter folder: its tokenizer, VAE, text tower, UNet and scorer become this work folder's.

Only the exported f16 weights are needed, not the work folder that they came from. The optimisers start afresh, so
the learning rate warms up again; `[onward]` in the configuration says at what rate and on what pictures.
"""
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel

from common import read_json, write_json

STARTED = ("tokenizer", "vae", "clip")     # stages that the folder stands for


def configure(cfg):
    """`cfg` with the values of its table `onward` over its own."""
    for key, value in cfg.pop("onward", {}).items():
        cfg[key] = {**cfg[key], **value} if isinstance(value, dict) else value
    return cfg


def run(work, folder):
    """Copies `folder`/model and `folder`/clip into `work` as f32, with the counts of what they were trained on."""
    model = Path(folder) / "model"
    if not (model / "model_index.json").exists():
        raise SystemExit(f"{folder}: no model/model_index.json; --from wants a folder that this recipe made")
    shutil.copytree(model / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).save_pretrained(work / "vae")
    CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32).save_pretrained(work / "text_encoder")
    UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).save_pretrained(work / "unet_from")
    CLIPModel.from_pretrained(Path(folder) / "clip", dtype=torch.float32).save_pretrained(work / "scorer_from")
    before = read_json(Path(folder) / "scores.json")["training"]
    write_json(work / "from.json", before)
    for stage, counts in before.items():       # the stages that are trained on here write theirs anew
        write_json(work / f"{stage}.json", counts)
    for stage in STARTED:
        (work / f"{stage}.done").touch()


def before(work, stage):
    """-> steps, samples of `stage` before this work folder; zero without --from."""
    path = work / "from.json"
    counts = read_json(path).get(stage, {}) if path.exists() else {}
    return counts.get("steps", 0), counts.get("samples", 0)

"""Sampling and contact sheets."""
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

import world
from common import DEVICE, read_json


def load_pipeline(folder):
    """f32 for the CPU's sake; DPM-Solver++ over the folder's own betas."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(DEVICE, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, algorithm_type="dpmsolver++")
    return pipeline


def generate(pipeline, prompts, cfg, seed=0, batch=50):
    """uint8 [n, h, w, 3]; picture i has its own generator, seed + i."""
    images = []
    for i in range(0, len(prompts), batch):
        part = prompts[i:i + batch]
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        images += [np.asarray(x) for x in pipeline(part, num_inference_steps=cfg["steps"], generator=generators,
                                                   guidance_scale=cfg["guidance"]).images]
    return np.stack(images)


def sheet(images, captions, path, columns, zoom=3):
    side = images.shape[1] * zoom
    height = side + (24 if captions else 0)
    rows = (len(images) + columns - 1) // columns
    canvas = Image.new("RGB", (columns * side, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        x, y = i % columns * side, i // columns * height
        canvas.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (x, y))
        if captions:
            text, limit = captions[i], side // 5
            cut = text.rfind(" ", 0, limit) if len(text) > limit else len(text)
            draw.text((x + 1, y + side), text[:cut] + "\n" + text[cut + 1:][:limit], fill="black", font_size=9, spacing=0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def prompts_single(table, count, seed=11):
    rng = random.Random(seed)
    order = rng.sample(range(len(table)), len(table))
    backgrounds = world.backgrounds()
    return [f"{world.article(table[order[k % len(order)]]['noun'])} {rng.choice(backgrounds)}, "
            f"{world.STYLES[k % len(world.STYLES)]} style" for k in range(count)]


def prompts_two(table, count, seed=12):
    rng = random.Random(seed)
    backgrounds = world.backgrounds()
    prompts = []
    for k in range(count):
        a, b = rng.sample(range(len(table)), 2)
        prompts.append(f"{world.article(table[a]['noun'])} and {world.article(table[b]['noun'])} "
                       f"{rng.choice(backgrounds)}, {world.STYLES[k % len(world.STYLES)]} style")
    return prompts


def run(cfg, out, model, destination):
    count = cfg.get("sheet", 80)
    destination, table = Path(destination), read_json(out / "nouns.json")
    pipeline = load_pipeline(model)
    single, two = prompts_single(table, count), prompts_two(table, count // 2)
    sheet(generate(pipeline, single, cfg), single, destination / "single.png", 10)
    sheet(generate(pipeline, two, cfg, 500), two, destination / "two.png", 10)
    classes = ["a man", "a woman", "a person", "a dog", "a cat", "a bear", "a robot", "a house", "an animal", "the beach"]
    prompts = [c for c in classes for _ in range(8)]
    sheet(generate(pipeline, prompts, cfg, 900), prompts, destination / "classes.png", 8)
    small = [f"a {size} {noun}{spot} {b}" for noun, b in (("car", "on the beach"), ("dog", "on a blue background"))
             for size in ("small", "big") for spot in ("", " on the left", " on the right")]
    sheet(generate(pipeline, small, cfg, 1300), small, destination / "layout.png", 6)
    val = np.load(out / "val.npy")[:40]
    captions = read_json(out / "val.json")["captions"][:40]
    sheet(val, captions, destination / "real.png", 10)
    reconstruction(cfg, pipeline.vae, val[:20], destination / "vae.png")


@torch.no_grad()
def reconstruction(cfg, vae, images, path):
    from common import pixels
    y = vae.decode(vae.encode(pixels(images)).latent_dist.mode()).sample.clamp(-1, 1)
    y = ((y.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
    sheet(np.concatenate([images[:10], y[:10], images[10:20], y[10:20]]), None, path, 10)

"""Sprites, the composed training pool, the held-back validation set and the VAE's extra pictures."""
import random
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

import art
import world
from common import read_json, write_json

SPRITE_SIDE = 64
CHUNK = 1000


def save_sprites(sprites, out):
    """Writes sprites.npz, nouns.json and the digests of every sprite that training will see."""
    table, arrays = [], {s: [] for s in world.STYLES}
    for entry in world.nouns():
        images = {s: sprites.get(s, entry["short"]) for s in world.STYLES}
        if any(image is None for image in images.values()):
            print("left out, not in every style:", entry["noun"])
            continue
        table.append(entry)
        for s, image in images.items():
            arrays[s].append(np.asarray(image.resize((SPRITE_SIDE, SPRITE_SIDE), Image.LANCZOS)))
    np.savez(out / "sprites.npz", **{s: np.stack(a) for s, a in arrays.items()})
    write_json(out / "nouns.json", table)
    return table


def save_extras(sprites, table, size, out, limit=None):
    """Every other emoji once per style on some background: a wider world for the VAE and the scorer."""
    rng, images, names = random.Random(5), [], []
    used = {e["short"] for e in table}
    nouns = {e["noun"] for e in table}
    for short in sprites.others(used)[:limit]:
        name = short.replace("_", " ").replace("-", " ")
        if name in nouns:
            continue
        for style in world.STYLES:
            sprite = sprites.get(style, short)
            if sprite is None:
                continue
            for layout in ("normal", "big"):
                canvas, phrase, _ = world.background(rng, size)
                world.place(canvas, sprite, layout, world.LEFT[layout][""], rng, .06)
                images.append(np.asarray(canvas))
                names.append(name)
    np.save(out / "extra.npy", np.stack(images))
    write_json(out / "extra.json", names)


_cache = {}


def _load(out):
    if out not in _cache:
        table = read_json(Path(out) / "nouns.json")
        arrays = np.load(Path(out) / "sprites.npz")
        _cache[out] = {s: [Image.fromarray(a) for a in arrays[s]] for s in world.STYLES}, table
    return _cache[out]


def _chunk(job):
    out, seed, count, size, held, counts = job
    sprites, table = _load(out)
    rng = random.Random(seed)
    images, captions, metas = np.empty((count, size, size, 3), np.uint8), [], []
    for i in range(count):
        image, caption, meta = world.sample(rng, sprites, table, size, held, counts)
        images[i] = np.asarray(image)
        captions.append(caption)
        metas.append(meta)
    return images, captions, metas


def compose(out, count, size, seed, held=False, counts=world.COUNTS, processes=1):
    """`count` pictures; the same seed gives the same pictures however many processes there are."""
    jobs = [(str(out), seed + i, min(CHUNK, count - i * CHUNK), size, held, counts)
            for i in range((count + CHUNK - 1) // CHUNK)]
    with Pool(processes) as pool:
        parts = pool.map(_chunk, jobs, 1)
    return (np.concatenate([p[0] for p in parts]), sum((p[1] for p in parts), []), sum((p[2] for p in parts), []))


def run(cfg, out, art_folder, processes):
    sprites = art.Sprites(art_folder)
    table = save_sprites(sprites, out)
    save_extras(sprites, table, cfg["size"], out, cfg.get("extras"))
    write_json(out / "trained_digests.json", sprites.digests)
    images, captions, metas = compose(out, cfg["pool"], cfg["size"], cfg.get("pool_seed", 1000), counts=cfg.get("counts", world.COUNTS),
                                      processes=processes)
    np.save(out / "pool.npy", images)
    write_json(out / "pool.json", {"captions": captions, "metas": metas}, None)
    images, captions, metas = compose(out, cfg["val"], cfg["size"], 900000, held=True, processes=processes)
    np.save(out / "val.npy", images)
    write_json(out / "val.json", {"captions": captions, "metas": metas}, None)
    print("nouns", len(table), "pool", cfg["pool"], "held-back", cfg["val"])

"""Caches what the UNet trains on: latents of the pool and text states of its captions (fp16)."""
import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from common import DEVICE, RANK, WORLD, pixels, read_json
from tokenizer import ids


@torch.no_grad()
def encode_latents(cfg, out):
    """This process's share of the pool -> latents_<rank>.npy."""
    vae = AutoencoderKL.from_pretrained(out / "vae").to(DEVICE, memory_format=torch.channels_last).eval()
    pool = np.load(out / "pool.npy", mmap_mode="r")
    mine = np.array_split(np.arange(len(pool)), WORLD)[RANK]
    parts = []
    for i in range(0, len(mine), 250):
        z = vae.encode(pixels(pool[mine[i]:mine[min(i + 250, len(mine)) - 1] + 1])).latent_dist.mode()
        parts.append((z * vae.config.scaling_factor).half().cpu().numpy())
    np.save(out / f"latents_{RANK}.npy", np.concatenate(parts))


@torch.no_grad()
def encode_texts(cfg, out):
    """This process's share -> text_states_<rank>.npy [unique captions, length, width], the empty caption first;
    and text_index.npy [pool]."""
    captions = read_json(out / "pool.json")["captions"]
    unique = [""] + sorted(set(captions) - {""})
    index = {c: i for i, c in enumerate(unique)}
    tokenizer = CLIPTokenizer.from_pretrained(str(out / "tokenizer"))
    model = CLIPTextModel.from_pretrained(out / "text_encoder").to(DEVICE).eval()
    length = cfg["max_length"]
    mine = np.array_split(np.arange(len(unique)), WORLD)[RANK]
    parts = []
    for i in range(mine[0], mine[-1] + 1, 250):
        x = ids(tokenizer, unique[i:min(i + 250, mine[-1] + 1)], length).to(DEVICE)
        parts.append(model(x).last_hidden_state.half().cpu().numpy())
    np.save(out / f"text_states_{RANK}.npy", np.concatenate(parts))
    if RANK == 0:
        np.save(out / "text_index.npy", np.array([index[c] for c in captions]))


def join(out, name, world):
    """The processes' shares -> <name>.npy."""
    parts = [out / f"{name}_{r}.npy" for r in range(world)]
    z = np.concatenate([np.load(p) for p in parts])
    np.save(out / f"{name}.npy", z)
    for p in parts:
        p.unlink()
    some = z[:2000].astype(np.float32)
    print(name, z.shape, "mean", some.mean().round(3), "std", some.std().round(3))

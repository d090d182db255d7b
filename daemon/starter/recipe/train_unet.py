"""The UNet: UNet2DConditionModel on cached latents and cached states of the frozen text tower.

GPU: one process. CPU: as many one-thread processes as cores (RANK, WORLD, RENDEZVOUS in the environment);
each takes `sync` local steps, then the weights are averaged. One process per core beats two threads in one
process when the machine is shared, and averaging seldom beats averaging every gradient.
"""
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

import onward
from common import DEVICE, EMA, RANK, WORLD, Clock, autocast, log, save_atomically, write_json

BETAS = {"num_train_timesteps": 1000, "beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear"}


def build(u, latent_channels, text_width, side):
    """Cross-attention at every resolution: 3 + 1 + 6 attention blocks for three levels and one layer."""
    channels = tuple(u["channels"])
    n = len(channels)
    return UNet2DConditionModel(
        sample_size=side, in_channels=latent_channels, out_channels=latent_channels, block_out_channels=channels,
        layers_per_block=u["layers"], cross_attention_dim=text_width, norm_num_groups=u["groups"],
        attention_head_dim=tuple(c // u["head_channels"] for c in channels),   # diffusers: the number of heads
        down_block_types=("CrossAttnDownBlock2D",) * n, up_block_types=("CrossAttnUpBlock2D",) * n)


class Latents:
    """Training pairs: scaled latents, and the caption's text states with some dropped to the empty caption's."""

    def __init__(self, out, drop, seed):
        self.latents = np.load(out / "latents.npy", mmap_mode="r")
        self.states = np.load(out / "text_states.npy", mmap_mode="r")
        self.which = np.load(out / "text_index.npy")
        if DEVICE == "cuda":
            self.latents, self.states = (torch.from_numpy(np.array(a)).to(DEVICE) for a in (self.latents, self.states))
        self.drop, self.rng = drop, np.random.default_rng(seed)

    def batch(self, size):
        j = self.rng.integers(0, len(self.latents), size)
        k = np.where(self.rng.random(size) < self.drop, 0, self.which[j])
        pick = (lambda a, i: a[torch.from_numpy(i).to(DEVICE)]) if DEVICE == "cuda" else \
            (lambda a, i: torch.from_numpy(a[i]))
        return pick(self.latents, j).float(), pick(self.states, k).float()


def timesteps(n, dense=(50, 650), share=.6):
    """Stratified; `share` of them more between the two bounds of `dense`, where a small picture is decided:
    earlier steps are VAE detail, at later ones little but the background's colour is left of it."""
    u = (torch.randperm(n) + torch.rand(n)) / n
    lo, hi = dense
    t = torch.where(u < share, lo + (hi - lo) * u / share, 1000 * (u - share) / (1 - share))
    return t.long().clamp(max=999)


@torch.no_grad()
def average(params):
    """The mean of the weights over all processes."""
    flat = torch.cat([p.flatten() for p in params])
    dist.all_reduce(flat)
    flat /= WORLD
    at = 0
    for p in params:
        p.copy_(flat[at:at + p.numel()].view(p.shape))
        at += p.numel()


def agree(clock, step, flag):
    """-> fraction of the budget, whether to stop, whether to save: the same on every process."""
    t = torch.tensor([clock.fraction(step), float(clock.over(step) or flag.exists())])
    if WORLD > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t[0].item(), t[1].item() > 0


def run(cfg, out, resume=True):
    u = cfg["unet"]
    if WORLD > 1:
        dist.init_process_group("gloo", init_method="file://" + os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    torch.manual_seed(0)
    latents = np.load(out / "latents.npy", mmap_mode="r")
    width = np.load(out / "text_states.npy", mmap_mode="r").shape[2]
    model = build(u, latents.shape[1], width, latents.shape[2]).to(DEVICE, memory_format=torch.channels_last)
    if DEVICE == "cpu":
        model.set_attn_processor(AttnProcessor())    # the fused CPU kernel's backward is slow on short sequences
    state_path, step, samples, spent = out / f"unet_state_{RANK}.pt", 0, 0, 0.0
    if (out / "unet_from").exists():
        model.load_state_dict(UNet2DConditionModel.from_pretrained(out / "unet_from").state_dict())
    params = list(model.parameters())
    ema = EMA(model, u["ema"])
    opt = torch.optim.AdamW(params, u["lr"], weight_decay=.01, betas=(.9, .99), fused=True)
    if resume and state_path.exists():
        s = torch.load(state_path, map_location=DEVICE)
        model.load_state_dict(s["model"])
        opt.load_state_dict(s["optimizer"])
        ema.shadow, ema.steps, step, samples, spent = s["ema"], s["ema_steps"], s["step"], s["samples"], s["spent"]
    if RANK == 0:
        print("unet parameters", sum(p.numel() for p in params) / 1e6, "from step", step, flush=True)
    alphas = DDPMScheduler(**BETAS).alphas_cumprod.to(DEVICE)
    data, b = Latents(out, u["drop"], [step, RANK]), u["batch"]
    torch.manual_seed(1000 * step + RANK)
    clock, forward = Clock(u, u["warmup"], spent), torch.compile(model) if u.get("compile") else model
    fraction, sums, last, t0, n0, every = 0.0, [], time.time(), time.time(), samples, max(1, u["sync"] if WORLD > 1 else 8)
    warm_from = step

    def save():
        save_atomically({"model": model.state_dict(), "optimizer": opt.state_dict(), "ema": ema.shadow, "ema_steps": ema.steps,
                         "step": step, "samples": samples, "spent": clock.spent()}, state_path)
        if RANK == 0:
            with ema.swapped():
                model.save_pretrained(out / "unet")
            steps, seen = onward.before(out, "unet")
            write_json(out / "unet.json", {"steps": steps + step, "samples": seen + samples})

    while True:
        if step % every == 0:
            if WORLD > 1:
                average(params)
            if step > warm_from:
                ema.update(every)
            fraction, stop = agree(clock, step, out / "STOP")
            if stop:
                break
            if time.time() - last > u["checkpoint"]:
                last = time.time()
                save()
        for g in opt.param_groups:
            g["lr"] = u["lr"] * clock.factor(step - warm_from, fraction)
        z, text = data.batch(b)
        t = timesteps(b).to(DEVICE)
        noise = torch.randn_like(z)
        a = alphas[t][:, None, None, None]
        x = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with autocast(cfg["bf16"]):
            predicted = forward(x, t, text).sample
        mse = (predicted.float() - noise).pow(2).mean((1, 2, 3))
        snr = a.flatten() / (1 - a.flatten())
        loss = (mse * snr.clamp(max=u["min_snr"]) / snr).mean()       # min-SNR weights for an epsilon target
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        step += 1
        samples += b * WORLD
        if DEVICE == "cpu" or step % 10 == 0:
            sums.append([mse.mean().item(), loss.item()])
        if RANK == 0 and step % u["every"] == 0:
            m = np.mean(sums, 0)
            sums = []
            log(out, "unet", step, samples, m[0], weighted=m[1], rate=(samples - n0) / (time.time() - t0),
                lr=opt.param_groups[0]["lr"])
    save()
    if RANK == 0:
        print("unet done", step, samples)

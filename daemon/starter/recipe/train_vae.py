"""The VAE: a small AutoencoderKL (f = 4) on composed pictures and every further emoji."""
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from common import DEVICE, EMA, Clock, autocast, log, pixels, read_json, save_atomically, write_json


def build(v, size):
    n = len(v["channels"])
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=tuple(v["channels"]),
        layers_per_block=v["layers"], latent_channels=v["latent"], norm_num_groups=v["groups"],
        sample_size=size, act_fn="silu")


@torch.no_grad()
def identity_init(vae, latent, noise=.3):
    """A CPU has no time to find an autoencoder from noise: start as box pyramid -> bottleneck -> nearest
    upsampling, residual branches near zero, little latent noise."""
    def eye(conv, taps):
        w = conv.weight * noise
        for c in range(min(w.shape[:2])):
            for y, x, gain in taps:
                w[c, c, y, x] += gain
        conv.weight.copy_(w)
        conv.bias.zero_()

    for m in vae.modules():
        if isinstance(m, ResnetBlock2D):
            m.conv2.weight.mul_(.1)
            m.conv2.bias.zero_()
            if m.conv_shortcut is not None:
                eye(m.conv_shortcut, [(0, 0, 1)])
        elif isinstance(m, Downsample2D):
            eye(m.conv, [(y, x, .25) for y in (0, 1) for x in (0, 1)])
        elif isinstance(m, Upsample2D):
            eye(m.conv, [(1, 1, 1)])
    for half in (vae.encoder, vae.decoder):
        eye(half.conv_in, [(1, 1, 1)])
        eye(half.conv_out, [(1, 1, 1)])
        for attention in half.mid_block.attentions:
            attention.to_out[0].weight.mul_(.1)
    vae.encoder.conv_out.weight[latent:] *= .1
    for conv, n in ((vae.quant_conv, 2 * latent), (vae.post_quant_conv, latent)):
        conv.weight.copy_(torch.eye(n)[:, :, None, None])
        conv.bias.zero_()
    vae.quant_conv.bias[latent:] = -6


def reconstruction_loss(y, x):
    """L1 + 2 MSE + L1 of the gradients (sharp edges); -> loss, mse."""
    def gradients(a):
        return a[..., 1:] - a[..., :-1], a[..., 1:, :] - a[..., :-1, :]

    mse = F.mse_loss(y, x)
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(y), gradients(x)))
    return (y - x).abs().mean() + 2 * mse + .5 * edges, mse


@torch.no_grad()
def psnr(vae, images):
    """PSNR in dB of the reconstructions, from the mean squared error over all pictures (peak 2 in -1..1)."""
    error = 0.0
    for i in range(0, len(images), 100):
        x = pixels(images[i:i + 100])
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        error += (y - x).pow(2).mean((1, 2, 3)).sum().item()
    return 10 * math.log10(4 / (error / len(images)))


def batches(cfg, out, seed):
    """Endless pictures: three quarters composed, one quarter further emoji; mirrored, channels swapped."""
    pool, extra = np.load(out / "pool.npy", mmap_mode="r"), np.load(out / "extra.npy")
    rng, b = np.random.default_rng(seed), cfg["vae"]["batch"]
    while True:
        few = max(1, b // 4)
        x = np.concatenate([pool[np.sort(rng.integers(0, len(pool), b - few))],
                            extra[rng.integers(0, len(extra), few)]])
        if rng.random() < .5:
            x = x[:, :, ::-1]
        if rng.random() < .2:
            x = x[..., rng.permutation(3)]
        yield pixels(x).contiguous(memory_format=torch.channels_last)


def run(cfg, out, resume=True):
    v = cfg["vae"]
    torch.manual_seed(0)
    vae = build(v, cfg["size"])
    identity_init(vae, v["latent"])
    vae = vae.to(DEVICE, memory_format=torch.channels_last)
    ema = EMA(vae, v["ema"])
    opt = torch.optim.AdamW(vae.parameters(), v["lr"], weight_decay=1e-4, betas=(.9, .99))
    state_path, step, spent = out / "vae_state.pt", 0, 0.0
    if resume and state_path.exists():
        s = torch.load(state_path, map_location=DEVICE)
        vae.load_state_dict(s["model"])
        opt.load_state_dict(s["optimizer"])
        ema.shadow, ema.steps, step, spent = s["ema"], s["steps"], s["step"], s["spent"]
    print("vae parameters", sum(p.numel() for p in vae.parameters()) / 1e6)
    clock = Clock(v, 50, spent)
    val, data, sums, last, t0 = np.load(out / "val.npy")[:200], batches(cfg, out, step), [], time.time(), time.time()
    first = step
    while not clock.over(step):
        for g in opt.param_groups:
            g["lr"] = v["lr"] * clock.factor(step)
        x = next(data)
        with autocast(cfg["bf16"]):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        loss, mse = reconstruction_loss(y.float(), x)
        loss = loss + v["kl"] * posterior.kl().float().mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        step += 1
        ema.update()
        sums.append([loss.item(), mse.item()])
        if step % v["every"] == 0:
            mean = np.mean(sums, 0)
            sums = []
            note = {}
            if step % (10 * v["every"]) == 0:
                with ema.swapped():
                    note["val"] = psnr(vae, val)
            rate = (step - first) * v["batch"] / (time.time() - t0)
            log(out, "vae", step, step * v["batch"], mean[0], psnr=10 * math.log10(4 / mean[1]), rate=rate, **note)
        if time.time() - last > 120:
            last = time.time()
            save_atomically({"model": vae.state_dict(), "optimizer": opt.state_dict(), "ema": ema.shadow,
                             "steps": ema.steps, "step": step, "spent": clock.spent()}, state_path)
    save_atomically({"model": vae.state_dict(), "optimizer": opt.state_dict(), "ema": ema.shadow,
                     "steps": ema.steps, "step": step, "spent": clock.spent()}, state_path)
    ema._swap()
    finish(cfg, out, vae.float(), step)


@torch.no_grad()
def standardise(vae, images, std):
    """Gives every latent channel mean 0 and deviation `std`, by folding the scale into the 1x1 convolutions on
    both sides of the latent: the pictures stay the same, the diffusion sees equal channels."""
    n = vae.config.latent_channels
    z = torch.cat([vae.encode(pixels(images[i:i + 100])).latent_dist.mode() for i in range(0, len(images), 100)])
    mean, gain = z.mean((0, 2, 3)), std / z.std((0, 2, 3))
    q, p = vae.quant_conv, vae.post_quant_conv
    p.bias += p.weight[:, :, 0, 0] @ mean
    p.weight /= gain[None, :, None, None]
    q.weight[:n] *= gain[:, None, None, None]
    q.bias[:n] = (q.bias[:n] - mean) * gain
    q.bias[n:] += 2 * gain.log()


def finish(cfg, out, vae, step):
    """Standardises the latents to SD 1.x's deviation of 1 / 0.18215 and saves out/vae."""
    vae.eval()
    pool, val = np.load(out / "pool.npy", mmap_mode="r"), np.load(out / "val.npy")
    standardise(vae, pool[:2000], 1 / .18215)
    vae.register_to_config(scaling_factor=.18215)
    vae.save_pretrained(out / "vae")
    result = {"psnr_unseen_db": psnr(vae, val), "steps": step, "samples": step * cfg["vae"]["batch"]}
    write_json(out / "vae.json", result)
    print(result)

"""Writes golden/samplers.json: the latents after every step of diffusers' schedulers on Gaussian data.

The data are N(mean_i, deviation_i^2) in each of 8 coordinates, so the best noise prediction is known exactly:
eps(z, t) = sigma_t (z - alpha_t mean) / (alpha_t^2 deviation^2 + sigma_t^2). blocklora_sdk::testing::check_sampler runs
the same denoiser with the same noise. Latents are given in the variance-preserving scaling; all start from the same
latents there, whatever the scheduler's init_noise_sigma.

    python tests/parity/make_sampler_golden.py
"""

import json
import pathlib

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_module
from diffusers.schedulers import scheduling_lcm as lcm_module

torch.set_num_threads(1)
STEPS, N = 20, 8
STABLE_DIFFUSION = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)
MEAN = torch.tensor([-1.0 + 0.25 * i for i in range(N)])
DEVIATION = torch.tensor([0.2 + 0.15 * i for i in range(N)])
generator = torch.Generator().manual_seed(2024)
START = torch.randn(N, generator=generator)
NOISE = torch.randn(STEPS, N, generator=generator)


def predict(scheduler, z, t):
    # Between two timesteps the logarithm of sigma / alpha is interpolated.
    alphas_cumprod = scheduler.alphas_cumprod.double()
    log_ratios = 0.5 * torch.log((1 - alphas_cumprod) / alphas_cumprod)
    low, part = int(t), float(t) - int(t)
    high = min(low + 1, len(log_ratios) - 1)
    ratio = torch.exp((1 - part) * log_ratios[low] + part * log_ratios[high])
    alpha = 1 / (ratio**2 + 1).sqrt()
    sigma = ratio * alpha
    z = z.double()
    return (sigma * (z - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)).float()


def ddim(eta, **config):
    scheduler = DDIMScheduler(clip_sample=False, **{**STABLE_DIFFUSION, **config})
    scheduler.set_timesteps(STEPS)
    z, latents = START.clone(), []
    for i, t in enumerate(scheduler.timesteps):
        noise = NOISE[i] if eta > 0 else None
        z = scheduler.step(predict(scheduler, z, t), t, z, eta=eta, variance_noise=noise).prev_sample
        latents.append(z)
    return latents


def dpmpp_2m(steps=STEPS, **config):
    scheduler = DPMSolverMultistepScheduler(**{**STABLE_DIFFUSION, "timestep_spacing": "leading", **config})
    scheduler.set_timesteps(steps)
    z, latents = START.clone(), []
    for t in scheduler.timesteps:
        z = scheduler.step(predict(scheduler, z, t), t, z).prev_sample
        latents.append(z)
    return latents


def dpmpp_2m_sde(steps=STEPS, **config):
    config = {**STABLE_DIFFUSION, "timestep_spacing": "leading", **config}
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **config)
    scheduler.set_timesteps(steps)
    z, latents = START.clone(), []
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.step(predict(scheduler, z, t), t, z, variance_noise=NOISE[i]).prev_sample
        latents.append(z)
    return latents


def euler(**config):
    scheduler = EulerDiscreteScheduler(**{**STABLE_DIFFUSION, "timestep_spacing": "leading", **config})
    scheduler.set_timesteps(STEPS)
    x, latents = START * (scheduler.sigmas[0] ** 2 + 1) ** 0.5, []
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.scale_model_input(x, t)
        x = scheduler.step(predict(scheduler, z, t), t, x).prev_sample
        latents.append(x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5)
    return latents


def heun(steps=STEPS, **config):
    scheduler = HeunDiscreteScheduler(**{**STABLE_DIFFUSION, "timestep_spacing": "leading", **config})
    scheduler.set_timesteps(steps)
    x, latents = START * (scheduler.sigmas[0] ** 2 + 1) ** 0.5, []
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(x, t)
        x = scheduler.step(predict(scheduler, z, t), t, x).prev_sample
        if scheduler.state_in_first_order or len(latents) == steps - 1:
            latents.append(x / (scheduler.sigmas[scheduler.step_index] ** 2 + 1) ** 0.5)
    return latents


def lcm(steps=STEPS, **config):
    scheduler = LCMScheduler(**{**STABLE_DIFFUSION, **config})
    scheduler.set_timesteps(steps)
    z, latents = START.clone(), []
    for i, t in enumerate(scheduler.timesteps):
        lcm_module.randn_tensor = lambda *_args, **_kwargs: NOISE[i]
        z = scheduler.step(predict(scheduler, z, t), t, z).prev_sample
        latents.append(z)
    return latents


def euler_a(**config):
    scheduler = EulerAncestralDiscreteScheduler(**{**STABLE_DIFFUSION, "timestep_spacing": "leading", **config})
    scheduler.set_timesteps(STEPS)
    x, latents = START * (scheduler.sigmas[0] ** 2 + 1) ** 0.5, []
    for i, t in enumerate(scheduler.timesteps):
        euler_module.randn_tensor = lambda *_args, **_kwargs: NOISE[i]
        z = scheduler.scale_model_input(x, t)
        x = scheduler.step(predict(scheduler, z, t), t, x).prev_sample
        latents.append(x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5)
    return latents


RUNS = {
    "ddim": ddim(0.0, set_alpha_to_one=False),
    "ddim alpha-to-one": ddim(0.0, set_alpha_to_one=True),
    "ddim eta": ddim(1.0, set_alpha_to_one=False),
    "dpmpp-2m": dpmpp_2m(),
    "dpmpp-2m 9 steps": dpmpp_2m(9),
    "dpmpp-2m linspace": dpmpp_2m(timestep_spacing="linspace"),
    "dpmpp-2m linspace 30 steps": dpmpp_2m(30, timestep_spacing="linspace"),
    "dpmpp-2m trailing 48 steps": dpmpp_2m(48, timestep_spacing="trailing"),
    "dpmpp-2m trailing": dpmpp_2m(timestep_spacing="trailing"),
    "dpmpp-2m-karras": dpmpp_2m(use_karras_sigmas=True),
    "dpmpp-2m-sde": dpmpp_2m_sde(),
    "dpmpp-2m-sde 9 steps": dpmpp_2m_sde(9),
    "dpmpp-2m-sde trailing": dpmpp_2m_sde(timestep_spacing="trailing"),
    "dpmpp-2m-sde-karras": dpmpp_2m_sde(use_karras_sigmas=True),
    "euler": euler(),
    "euler linspace": euler(timestep_spacing="linspace"),
    "euler trailing": euler(timestep_spacing="trailing"),
    "euler-karras": euler(use_karras_sigmas=True),
    "heun": heun(),
    "heun 9 steps": heun(9),
    "heun linspace": heun(timestep_spacing="linspace"),
    "heun-karras": heun(use_karras_sigmas=True),
    "lcm": lcm(),
    "lcm 4 steps": lcm(4),
    "lcm 20 of 30": lcm(original_inference_steps=30),
    "euler-a": euler_a(),
    "euler-a linspace": euler_a(timestep_spacing="linspace"),
    "euler-a trailing": euler_a(timestep_spacing="trailing"),
}


def timesteps_digest(scheduler_class, spacing, trained, steps):
    """FNV-1a over the timesteps of every number of steps, one 64-bit word each."""
    digest = 0xCBF29CE484222325
    config = {**STABLE_DIFFUSION, "num_train_timesteps": trained, "steps_offset": 0, "timestep_spacing": spacing}
    scheduler = scheduler_class(**config)
    for count in steps:
        scheduler.set_timesteps(count)
        # Sometimes numpy.arange gives one more, at timestep -1.
        for timestep in scheduler.timesteps.tolist()[:count]:
            digest = (digest ^ int(timestep)) * 0x100000001B3 % 2**64
    return f"{digest:016x}"


# Multistep solvers need two steps; those of few steps may visit one timestep twice, which ours refuse.
TIMESTEPS = {
    f"{name} {spacing} {trained}": timesteps_digest(scheduler_class, spacing, trained, range(2, trained - 1))
    for name, scheduler_class in [("one-step", DDIMScheduler), ("multistep", DPMSolverMultistepScheduler)]
    for spacing in ["leading", "linspace", "trailing"]
    for trained in [1000, 100]
}


def rows(tensors):
    return [[round(v, 6) for v in tensor.tolist()] for tensor in tensors]


golden = {
    "mean": [round(v, 6) for v in MEAN.tolist()],
    "deviation": [round(v, 6) for v in DEVIATION.tolist()],
    "start": START.tolist(),
    "noise": rows(NOISE),
    "timesteps": TIMESTEPS,
    "runs": {name: rows(latents) for name, latents in RUNS.items()},
}
folder = pathlib.Path(__file__).resolve().parent.parent / "golden"
folder.mkdir(exist_ok=True)
(folder / "samplers.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")

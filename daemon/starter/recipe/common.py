"""Shared by the training stages: threads, device, logging, EMA, learning-rate clock."""
import csv
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD", 1))
torch.set_num_threads(int(os.environ.get("THREADS", os.cpu_count() if WORLD == 1 else 1)))
if DEVICE == "cuda":
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def has_fast_bf16():
    """CUDA, or a CPU with AVX512-BF16; elsewhere bfloat16 is slower than float."""
    if DEVICE == "cuda":
        return True
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


FAST_BF16 = has_fast_bf16()


def autocast(enabled=True):
    """bfloat16 where the configuration asks for it and the machine has it."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=enabled and FAST_BF16)


def pixels(array):
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in -1..1 on the device."""
    x = torch.from_numpy(np.array(array)).to(DEVICE)
    return x.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def log(out, stage, step, samples, loss, **extra):
    """Appends a row to losses.csv and prints it."""
    path = Path(out) / "losses.csv"
    new = not path.exists()
    note = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in extra.items())
    with open(path, "a", newline="") as f:
        w = csv.writer(f)
        if new:
            w.writerow(["stage", "step", "samples", "loss", "extra", "time"])
        w.writerow([stage, step, samples, f"{loss:.5f}", note, int(time.time())])
    print(time.strftime("%H:%M:%S"), stage, step, samples, f"{loss:.5f}", note, flush=True)


def read_json(path):
    return json.loads(Path(path).read_text())


def write_json(path, value, indent=1):
    tmp = Path(str(path) + ".tmp")
    tmp.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
    tmp.replace(path)


def save_atomically(value, path):
    torch.save(value, str(path) + ".tmp")
    os.replace(str(path) + ".tmp", path)


class EMA:
    """Exponential moving average of a model's parameters; `swapped()` puts it into the model for a while."""

    def __init__(self, model, decay):
        self.params, self.decay, self.steps = list(model.parameters()), decay, 0
        self.shadow = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, steps=1):
        self.steps += steps
        d = min(self.decay ** steps, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.params], 1 - d)

    @torch.no_grad()
    def _swap(self):
        for p, e in zip(self.params, self.shadow):
            t = p.detach().clone()
            p.copy_(e)
            e.copy_(t)

    def swapped(self):
        ema = self

        class Swap:
            def __enter__(self):
                ema._swap()

            def __exit__(self, *_):
                ema._swap()
        return Swap()


def budget(section, spent):
    """Seconds of wall time a stage may take in all: `seconds`, or up to the moment `ends_at` (a time stamp)."""
    return spent + max(1, section["ends_at"] - time.time()) if "ends_at" in section else section.get("seconds")


class Clock:
    """How far a training stage is: by its `steps` if they are given, which makes it the same on any machine, else by
    wall time. The learning rate warms up over some steps, then falls as a cosine to zero."""

    def __init__(self, section, warmup, spent=0.0):
        self.start, self.seconds, self.steps = time.time() - spent, budget(section, spent), section.get("steps")
        self.warmup = warmup

    def spent(self):
        return time.time() - self.start

    def fraction(self, step):
        return min(1.0, step / self.steps if self.steps else self.spent() / self.seconds)

    def factor(self, step, fraction=None):
        f = self.fraction(step) if fraction is None else fraction
        return min(1.0, (step + 1) / self.warmup) * (.005 + .995 * .5 * (1 + math.cos(math.pi * f)))

    def over(self, step):
        return self.fraction(step) >= 1

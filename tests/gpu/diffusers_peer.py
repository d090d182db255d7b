#!/usr/bin/env python3
"""Times diffusers on the card: python3 tests/gpu/diffusers_peer.py FOLDER [--repeats 20]

FOLDER has a model as `blocklora bench model` writes it. In f16, on the inputs of `blocklora bench`: one prediction of the
UNet for two latents of 64x64, as it is and compiled, and decoding to 512x512. Prints one JSON object with medians in
milliseconds; where PyTorch, diffusers or a card are missing, why.
"""
import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path


def measured(work, repeats):
    import torch
    times = []
    for repeat in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    try:
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"missing": "PyTorch sees no card"}))
        return

    def inputs(seed, *shape):
        values = torch.arange(math.prod(shape), dtype=torch.float64)
        return torch.sin(0.7 * values + seed).reshape(shape).to("cuda", torch.float16)

    def load(kind, name):
        return kind.from_pretrained(args.folder / name, torch_dtype=torch.float16).to("cuda").eval()

    unet, vae = load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
    latents, context = inputs(1.0, 2, 4, 64, 64), inputs(2.0, 2, 77, unet.config.cross_attention_dim)
    times, latent = torch.full((2,), 500.0, device="cuda"), inputs(3.0, 1, 4, 64, 64)
    results = {"torch": torch.__version__}
    with torch.no_grad():
        results["unet2_eager_ms"] = measured(lambda: unet(latents, times, encoder_hidden_states=context), args.repeats)
        results["vae_ms"] = measured(lambda: vae.decode(latent), args.repeats)
        try:
            compiled = torch.compile(unet)
            results["unet2_compiled_ms"] = measured(
                lambda: compiled(latents, times, encoder_hidden_states=context), args.repeats)
        except Exception as error:     # whatever the compiler's own toolchain lacks
            results["compile_failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# Checks and measures the CUDA build on a machine with a card, without any registry; prints one JSON object.
#
#   tests/gpu/run.sh [PROGRAM]
#
# "failed" lists what is wrong, "missed" the goals of speed that were.
#
# PROGRAM is what tests/gpu/build.sh built (default: target/cuda/bin/blocklora). Where blocklorad and blocklorad-cuda lie
# beside it, the first must hand over to the second. The CUDA libraries must be found: where PyTorch's CUDA 13 wheel is
# installed, its nvidia/cu13/lib and nvidia/cudnn/lib are taken; else LD_LIBRARY_PATH decides.
# Exits with 1 if a check fails, 2 if there is no card.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=$(realpath -m "${1:-target/cuda/bin/blocklora}")
[ -x "$program" ] || { echo "run.sh: $program is not there; tests/gpu/build.sh builds it" >&2; exit 1; }
[ -e /proc/driver/nvidia/version ] || { echo "run.sh: no NVIDIA driver is loaded" >&2; exit 2; }
torch=$(python3 -c '
import nvidia, pathlib
folders = (pathlib.Path(root) / name / "lib" for root in nvidia.__path__ for name in ["cu13", "cudnn"])
print(":".join(str(folder) for folder in folders if folder.is_dir()))' 2>/dev/null || true)
export LD_LIBRARY_PATH=${torch:+$torch:}${LD_LIBRARY_PATH:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -x "$(dirname "$program")/blocklorad" ] && [ -x "$(dirname "$program")/blocklorad-cuda" ]; then
    "$program" --daemon private status --json > "$work/status.json"
fi
"$program" bench model --shape sd15 --precision f16 --output "$work/sd15"
bench() { "$program" bench "$@" --json; }
# The starter on both devices: what is compared below. In f16 the card's own attention and tensor cores take part.
for device in cpu cuda; do
    for precision in f32 f16; do
        for part in unet vae text gradients; do
            bench "$part" --device "$device" --precision "$precision" --repeats 3 \
                > "$work/starter-$part-$precision-$device.json"
        done
    done
done
for precision in f32 f16 bf16; do
    bench merge --device cuda --precision "$precision" > "$work/merge-$precision.json"
done
# SD 1.5, in turns with diffusers on the same card where it is installed.
for round in 1 2 3; do
    bench unet --device cuda --base "$work/sd15" --precision f16 --batch 2 --repeats 20 > "$work/sd15-unet2-$round.json"
    bench vae --device cuda --base "$work/sd15" --precision f16 --repeats 20 > "$work/sd15-vae-$round.json"
    python3 tests/gpu/diffusers_peer.py "$work/sd15" > "$work/diffusers-$round.json"
done
bench text --device cuda --base "$work/sd15" --precision f16 --repeats 10 > "$work/sd15-text.json"
bench gradients --device cuda --base "$work/sd15" --precision f16 --latents 32 --repeats 10 > "$work/sd15-gradients.json"
bench sample --device cuda --base "$work/sd15" --precision f16 --steps 20 > "$work/sd15-sample.json"

python3 - "$work" <<'PYTHON'
import json, pathlib, subprocess, sys

work = pathlib.Path(sys.argv[1])
results = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
failed = []
# As parts of the root mean square. In f16, products round their factors to 11 bits.
tolerances = {"f32": 2e-3, "f16": 1e-2}
for part in ["unet", "vae", "text", "gradients"]:
    for precision, tolerance in tolerances.items():
        cpu, cuda = (results[f"starter-{part}-{precision}-{device}"] for device in ["cpu", "cuda"])
        for field in ["rms", "loss"]:
            if cpu.get(field) is not None and not abs(cuda[field] / cpu[field] - 1) <= tolerance:
                failed.append(f"{part} in {precision}: {field} is {cuda[field]} on the card, {cpu[field]} on the CPU")
        for index, (one, other) in enumerate(zip(cpu["values"], cuda["values"], strict=True)):
            if not abs(one - other) <= 10 * tolerance * cpu["rms"]:
                failed.append(f"{part} in {precision}: value {index} is {other} on the card, {one} on the CPU")
missed = []
for precision in ["f32", "f16", "bf16"]:
    merge = results[f"merge-{precision}"]
    if not merge["remove_all_exact"]:
        failed.append(f"merge in {precision}: removing all adapters did not give back the file's bits")
    if not merge["same_as_cpu"]:
        failed.append(f"merge in {precision}: the card's bits are not those that the CPU gives")
    for field, most in [("merge_ms", 5.0), ("swap_one_ms", 1.0)]:
        if merge[field] > most:
            missed.append(f"{field} in {precision}: {merge[field]:.2f} ms, goal {most} ms")
devices = results.get("status", {}).get("daemon", {}).get("devices", [])
if "status" in results and not any(device["id"].startswith("cuda") for device in devices):
    failed.append(f"blocklorad: computes on {devices}")
card = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                      capture_output=True, text=True).stdout.strip()
print(json.dumps({"card": card, "failed": failed, "missed": missed, "results": results}))
sys.exit(bool(failed))
PYTHON

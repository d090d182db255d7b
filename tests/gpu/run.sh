#!/usr/bin/env bash
# Checks and measures the CUDA build on a machine with a card, without any registry; prints one JSON object.
#
#   [DEVICE=cuda] [REPEATS=20] tests/gpu/run.sh [PROGRAM]
#
# "failed" lists what is wrong, "missed" the goals of speed that were.
#
# PROGRAM is what tests/gpu/build.sh built (default: target/cuda/bin/blocklora). Where blocklorad and blocklorad-cuda lie
# beside it, the first must hand over to the second. The CUDA libraries must be found: where PyTorch's CUDA 13 wheel is
# installed, its nvidia/cu13/lib and nvidia/cudnn/lib are taken; else LD_LIBRARY_PATH decides.
# With both daemons beside PROGRAM and plugins where they are looked for (BLOCKLORA_PLUGIN_PATH, for example the target/debug
# of a build for the CPU), a trainer's steps are timed and a picture of two bundled concepts is drawn on both devices.
# DEVICE=cpu REPEATS=1 tries the script itself on a machine without a card, with any build.
# Exits with 1 if a check fails, 2 if there is no card.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=$(realpath -m "${1:-target/cuda/bin/blocklora}")
[ -x "$program" ] || { echo "run.sh: $program is not there; tests/gpu/build.sh builds it" >&2; exit 1; }
device=${DEVICE:-cuda} repeats=${REPEATS:-20}
[ "$device" = cpu ] || [ -e /proc/driver/nvidia/version ] || { echo "run.sh: no NVIDIA driver is loaded" >&2; exit 2; }
torch=$(python3 -c '
import nvidia, pathlib
folders = (pathlib.Path(root) / name / "lib" for root in nvidia.__path__ for name in ["cu13", "cudnn"])
print(":".join(str(folder) for folder in folders if folder.is_dir()))' 2>/dev/null || true)
export LD_LIBRARY_PATH=${torch:+$torch:}${LD_LIBRARY_PATH:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

beside=$(dirname "$program")
if [ -x "$beside/blocklorad" ] && { [ -x "$beside/blocklorad-cuda" ] || [ "$device" = cpu ]; }; then
    "$program" --daemon private status --json > "$work/status.json"
    if "$program" plugin info train-blocklora > /dev/null 2>&1; then
        "$program" bench step --device "$device" --steps 10 --json > "$work/step.json"
        for on in cpu "$device"; do
            mkdir -p "$work/config/blocklora"
            printf '[models]\ndevice = "%s"\n' "$on" > "$work/config/blocklora/blocklora.toml"
            XDG_CONFIG_HOME=$work/config "$program" --daemon private generate "<boy_adventurer> and <poodle> on the beach" \
                --with daemon/starter/adapters/boy_adventurer.safetensors --with daemon/starter/adapters/poodle.safetensors \
                --base daemon/starter/model --preview none --output "$work/picture-$on.png" >&2
        done
    fi
fi
"$program" bench model --shape sd15 --precision f16 --output "$work/sd15" >&2
bench() { "$program" bench "$@" --json; }
# The starter on both devices: what is compared below. In f16 the card's own attention and tensor cores take part.
for precision in f32 f16; do
    for part in unet vae text gradients; do
        bench "$part" --device cpu --precision "$precision" --repeats 3 > "$work/starter-$part-$precision-cpu.json"
        bench "$part" --device "$device" --precision "$precision" --repeats 3 > "$work/starter-$part-$precision-card.json"
    done
done
for precision in f32 f16 bf16; do
    bench merge --device "$device" --precision "$precision" > "$work/merge-$precision.json"
done
# SD 1.5, in turns with diffusers on the same card where it is installed.
for round in 1 2 3; do
    bench unet --device "$device" --base "$work/sd15" --precision f16 --batch 2 --repeats "$repeats" > "$work/sd15-unet2-$round.json"
    bench vae --device "$device" --base "$work/sd15" --precision f16 --repeats "$repeats" > "$work/sd15-vae-$round.json"
    python3 tests/gpu/diffusers_peer.py "$work/sd15" > "$work/diffusers-$round.json"
done
bench text --device "$device" --base "$work/sd15" --precision f16 --repeats "$repeats" > "$work/sd15-text.json"
bench gradients --device "$device" --base "$work/sd15" --precision f16 --latents 32 --repeats "$repeats" > "$work/sd15-gradients.json"
bench sample --device "$device" --base "$work/sd15" --precision f16 --steps "$repeats" > "$work/sd15-sample.json"

python3 - "$work" "$device" <<'PYTHON'
import json, pathlib, subprocess, sys

# Of 255, mean over the picture: two colours of the same thing look equal.
PICTURE_DIFFERENCE_MAX = 3.0


def picture_difference(one, other):
    """Mean over all values; none where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return None
    pairs = list(zip(*(Image.open(path).convert("RGB").tobytes() for path in [one, other]), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


work, device = pathlib.Path(sys.argv[1]), sys.argv[2]
results = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
failed = []
# As parts of the root mean square. In f16, products round their factors to 11 bits.
tolerances = {"f32": 1e-3, "f16": 1e-2}
for part in ["unet", "vae", "text", "gradients"]:
    for precision, tolerance in tolerances.items():
        cpu, cuda = (results[f"starter-{part}-{precision}-{where}"] for where in ["cpu", "card"])
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
    if device != "cpu" and not merge["same_as_cpu"]:
        failed.append(f"merge in {precision}: the card's bits are not those that the CPU gives")
    for field, most in [("merge_ms", 5.0), ("swap_one_ms", 1.0)]:
        if merge[field] > most:
            missed.append(f"{field} in {precision}: {merge[field]:.2f} ms, goal {most} ms")
devices = results.get("status", {}).get("daemon", {}).get("devices", [])
if "status" in results and not any(one["id"].startswith(device.partition(":")[0]) for one in devices):
    failed.append(f"blocklorad: computes on {devices}")
card = None
if device != "cpu":
    card = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                          capture_output=True, text=True).stdout.strip()
if (work / "picture-cpu.png").exists():
    apart = picture_difference(*(work / f"picture-{on}.png" for on in ["cpu", device]))
    results["picture_mean_difference"] = apart
    if apart is not None and not apart <= PICTURE_DIFFERENCE_MAX:
        failed.append(f"the same picture is {apart:.2f} of 255 apart on the card and on the CPU")
print(json.dumps({"card": card, "failed": failed, "missed": missed, "results": results}))
sys.exit(bool(failed))
PYTHON

#!/usr/bin/env bash
# Checks and measures the CUDA build on a machine with a card, without any registry; prints one JSON object.
#
#   tests/gpu/run.sh [PROGRAM]
#
# PROGRAM is what tests/gpu/build.sh built (default: target/cuda/bin/blocklora). Where blocklorad and blocklorad-cuda lie
# beside it, the first must hand over to the second. The CUDA libraries must be found: where PyTorch's CUDA 13 wheel is
# installed, its nvidia/cu13/lib folder is taken; else LD_LIBRARY_PATH decides.
# Exits with 1 if a check fails, 2 if there is no card.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=$(realpath -m "${1:-target/cuda/bin/blocklora}")
[ -x "$program" ] || { echo "run.sh: $program is not there; tests/gpu/build.sh builds it" >&2; exit 1; }
[ -e /proc/driver/nvidia/version ] || { echo "run.sh: no NVIDIA driver is loaded" >&2; exit 2; }
torch=$(python3 -c 'import nvidia.cu13, os; print(os.path.join(list(nvidia.cu13.__path__)[0], "lib"))' 2>/dev/null || true)
export LD_LIBRARY_PATH=${torch:+$torch:}${LD_LIBRARY_PATH:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -x "$(dirname "$program")/blocklorad" ] && [ -x "$(dirname "$program")/blocklorad-cuda" ]; then
    "$program" --daemon private status --json > "$work/status.json"
fi
"$program" bench model --shape sd15 --precision f16 --output "$work/sd15"
bench() { "$program" bench "$@" --json; }
# The starter on both devices: what is compared below, value by value of root mean square and loss.
for device in cpu cuda; do
    for part in unet vae text gradients; do
        bench "$part" --device "$device" --repeats 3 > "$work/starter-$part-$device.json"
    done
done
bench merge --device cuda > "$work/merge.json"
for part in unet vae text; do
    bench "$part" --device cuda --base "$work/sd15" --precision f16 --repeats 10 > "$work/sd15-$part.json"
done
bench gradients --device cuda --base "$work/sd15" --precision f16 --latents 32 --repeats 10 > "$work/sd15-gradients.json"
bench sample --device cuda --base "$work/sd15" --precision f16 --steps 20 > "$work/sd15-sample.json"

python3 - "$work" <<'PYTHON'
import json, pathlib, subprocess, sys

work = pathlib.Path(sys.argv[1])
results = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
failed = []
for part in ["unet", "vae", "text", "gradients"]:
    cpu, cuda = results[f"starter-{part}-cpu"], results[f"starter-{part}-cuda"]
    for field in ["rms", "loss"]:
        if cpu.get(field) is not None and abs(cuda[field] / cpu[field] - 1) > 1e-3:
            failed.append(f"{part}: {field} is {cuda[field]} on the card, {cpu[field]} on the CPU")
if not results["merge"].get("remove_all_exact"):
    failed.append("merge: removing all adapters did not give back the file's bits")
devices = results.get("status", {}).get("daemon", {}).get("devices", [])
if "status" in results and not any(device["id"].startswith("cuda") for device in devices):
    failed.append(f"blocklorad: computes on {devices}")
card = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                      capture_output=True, text=True).stdout.strip()
print(json.dumps({"card": card, "failed": failed, "results": results}))
sys.exit(bool(failed))
PYTHON

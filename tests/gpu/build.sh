#!/usr/bin/env bash
# Builds the programs with CUDA on a machine without a GPU: the compiler and the libraries come from PyPI's wheels.
#
#   tests/gpu/build.sh [FOLDER]
#
# FOLDER (default: target/cuda) gets everything: the wheels, the toolkit put together from them, Cargo's target folder,
# and the results: bin/blocklora, whose benchmarks compute on a card, and bin/blocklorad-cuda, which `make deb-cuda` packs.
# COMPUTE_CAP is the card's compute capability without its dot (default: 90, an H100 or H200). With CUDNN=1 convolutions go
# through cuDNN, and the programs start only where its library is, as it is beside PyTorch's wheel. Needs python3 with pip, gcc
# and Rust; takes about 25 minutes of processor time, most of it candle's kernels. A second run goes on where the first
# one stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-target/cuda}")
mkdir -p "$out"

wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96 'nvidia-cuda-nvrtc>=13.0,<13.1' 'nvidia-cublas>=13,<14' 'nvidia-curand>=10,<11'
)
features=cuda
if [ "${CUDNN:-}" = 1 ]; then
    features=cudnn
    wheels+=('nvidia-cudnn-cu13>=9,<10')
fi
if [ ! -e "$out/wheels/.$features" ]; then
    python3 -m pip install --quiet --no-deps --upgrade --target "$out/wheels" "${wheels[@]}"
    touch "$out/wheels/.$features"
fi
toolkit=$out/wheels/nvidia/cu13
[ -d "$toolkit/bin" ] || { echo "build.sh: the wheels did not bring $toolkit/bin" >&2; exit 1; }
chmod +x "$toolkit"/bin/* "$toolkit"/nvvm/bin/*

# A CUDA folder as build scripts expect it: libraries without version numbers, and a stand-in for the driver's library,
# which only a machine with a card has.
home=$out/cuda
mkdir -p "$home/lib64"
ln -sfn "$toolkit/bin" "$home/bin"
ln -sfn "$toolkit/include" "$home/include"
ln -sfn "$toolkit/nvvm" "$home/nvvm"
for library in "$toolkit"/lib/lib*.so.*; do
    name=$(basename "$library")
    ln -sf "$library" "$home/lib64/${name%%.so.*}.so"
done
# cuDNN's wheel has a folder of its own.
for library in "$out"/wheels/nvidia/cudnn/lib/lib*.so.*; do
    [ ! -e "$library" ] || ln -sf "$library" "$home/lib64/$(basename "${library%%.so.*}").so"
done
for library in "$toolkit"/lib/lib*.a; do
    ln -sf "$library" "$home/lib64/"
done

export CUDA_HOME=$home CUDA_PATH=$home NVCC=$home/bin/nvcc CUDA_COMPUTE_CAP=${COMPUTE_CAP:-90}
export PATH=$home/bin:$PATH LIBRARY_PATH=$home/lib64 CARGO_TARGET_DIR=$out/target
export RUSTFLAGS="-L native=$home/lib64"
driver=$home/lib64/libcuda.so
if [ ! -e "$driver" ]; then
    # Every function that the bindings of cudarc declare, as an empty one: what links needs no more.
    cargo fetch --locked --quiet
    cargo metadata --locked --offline --all-features --format-version 1 | python3 -c '
import json, pathlib, re, sys
package = next(p for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc")
bindings = pathlib.Path(package["manifest_path"]).with_name("src") / "driver/sys/mod.rs"
names = sorted(set(re.findall(r"\bfn (cu[A-Z]\w*)", bindings.read_text())))
if not names:
    sys.exit(f"build.sh: {bindings} declares no function of the driver")
print("\n".join(f"void {name}(void) {{}}" for name in names))
' | gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -x c -o "$driver.new" -
    mv "$driver.new" "$driver"
fi
cargo build --locked --release -p blocklora-cli -p blocklora-service \
    --features "blocklora-cli/$features,blocklora-service/$features"
mkdir -p "$out/bin"
cp "$CARGO_TARGET_DIR/release/blocklora" "$out/bin/blocklora"
cp "$CARGO_TARGET_DIR/release/blocklorad" "$out/bin/blocklorad-cuda"
echo "built $out/bin/blocklora and blocklorad-cuda for compute capability $CUDA_COMPUTE_CAP ($features)"

#!/usr/bin/env bash
# Runs the CUDA kernels' own code on the CPU, thread by thread, and compares it with plain loops. Needs a C++ compiler that
# has _Float16 (GCC 12 or Clang 15, or newer), neither CUDA nor a card. Exits with 1 if a kernel is wrong.
set -euo pipefail
cd "$(dirname "$0")/emulate"
# Fused multiply-adds as instructions; elsewhere they are, or the library's function does the same.
case $(uname -m) in x86_64) features="-mf16c -mfma" ;; *) features= ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${CXX:-c++}" -std=c++20 -O1 -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas -ffp-contract=off \
    $features -I . -o "$work/emulate" main.cpp
"$work/emulate"

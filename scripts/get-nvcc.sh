#!/usr/bin/env bash
# Puts nvcc, which compiles the kernels, and cuobjdump, which their tests read, into `.toolchain`: 0.3 GB from PyPI,
# no root and no CUDA installation needed. `cargo build` finds it there. Does nothing when it is there already.
#
# Prints the path of nvcc. It also needs a C++ compiler, which nvcc calls: `g++` on PATH, or name one in NVCC_CCBIN.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.bash"

toolchain_install nvcc \
    nvidia-cuda-nvcc==13.0.88 \
    nvidia-cuda-crt==13.0.88 \
    nvidia-nvvm==13.0.88 \
    nvidia-cuda-cccl==13.0.85 \
    nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cuobjdump==13.5.37 \
    nvidia-cuda-nvdisasm==13.5.37

# The programs look for their companions beside the path they were called by, so a link would not do.
changed=0
for program in nvcc cuobjdump nvdisasm; do
    wrapper=$toolchain/bin/$program
    real=$(echo "$toolchain"/lib/python3*/site-packages/nvidia/cu13/bin/"$program")
    text=$(printf '#!/bin/sh\nexec "%s" "$@"' "$real")
    if [[ ! -x $wrapper || $(<"$wrapper") != "$text" ]]; then
        printf '%s\n' "$text" >"$wrapper"
        chmod +x "$wrapper"
        changed=1
    fi
    "$wrapper" --version >/dev/null
done
if ((changed)); then
    # A build without nvcc watches this folder: cargo looks again.
    touch "$toolchain/../kernels"
fi
echo "$toolchain/bin/nvcc"

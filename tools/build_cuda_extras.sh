#!/usr/bin/env bash
# Build the optional CUDA packages into the active Python environment: tools/build_cuda_extras.sh te|apex|all
# Needs nvcc of the same CUDA release as torch's, a C++ compiler, and ninja. NGC PyTorch containers have both already.
set -euo pipefail

APEX_REVISION=${APEX_REVISION:-25.09}
PYTHON=${PYTHON:-python}
export MAX_JOBS=${MAX_JOBS:-8} NVTE_FRAMEWORK=pytorch

require_cuda() {
    command -v nvcc >/dev/null || { echo "build_cuda_extras: nvcc not found; load the CUDA module first" >&2; exit 2; }
    "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.version.cuda else "build_cuda_extras: torch is a CPU build")'
}

build_te() {
    "$PYTHON" -m pip install --no-build-isolation 'transformer-engine[pytorch]>=2.8,<3'
}

build_apex() {
    # PyPI's "apex" is an unrelated project: NVIDIA's is built from source, for the fused Adam and weight-gradient kernels.
    local source
    source=$(mktemp -d)
    git clone --depth 1 --branch "$APEX_REVISION" https://github.com/NVIDIA/apex "$source"
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "$PYTHON" -m pip install --no-build-isolation -v "$source"
    rm -rf "$source"
}

case "${1:-}" in
    te) require_cuda; build_te ;;
    apex) require_cuda; build_apex ;;
    all) require_cuda; build_te; build_apex ;;
    *) echo "usage: $0 te|apex|all" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# Install the checkout around this script into an environment: what docker/Dockerfile does in NVIDIA's PyTorch image, and
# `make container-check` in a clean virtual environment, without the CUDA parts.
#   docker/install.sh
# Environment: PYTHON (default: python), EXTRAS (such as nf4), and pip's own PIP_* variables.
# What the environment has already stays as it is: the image's parts were built for each other. What it lacks gets the
# versions of docker/versions.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

echo "== what is there, and what is missing"
"$python" docker/constraints.py >"$constraints"

echo "== installing"
"$python" -m pip install --quiet --no-cache-dir --constraint "$constraints" ".${EXTRAS:+[$EXTRAS]}"

echo "== checking"
"$python" -I -m megatron_medllm examples >/dev/null # -I: what is installed answers, not the checkout
"$python" -I -W ignore - <<'PYTHON'
import torch
from megatron.core import parallel_state

import megatron_medllm
from megatron_medllm.models import qwen25

print(f"megatron_medllm {megatron_medllm.__version__}, torch {torch.__version__}")
PYTHON

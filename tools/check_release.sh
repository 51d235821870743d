#!/usr/bin/env bash
# Build the source archive and the wheel, install the wheel into a clean environment, and use it as a stranger would:
# away from the checkout. Prints one line a step; the first failure stops it.
#   tools/check_release.sh [FOLDER]    FOLDER keeps the archives and the environment (default: a temporary one)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ -n "${1:-}" ] || trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

echo "== building"
"$python" -m venv "$folder/build"
"$folder/build/bin/pip" install --quiet build
"$folder/build/bin/python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 || { tail -n 20 "$folder/build.log"; exit 1; }

echo "== installing $(basename "$folder"/dist/*.whl)"
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "$folder"/dist/*.whl

# Nothing of the checkout may be found by accident.
mkdir -p "$folder/elsewhere"
cd "$folder/elsewhere"
medllm=$folder/venv/bin/medllm
echo "== medllm doctor"
"$medllm" doctor >doctor.txt
echo "== medllm examples"
"$medllm" examples >examples.txt
grep -q "^laptop " examples.txt
"$medllm" examples laptop
"$medllm" examples cpt-qwen2.5-72b-8n8g-tp8pp2-fp8
echo "== medllm plan"
"$medllm" plan cpt-qwen2.5-72b-8n8g-tp8pp2-fp8.yaml data=/nowhere model.path=null model.size=72b >plan.txt
echo "== medllm submit --dry-run"
"$medllm" submit laptop.yaml --dry-run >submit.txt
grep -q "^#SBATCH --job-name=medllm-rpo-laptop" submit.txt
echo "== the demo's first stages: medllm demo, medllm corpus build"
"$medllm" demo laptop.yaml >world.txt
"$medllm" corpus build laptop.yaml >corpus.txt
grep -q "documents" corpus.txt
echo "== the release is usable"

#!/usr/bin/env bash
# Everything that needs one GPU of 80 GB or more, part by part: a part that fails or runs out of time stops no other.
# Usage: tools/gpu_session.sh OUT [PART ...]    parts: tests kernels train peers (default: all, in this order)
# Environment: PYTHON (default python3) has this package's requirements; WHEELS holds the kernel peers' wheels; STEPS and
# ROWS say how many steps of which rows of `train` are measured.
# OUT gets one log a part, kernels/, train/*/throughput.json, peers.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=$(mkdir -p "$1" && cd "$1" && pwd); shift
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COLUMNS=200
parts=("$@"); [ ${#parts[@]} -gt 0 ] || parts=(tests kernels train peers)

# limited NAME SECONDS COMMAND...: the command's output goes to NAME.log, its end and time to the terminal.
limited() {
  local name=$1 limit=$2 start=$SECONDS; shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "== $name: exit $?, $((SECONDS - start)) s"
}

# throughput NAME RECIPE key=value...: a recipe of examples/ with random weights and documents.
throughput() {
  local name=$1 recipe=$2; shift 2
  [[ " ${ROWS:-$name} " == *" $name "* ]] || return 0
  limited "train-$name" "${TRAIN_LIMIT:-100}" "$python" -W ignore -m megatron_medllm bench throughput "examples/$recipe.yaml" \
    data=/nowhere model.path=null model.size=7b "run_dir=$out/work-$name" "$@" \
    --synthetic --steps "${STEPS:-6}" --warmup-steps 2 --profile --output "$out/train/$name"
  tail -n 25 "$out/train-$name.log"
  head -n 40 "$out/train/$name/profile.md"
  rm -rf "$out/work-$name" "$out/train/$name/synthetic" "$out/train/$name/work"
}

for part in "${parts[@]}"; do
  case $part in
    tests)
      limited tests 200 "$python" -m pytest -q -rfEs -W ignore -p no:cacheprovider tests/gpu
      grep -aE '^(FAILED|ERROR|SKIPPED|E  )|passed|failed' "$out/tests.log" | cut -c1-300 ;;
    kernels)
      limited kernels 260 "$python" -W ignore tools/kernels/one_gpu.py --out "$out/kernels" --limit-s "${KERNELS_LIMIT:-150}" \
        ${WHEELS:+--wheels "$WHEELS"}
      sed -n 1,16p "$out/kernels/report.md" ;;
    train)
      throughput lora-4k cpt-qwen2.5-7b-1n1g-lora cpt.global_batch_size=4 cpt.adapter.rank=16
      throughput lora-8k cpt-qwen2.5-7b-1n1g-lora cpt.global_batch_size=2 cpt.adapter.rank=16 cpt.sequence_length=8192
      # As the peers' rows: attention over the whole row, and pairs of their lengths.
      throughput lora-8k-whole cpt-qwen2.5-7b-1n1g-lora cpt.global_batch_size=1 cpt.adapter.rank=16 \
        cpt.sequence_length=8192 --document-length 65536
      throughput fp8lora-8k cpt-qwen2.5-7b-1n1g-fp8lora cpt.global_batch_size=2 cpt.adapter.rank=16
      throughput rpo-lora rpo-qwen2.5-7b-1n1g-lora rpo.global_batch_size=8 rpo.adapter.rank=16 \
        rpo.sequence_length=8192 --prompt-length 300 --response-length 300 ;;
    peers)
      limited peers 300 "$python" -W ignore tools/peers/liger_trl_7b.py --out "$out/peers.jsonl"
      cat "$out/peers.jsonl" ;;
    *) echo "unknown part: $part" >&2; exit 2 ;;
  esac
done

"""RPO against TRL's DPOTrainer on a CPU: pairs' tokens/s and peak memory, and what each part of ours is worth.

Pairs are made of the pharmacist exam (YakugakuQA): the question, its own explanation as chosen and another question's
as rejected. Every row of the table is a process of its own, all on the same threads, model, pairs, order and batches.
A pair's tokens are counted once for all rows, as two documents without padding, so tokens/s compare pairs per second.
Rows already measured in --work are not measured again.

    python tools/peers/trl_dpo_cpu.py --data DIR --document docs/benchmarks/rpo.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_medllm.bench.process import cpu_model, cpu_seconds, peak_mib, reset_peak, resident_mib, system_seconds

ALPHA, BETA, LR = 1.0, 0.1, 1e-5
# A batch fits streams of 2,048 tokens several pairs a piece; one of 1,280 holds one or two of these pairs.
STREAM, SHORT_STREAM = 2048, 1280
ROWS = {
    "ours": "packed, shared prompt, cached reference, fused head",
    "TRL, precomputed": "DPOTrainer as it comes: whole batch, gradient checkpointing; reference precomputed",
    "TRL, default": "DPOTrainer as it comes; reference run at every step",
    "TRL, precomputed, no checkpointing": "reference precomputed, whole batch, activations kept",
    "ours, short streams": f"streams of {SHORT_STREAM:,} tokens: one or two pairs a pass",
    "TRL, lean": "reference precomputed, gradient checkpointing, one pair a pass",
    "ours, side by side": "each answer behind its own copy of the prompt",
    "ours, logits written out": "the head makes the logits of all rows that count",
}
PARTS = ("ours, side by side", "ours, logits written out")
# TRL's rows -> ours of the same kind, least speed-up and least saving of memory that were aimed at
RIVALS = {
    "TRL, precomputed": ("ours", 1.5, 3.0),
    "TRL, default": ("ours", 2.0, 3.0),
    "TRL, precomputed, no checkpointing": ("ours", None, None),
    "TRL, lean": ("ours, short streams", None, None),
}


def main() -> int:
    """Measure the rows that are missing, print the table, write the document where asked."""
    default_data = Path(__file__).parents[3] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEDLLM_SHARED_DATA", default_data)))
    parser.add_argument("--batch", type=int, default=8, help="pairs a step; 8 is TRL's default for one pass")
    parser.add_argument("--steps", type=int, default=2, help="the first warms up and is not counted")
    parser.add_argument("--threads", type=int, default=1, help="1: threads that wait for each other spin")
    parser.add_argument("--document", type=Path)
    parser.add_argument("--work", type=Path, help="keep model, pairs and measurements here")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="measure these only")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        measure = measure_trl if arguments.row.startswith("TRL") else measure_ours
        print(json.dumps(measure(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        arguments.work = arguments.work or Path(directory)
        facts_file = arguments.work / "facts.json"
        if not facts_file.is_file():
            facts_file.write_text(json.dumps(prepare(arguments)))
        for row in arguments.rows:
            if not result_file(arguments, row).is_file():
                result_file(arguments, row).write_text(json.dumps(in_new_process(row, arguments)))
        facts = json.loads(facts_file.read_text())
        files = {row: result_file(arguments, row) for row in ROWS}
        results = {row: json.loads(path.read_text()) for row, path in files.items() if path.is_file()}
    if not {"ours", *PARTS} <= results.keys():
        return 0  # the other rows are still to come
    check_agreement(results)
    lines = table(results, facts)
    print("\n".join(lines))
    if arguments.document:
        write_document(arguments.document, lines, results, facts, arguments)
    return 0


def result_file(arguments: argparse.Namespace, row: str) -> Path:
    return arguments.work / f"row-{list(ROWS).index(row)}.json"


def in_new_process(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--row", row]
    for name in ("work", "batch", "steps", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1]) | {"load": round(os.getloadavg()[0], 1)}
    print(row, found, file=sys.stderr, flush=True)
    return found


# --- model and pairs


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write model and pairs into the work folder, score them, and fix the order of the pairs for all rows."""
    import numpy as np
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from megatron_medllm.train.scoring import score

    source = arguments.data / "qwen2.5-tokenizer"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    fast = PreTrainedTokenizerFast.from_pretrained(source)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=fast.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(arguments.work / "hf")
    fast.save_pretrained(arguments.work / "hf")
    batch, count = arguments.batch, arguments.batch * arguments.steps
    pairs = exam_pairs(arguments.data / "yakugakuqa", tokenizer, count)
    (arguments.work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = run_config(arguments)
    started, cpu = time.monotonic(), cpu_seconds()
    score(run)
    scoring = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.monotonic() - started}
    order = np.random.default_rng([run.seed, 0]).permutation(count).tolist()  # as RpoStep draws an epoch
    (arguments.work / "order.json").write_text(json.dumps([pairs[i] for i in order]))
    ids = [{name: len(tokenizer.encode(pairs[i][name]).ids) for name in pairs[i]} for i in order]
    measured = ids[batch:]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs": len(measured),
        "prompt_tokens": sum(p["prompt"] for p in ids) / len(ids),
        "answer_tokens": sum(p["chosen"] + p["rejected"] + 2 for p in ids) / len(ids) / 2,
        "tokens": sum(2 * p["prompt"] + p["chosen"] + p["rejected"] for p in measured),
        "shared_tokens": sum(p["prompt"] + p["chosen"] + p["rejected"] for p in measured),
        "padded_tokens": sum(
            padded(measured[i : i + arguments.batch]) for i in range(0, len(measured), arguments.batch)
        ),
        "scoring": scoring,
        "scored_pairs": count,
    }


def padded(batch: list[dict[str, int]]) -> int:
    """Tokens of a batch when every answer with its prompt is padded to the longest."""
    return 2 * len(batch) * max(pair["prompt"] + max(pair["chosen"], pair["rejected"]) for pair in batch)


def exam_pairs(folder: Path, tokenizer: Any, count: int) -> list[dict[str, str]]:
    """The first questions with a prompt of 150 to 400 tokens and an explanation of 50 to 400."""
    found = []
    for path in sorted(folder.glob("*.jsonl"), reverse=True):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if not row["text_only"] or not isinstance(row["choices"], list) or not row.get("comment"):
                continue
            choices = "\n".join(f"{i}. {choice}" for i, choice in enumerate(row["choices"], start=1))
            prompt, comment = f"問題: {row['problem_text']}\n{choices}\n考察:\n", row["comment"].strip()
            prompt_tokens, tokens = (len(tokenizer.encode(text).ids) for text in (prompt, comment))
            if 150 <= prompt_tokens <= 400 and 50 <= tokens <= 400:
                found.append((prompt, comment))
            if len(found) == count + 1:
                return [
                    {"prompt": found[i][0], "chosen": found[i][1], "rejected": found[i + 1][1]} for i in range(count)
                ]
    raise RuntimeError(f"{folder}: fewer than {count + 1} fitting questions")


# --- the two sides


def run_config(arguments: argparse.Namespace, *, row: str = "ours") -> Any:
    from megatron_medllm.config.run import RunConfig

    training = {
        "pairs": str(arguments.work / "pairs.jsonl"),
        "reference": str(arguments.work / "reference"),
        "sequence_length": SHORT_STREAM if row == "ours, short streams" else STREAM,
        "global_batch_size": arguments.batch,
        "share_prompt": row != "ours, side by side",
        "loss": {"beta": BETA, "alpha": ALPHA},
        "optimizer": {"lr": LR, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0},
    }
    return RunConfig.model_validate(
        {
            "run_dir": str(arguments.work),
            "stage": "rpo",
            "model": {"path": str(arguments.work / "hf"), "dtype": "float32"},
            "rpo": training,
        }
    )


def measure_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_medllm.models import gpt
    from megatron_medllm.parallel import runtime
    from megatron_medllm.train.one_step import run_step
    from megatron_medllm.train.setup import build_trainer
    from megatron_medllm.train.throughput import StepClock

    if arguments.row == "ours, logits written out":
        gpt.fused_linear_logprob = written_out  # type: ignore[assignment]
    run = run_config(arguments, row=arguments.row)
    imports_mib = resident_mib()
    ranks = runtime.start(run.layout, seed=0)
    trainer = build_trainer(run, ranks)
    clock, metrics = StepTimes(), []
    for index in range(arguments.steps):
        clock.begin()
        metrics.append(run_step(trainer, index, StepClock()).metrics)
        clock.end()
    runtime.stop()
    return clock.result(imports_mib) | {
        "tokens": sum(m["tokens"] for m in metrics[1:]),
        "chosen_logprob": metrics[0]["chosen_logprob"],
        "last_margin": BETA * metrics[-1]["margin"],
    }


def written_out(hidden: Any, weight: Any, target: Any, *, valid_vocab: int, **_: Any) -> tuple[Any, Any]:
    """The head as a plain product: logits of every row, in fp32."""
    logits = hidden @ weight[:valid_vocab].t()
    lse = logits.logsumexp(-1)
    counted = target >= 0
    logprobs = logits.gather(1, target.clamp(min=0)[:, None])[:, 0] - lse
    return logprobs * counted, lse * counted


def measure_trl(arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = StepTimes()

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    imports_mib = resident_mib()
    pairs = json.loads((arguments.work / "order.json").read_text())
    lean = arguments.row == "TRL, lean"
    settings = DPOConfig(
        output_dir=str(arguments.work / "trl"), use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_steps=1, num_train_epochs=1, max_length=None, seed=0, dataloader_pin_memory=False,
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, ALPHA], beta=BETA,
        per_device_train_batch_size=1 if lean else arguments.batch,
        gradient_accumulation_steps=arguments.batch if lean else 1,
        gradient_checkpointing=arguments.row != "TRL, precomputed, no checkpointing",
        precompute_ref_log_probs=arguments.row != "TRL, default",
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = InOrder(
        model=Qwen2ForCausalLM.from_pretrained(arguments.work / "hf", dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast.from_pretrained(arguments.work / "hf"),
        callbacks=[Timed()],
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "logps/chosen" in row]
    return clock.result(imports_mib) | {
        "chosen_logprob": logs[0]["logps/chosen"],
        "last_margin": logs[arguments.steps - 1]["rewards/margins"],
    }


class StepTimes:
    """Seconds of steps, the first of which warms up, and the peak of memory over all of them."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, float, float]] = []
        self._started = (0.0, 0.0, 0.0)

    def begin(self) -> None:
        """Start a step. What loading, tokenizing and precomputing took at most is forgotten at the first."""
        if not self._steps:
            reset_peak()
        self._started = self._now()

    def end(self) -> None:
        """End it."""
        self._steps.append(tuple(now - then for now, then in zip(self._now(), self._started, strict=True)))

    def result(self, imports_mib: float) -> dict[str, float]:
        """Seconds of the counted steps; `imports_mib` is what the process held before it had a model."""
        wall, cpu, system = (sum(values) for values in zip(*self._steps[1:], strict=True))
        peak = peak_mib()
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "system_s": system,
            "peak_mib": peak,
            "over_imports_mib": peak - imports_mib,
        }

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), cpu_seconds(), system_seconds()


# --- the report


def check_agreement(results: dict[str, dict]) -> None:
    """All rows must see the same log-probs at the start, and move alike."""
    expected = results["ours"]
    for row, found in results.items():
        if abs(found["chosen_logprob"] - expected["chosen_logprob"]) > 1e-4 * abs(expected["chosen_logprob"]):
            raise RuntimeError(f"{row}: chosen log-prob {found['chosen_logprob']}, ours {expected['chosen_logprob']}")


def table(results: dict[str, dict], facts: dict[str, Any]) -> list[str]:
    """Markdown: the rows, ratios against TRL's, and what each part is worth."""
    lines = [
        "| row | tokens/s (CPU time) | of it system time | tokens/s (wall) | load | peak MiB | over imports "
        "| what it is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, found in results.items():
        lines.append(
            f"| {row} | {facts['tokens'] / found['cpu_s']:,.0f} | {found['system_s'] / found['cpu_s']:.0%} "
            f"| {facts['tokens'] / found['wall_s']:,.0f} | {found['load']:.1f} | {found['peak_mib']:,.0f} "
            f"| {found['over_imports_mib']:,.0f} | {ROWS[row]} |"
        )
    lines += [
        "",
        "| against | ours | speed (CPU time) | without system time | speed (wall) | target | peak memory "
        "| over imports | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, (our_row, least_speed, least_saving) in RIVALS.items():
        if not {row, our_row} <= results.keys():
            continue
        ours, theirs = results[our_row], results[row]
        speed, wall = (theirs[name] / ours[name] for name in ("cpu_s", "wall_s"))
        user = (theirs["cpu_s"] - theirs["system_s"]) / (ours["cpu_s"] - ours["system_s"])
        saving, over = (theirs[name] / ours[name] for name in ("peak_mib", "over_imports_mib"))
        fast = f"{least_speed}x: {verdict(min(speed, user) >= least_speed)}" if least_speed else ""
        frugal = f"1/{least_saving:.0f}: {verdict(min(saving, over) >= least_saving)}" if least_saving else ""
        lines.append(
            f"| {row} | {our_row} | {speed:.1f}x | {user:.1f}x | {wall:.1f}x | {fast} "
            f"| 1/{saving:.1f} | 1/{over:.1f} | {frugal} |"
        )
    if missing := [row for row in ROWS if row not in results]:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    return lines + parts(results, facts)


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def parts(results: dict[str, dict], facts: dict[str, Any]) -> list[str]:
    """What a step of ours costs without each part."""
    ours, side, written = (results[row] for row in ("ours", *PARTS))
    scored = facts["scoring"]["cpu_s"] / facts["scored_pairs"] * facts["pairs"]
    return [
        "",
        "| part | without it, steps cost (CPU time) | memory over imports | how that was found |",
        "|---|---|---|---|",
        f"| shared prompt | {side['cpu_s'] / ours['cpu_s']:.2f}x | {ratio(side, ours)} | the row side by side; sharing "
        f"saves {1 - facts['shared_tokens'] / facts['tokens']:.0%} of the tokens |",
        f"| packing | {facts['padded_tokens'] / facts['tokens']:.2f}x the tokens | not measured "
        "| counted: padded to the batch's longest |",
        f"| reference cache | {1 + scored / ours['cpu_s']:.2f}x | a second model's weights "
        "| `medllm score` on as many pairs, start-up included |",
        f"| fused head | {written['cpu_s'] / ours['cpu_s']:.2f}x | {ratio(written, ours)} | the row with logits |",
    ]


def ratio(row: dict[str, float], ours: dict[str, float]) -> str:
    return f"{row['over_imports_mib'] / ours['over_imports_mib']:.2f}x"


def write_document(
    path: Path, lines: list[str], results: dict[str, dict], facts: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """The measurements with what they were taken on; what follows the tables in an older page stays."""
    import transformers
    import trl

    from megatron_medllm.storage import atomic_write

    states_mib = 16 * facts["parameters"] / 2**20
    text = f"""# RPO against TRL's DPOTrainer on a CPU

A random Qwen2 of {facts["parameters"]:,} parameters (4 layers, width 192, the real vocabulary of 151,936, tied), fp32,
AdamW, loss `sigmoid + sft`. YakugakuQA questions with their own explanation against another question's, prompts of 150
to 400 tokens ({facts["prompt_tokens"]:.0f} on average) and answers of 50 to 400 ({facts["answer_tokens"]:.0f}). Batches
of {arguments.batch} pairs, the first warms up, {facts["pairs"]} pairs are counted. All rows see the same pairs in the
same order and agree on the first log-prob to 1e-4. Tokens count a pair as two whole documents, for all rows alike.

Peak memory is the process's (VmHWM) from the first step on: loading, tokenizing and the reference's pass do not count.
"Over imports" takes off what the process held before it had a model. {states_mib:,.0f} MiB of it are weights, gradients
and AdamW's moments, alike on both sides.

{cpu_model()}, {os.cpu_count()} virtual cores, threads: {arguments.threads}, torch {torch.__version__},
TRL {trl.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}. "Load" is the load
average at the end of a row; above the number of cores, wall times say little and CPU times are rough. Command:
`python tools/peers/trl_dpo_cpu.py --batch {arguments.batch} --steps {arguments.steps} --document {path}`

"""
    marker = "\n## "
    old = path.read_text() if path.is_file() else ""
    kept = old[old.index(marker) :] if marker in old else "\n"
    with atomic_write(path) as stream:
        stream.write((text + "\n".join(lines) + "\n" + kept).encode())


if __name__ == "__main__":
    sys.exit(main())

"""Continued pretraining on a CPU: speed and memory beside Hugging Face's Trainer, and what replay keeps.

Usage: python tools/peers/hf_trainer_cpu.py speed [--steps 3] [--repeats 2] [--threads 1] [--json PATH]
       python tools/peers/hf_trainer_cpu.py forgetting --data DIR [--json PATH]

`speed`: one Qwen2 model with the real vocabulary of 151,936 words, the same weights, documents, rows of 1,024 tokens,
micro-batches of one row, steps of two, AdamW in fp32. Every measurement is a process of its own, ours and theirs in
turn. Their Trainer is given rows packed as `run_clm.py` packs them (documents end to end, attention across them);
ours keeps documents apart. The first step is warm-up. CPU time is user + system time of all threads; peak memory is
the process's VmHWM from the first step on, imports and weights included. Medians over the repeats.

`forgetting`: a small Qwen2.5-shaped model is trained on general Japanese (DIR/bench_ja_20mb.jsonl), then goes on with
medical text (DIR/medical_ja.jsonl), once without and once with a replay share; perplexities are of held-out documents.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_medllm.bench.process import cpu_seconds, peak_mib, reset_peak, resident_mib

SEQUENCE, ROWS_PER_STEP, DOCUMENT_LENGTH, VOCABULARY = 1024, 2, 400, 151936
SIZE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
HEADS, GROUPS = 4, 2
REPLAY_SHARE = 0.3


def main() -> int:
    """Measure and print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "forgetting", "ours", "theirs"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, help="forgetting: folder of the two corpora")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what in ("ours", "theirs"):
        measure = measure_ours if arguments.what == "ours" else measure_theirs
        print(json.dumps(measure(arguments.work, arguments.steps, arguments.threads)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        result = (
            compare_speed(arguments, Path(work)) if arguments.what == "speed" else forgetting(arguments, Path(work))
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))
    return int(not result["met"])


def compare_speed(arguments: argparse.Namespace, work: Path) -> dict:
    """Ours and theirs in turn, in new processes."""
    prepare(work, steps=arguments.steps + 1)
    runs: dict[str, list[dict]] = {"theirs": [], "ours": []}
    for _ in range(arguments.repeats):
        for side, rows in runs.items():
            command = [sys.executable, "-W", "ignore", __file__, side, "--work", str(work)]
            command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
            environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
            output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            rows.append(json.loads(output.splitlines()[-1]) | {"load": round(os.getloadavg()[0], 1)})
            print(side, rows[-1], flush=True)
    if abs(runs["ours"][0]["first_loss"] - runs["theirs"][0]["first_loss"]) > 0.05:
        raise RuntimeError("the two did not train the same model on the same data")
    names = ("tokens_per_s", "tokens_per_cpu_s", "peak_mib", "over_imports_mib")
    middle = {
        side: {name: statistics.median(row[name] for row in rows) for name in names} for side, rows in runs.items()
    }
    ratios = {name: middle["ours"][name] / middle["theirs"][name] for name in names}
    met = ratios["tokens_per_s"] >= 1.05 and ratios["peak_mib"] <= 0.6
    print("| | tokens/s | tokens per CPU-second | peak MiB | over imports |\n|---|---|---|---|---|")
    for side, row in middle.items():
        speed = f"{row['tokens_per_s']:.1f} | {row['tokens_per_cpu_s']:.1f}"
        title = "HF Trainer" if side == "theirs" else "medllm"
        print(f"| {title} | {speed} | {row['peak_mib']:,.0f} | {row['over_imports_mib']:,.0f} |")
    print(f"| ratio | {' | '.join(f'{ratios[name]:.2f}' for name in names)} |")
    return {"runs": runs, "ratios": ratios, "met": met}


def prepare(work: Path, *, steps: int) -> None:
    """A Qwen2 directory with random weights, and random documents as a built corpus."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_medllm.bench.synthetic import write_documents

    config = Qwen2Config(
        vocab_size=VOCABULARY, num_attention_heads=HEADS, num_key_value_heads=GROUPS, tie_word_embeddings=True, **SIZE
    )
    model = Qwen2ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    model.save_pretrained(work / "model")
    tokens = steps * ROWS_PER_STEP * (SEQUENCE + 1)
    write_documents(work / "corpus", tokens=tokens, document_length=DOCUMENT_LENGTH, vocab_size=VOCABULARY, seed=0)


class Meter:
    """Seconds and CPU seconds of the steps after the first, and the peak of memory over all of them."""

    def __init__(self) -> None:
        """When everything is imported and nothing is built."""
        self.imports_mib = resident_mib()
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """The beginning of the first step, and the end of every step."""
        if not self.marks:
            reset_peak()  # what loading took at most is not training's
        self.marks.append((time.perf_counter(), cpu_seconds()))

    def result(self, first_loss: float) -> dict:
        (wall, cpu), (last_wall, last_cpu) = self.marks[1], self.marks[-1]
        tokens = (len(self.marks) - 2) * ROWS_PER_STEP * SEQUENCE
        return {
            "tokens_per_s": tokens / (last_wall - wall),
            "tokens_per_cpu_s": tokens / (last_cpu - cpu),
            "peak_mib": peak_mib(),
            "over_imports_mib": peak_mib() - self.imports_mib,
            "first_loss": first_loss,
        }


def measure_ours(work: Path, steps: int, threads: int) -> dict:
    """The trainer's own parts: data, schedule, clipping, optimizer."""
    import torch

    from megatron_medllm.config.run import RunConfig
    from megatron_medllm.parallel import runtime
    from megatron_medllm.train.one_step import run_step
    from megatron_medllm.train.setup import build_trainer
    from megatron_medllm.train.throughput import StepClock

    torch.set_num_threads(threads)
    meter, losses = Meter(), []
    cpt = {
        "data": [{"path": str(work / "corpus")}],
        "train_tokens": (steps + 1) * ROWS_PER_STEP * SEQUENCE,
        "sequence_length": SEQUENCE,
        "global_batch_size": ROWS_PER_STEP,
        "optimizer": {"lr": 1e-4, "schedule": "linear", "warmup_ratio": 0.0, "min_lr_ratio": 0.0},
    }
    model = {"path": str(work / "model"), "dtype": "float32"}
    run = RunConfig.model_validate({"run_dir": str(work / "run"), "model": model, "cpt": cpt})
    ranks = runtime.start(run.layout, seed=0)
    trainer = build_trainer(run, ranks)
    meter.mark()
    for step in range(steps + 1):
        losses.append(run_step(trainer, step, StepClock()).metrics["loss"])
        meter.mark()
    runtime.stop()
    return meter.result(losses[0])


def measure_theirs(work: Path, steps: int, threads: int) -> dict:
    """transformers' Trainer on rows cut from the same documents."""
    import numpy as np
    import torch
    from transformers import Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(threads)
    meter, losses = Meter(), []
    tokens = np.fromfile(next((work / "corpus").glob("*.bin")), dtype=np.int32)
    count = (steps + 1) * ROWS_PER_STEP
    rows = tokens[: count * SEQUENCE].reshape(count, SEQUENCE)
    dataset = [{"input_ids": torch.from_numpy(row.astype(np.int64))} for row in rows]
    for row in dataset:
        row["labels"] = row["input_ids"]

    class Marks(TrainerCallback):
        """Marks what `Meter` wants."""

        def on_train_begin(self, *_, **__) -> None:
            meter.mark()

        def on_step_end(self, *_, **__) -> None:
            meter.mark()

        def on_log(self, *_, logs: dict, **__) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    settings = TrainingArguments(
        output_dir=str(work / "theirs"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS_PER_STEP,
        max_steps=steps + 1,
        learning_rate=1e-4,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = Qwen2ForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    Trainer(model=model, args=settings, train_dataset=dataset, callbacks=[Marks()]).train()
    return meter.result(losses[0])


def forgetting(arguments: argparse.Namespace, work: Path) -> dict:
    """Perplexities of held-out general and medical documents before and after medical training."""
    from megatron_medllm.config.corpus import CorpusConfig
    from megatron_medllm.corpus.build import build
    from megatron_medllm.demo.tokenizer import train_tokenizer

    documents = {
        "general": first_texts(arguments.data / "bench_ja_20mb.jsonl", characters=1_500_000),
        "medical": first_texts(arguments.data / "medical_ja.jsonl", characters=800_000),
    }
    for name, texts in documents.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (work / "tokenizer").mkdir()
    tokenizer = train_tokenizer((t[:2000] for texts in documents.values() for t in texts), vocab_size=4096)
    tokenizer.save(str(work / "tokenizer" / "tokenizer.json"))
    for name, share in (("general", None), ("medical", None), ("replayed", REPLAY_SHARE)):
        sources = {"medical": {"paths": str(work / "medical.jsonl")}} if name != "general" else {}
        if name != "medical":
            sources["general"] = {"paths": str(work / "general.jsonl"), "replay": share is not None}
        config = {"sources": sources, "tokenizer": str(work / "tokenizer"), "eod_id": 1, "split": [0.95, 0.05, 0.0]}
        build(CorpusConfig.model_validate(config | {"replay_share": share}), work / name, workers=1)
    start = {"shape": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
                       "ffn_hidden_size": 384, "vocab_size": 4096, "tie_embeddings": True}}  # fmt: skip
    base = train(work, "base", model=start, data=["general"], tokens=700_000, lr=4e-3)
    trained = {"path": str(work / "runs" / "base" / "cpt" / "hf")}
    before = perplexities(work, "before", model=trained)
    rows = {"before": before}
    for name in ("medical", "replayed"):
        train(work, name, model=trained, data=[name], tokens=400_000, lr=1e-3)
        rows[name] = perplexities(work, f"after-{name}", model={"path": str(work / "runs" / name / "cpt" / "hf")})
    print(f"base: {base['step']} steps, loss {base['loss']:.3f}")
    print("| | medical perplexity | general perplexity |\n|---|---|---|")
    names = {"before": "before", "medical": "medical text only", "replayed": f"with {REPLAY_SHARE:.0%} replay"}
    for name, row in rows.items():
        print(f"| {names[name]} | {row['medical']:.1f} | {row['general']:.1f} |")
    kept = rows["replayed"]["general"] / before["general"]
    return {"rows": rows, "met": rows["replayed"]["medical"] < before["medical"] and kept < 1.1}


def first_texts(path: Path, *, characters: int) -> list[str]:
    """The first documents of a JSONL file, as many as make so many characters, long ones cut into pieces."""
    texts, total = [], 0
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            texts += [text[i : i + 4000] for i in range(0, min(len(text), 40_000), 4000)]
            total += min(len(text), 40_000)
            if total >= characters:
                break
    return texts


def train(work: Path, name: str, *, model: dict, data: list[str], tokens: int, lr: float) -> dict:
    """Run `medllm train`'s loop in this process; the last line of its metrics with a loss."""
    from megatron_medllm.config.run import RunConfig
    from megatron_medllm.train.loop import train as train_stage

    cpt = {
        "data": [{"path": str(work / part)} for part in data],
        "train_tokens": tokens,
        "sequence_length": 256,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "validation_batches": 12,
        "optimizer": {"lr": lr},
    }
    settings = {"run_dir": str(work / "runs" / name), "tokenizer": str(work / "tokenizer"), "cpt": cpt}
    settings["model"] = {"dtype": "float32", "init_std": 0.05} | model
    if train_stage(RunConfig.model_validate(settings)) != 0:
        raise RuntimeError(f"{name}: training stopped early")
    lines = (work / "runs" / name / "cpt" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row][-1]


def perplexities(work: Path, name: str, *, model: dict) -> dict[str, float]:
    """Of the held-out documents of both sources: a run of one step that changes nothing."""
    train(work, name, model=model, data=["medical", "general"], tokens=8 * 256, lr=1e-12)
    lines = (work / "runs" / name / "cpt" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return {source: last[f"validation_perplexity_{source}"] for source in ("medical", "general")}


if __name__ == "__main__":
    sys.exit(main())

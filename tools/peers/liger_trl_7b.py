"""Peers at 7B on one GPU, under ten minutes: HF + peft + Liger in continued pretraining, TRL's DPOTrainer in RPO.

Usage: python tools/peers/liger_trl_7b.py --out rows.jsonl [--limit-s 540] [--row-limit-s 150]
           [--rows PART ... [--exact]]
       python tools/peers/liger_trl_7b.py --out rows.jsonl --tiny   the same code on a tiny model, on a CPU too

Models have the shape of Qwen2.5-7B (152,064 words, untied) and random weights made on the GPU in bf16; LoRA of rank 16
on all linears, SDPA. `cpt` rows: a bare loop (peft, bf16 adapters, Liger's RoPE, RMSNorm, SwiGLU and fused linear CE,
torch's fused AdamW), one packed row a pass and one pass a step (`packed`: 4 passes), attention across its documents.
`dpo` rows: TRL's trainer with its own
adapters (fp32 under bf16 autocast, its default), `sigmoid` + `sft`, 8 synthetic pairs a step: prompts of 300 tokens,
answers of 200 to 400. TRL 1.16 takes Liger's layer kernels but always its own fused head. 4 steps warm up, 4 count;
set-up and the reference's pass are not timed. Tokens of a pair are counted as of two documents, padding is not counted.
A row is a process of its own; out of memory, an error or the time limit is its result. Lines are appended to --out.
No network: trl, peft, datasets and liger_kernel must be importable (PYTHONPATH).
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

WARM_UP, MEASURED = 4, 4
CUDA = torch.cuda.is_available()  # Liger's kernels need it too
DEVICE = torch.device("cuda" if CUDA else "cpu")
PAIRS, PROMPT, ANSWER = 8, 300, (200, 400)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# vocabulary, hidden, FFN, layers, heads, KV heads
SIZE_7B, SIZE_TINY = (152064, 3584, 18944, 28, 28, 4), (512, 64, 128, 2, 4, 2)
ROWS: dict[str, dict[str, Any]] = {
    "cpt 4096": {"kind": "cpt", "sequence": 4096, "checkpointing": False},
    "cpt 4096 packed": {"kind": "cpt", "sequence": 4096, "checkpointing": False, "rows": 4},
    "cpt 4096, checkpointing": {"kind": "cpt", "sequence": 4096, "checkpointing": True},
    "cpt 8192": {"kind": "cpt", "sequence": 8192, "checkpointing": False},
    "cpt 8192, checkpointing": {"kind": "cpt", "sequence": 8192, "checkpointing": True},
    "dpo precomputed, checkpointing": {"kind": "dpo", "checkpointing": True},
    "dpo precomputed": {"kind": "dpo", "checkpointing": False},
    "dpo precomputed, 1 pair x 8": {"kind": "dpo", "checkpointing": False, "pairs_a_pass": 1},
    "dpo reference at every step, checkpointing": {"kind": "dpo", "checkpointing": True, "precomputed": False},
}


def main() -> int:
    """Every row in a process of its own, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=540)
    parser.add_argument("--row-limit-s", type=float, default=150)
    parser.add_argument("--rows", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--exact", action="store_true", help="--rows are whole names")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not CUDA and not arguments.tiny:
        parser.error("no CUDA device: only --tiny runs here")
    if arguments.row:
        torch.manual_seed(0)
        settings = dict(ROWS[arguments.row])
        measure = {"cpt": measure_cpt, "dpo": measure_dpo}[settings.pop("kind")]
        print(json.dumps(measure(tiny=arguments.tiny, **settings)))
        return 0
    deadline = time.monotonic() + arguments.limit_s
    wanted = [row for row in ROWS if any(part == row if arguments.exact else part in row for part in arguments.rows)]
    for row in ["machine", *wanted]:
        seconds = min(arguments.row_limit_s, deadline - time.monotonic())
        found = machine() if row == "machine" else ROWS[row] | in_new_process(row, seconds, tiny=arguments.tiny)
        line = json.dumps({"row": row, "tiny": arguments.tiny} | found)
        print(line, flush=True)
        with open(arguments.out, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    return 0


def machine() -> dict[str, Any]:
    """The device and the versions of what is measured."""
    found = {"device": torch.cuda.get_device_name() if CUDA else "CPU", "python": platform.python_version()}
    names = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "liger_kernel", "liger-kernel", "triton")
    return found | {package.name: package.version for package in distributions() if package.name in names}


def in_new_process(row: str, seconds: float, *, tiny: bool) -> dict[str, Any]:
    """What the row measured, or the error that ended it."""
    if seconds < 10:
        return {"error": "no time left"}
    command = [sys.executable, "-W", "ignore", __file__, "--out", os.devnull, "--row", row] + ["--tiny"] * tiny
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"time limit of {seconds:.0f} s"}
    if done.returncode:
        return {"error": "out of memory" if "OutOfMemoryError" in done.stderr else done.stderr[-3000:]}
    return json.loads(done.stdout.splitlines()[-1])


class Meter:
    """Seconds of the steps after the warm-up, and the peak of memory over all steps."""

    def __init__(self) -> None:
        self.created, self.ends = time.perf_counter(), []

    def start(self) -> None:
        """Training begins: what set-up took at most does not count."""
        self.set_up_s = time.perf_counter() - self.created
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> None:
        """A step has ended; the device is waited for where the measured ones begin and end, as in our own benchmark."""
        if CUDA and len(self.ends) + 1 in (WARM_UP, WARM_UP + MEASURED):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def result(self, *, tokens: int, first_loss: float) -> dict[str, Any]:
        """Tokens: of the counted steps together."""
        if not math.isfinite(first_loss):
            raise RuntimeError(f"the first loss is {first_loss}")
        seconds = self.ends[-1] - self.ends[WARM_UP - 1]
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "step_s": round(seconds / MEASURED, 4),
            "steps_s": [round(end - begin, 3) for begin, end in itertools.pairwise(self.ends)],
            "peak_gib": round((torch.cuda.max_memory_allocated() if CUDA else peak_bytes) / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if CUDA else None,
            "set_up_s": round(self.set_up_s, 1),
            "first_loss": round(first_loss, 4),
            "liger": CUDA,
        }


def make_model(*, tiny: bool) -> Any:
    """A Qwen2 with random weights, made where it is used."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    words, hidden, ffn, layers, heads, groups = SIZE_TINY if tiny else SIZE_7B
    config = Qwen2Config(
        vocab_size=words, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=False, eos_token_id=1,
        pad_token_id=0, use_cache=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def measure_cpt(*, tiny: bool, sequence: int, checkpointing: bool, rows: int = 1) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    meter = Meter()
    if CUDA:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    # bf16 adapters: the fp32 ones of peft's default cost a cast and an fp32 product a layer
    model = get_peft_model(make_model(tiny=tiny), LoraConfig(**LORA), autocast_adapter_dtype=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    losses, words, sequence = [], model.config.vocab_size, sequence // 64 if tiny else sequence
    meter.start()
    for _ in range(WARM_UP + MEASURED):
        for _ in range(rows):
            ids = torch.randint(2, words, (1, sequence), device=DEVICE)
            loss = model(input_ids=ids, labels=ids).loss / rows
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.step()
        losses.append(float(loss.detach()) * rows)
    return meter.result(tokens=MEASURED * rows * sequence, first_loss=losses[0])


def measure_dpo(*, tiny: bool, checkpointing: bool, precomputed: bool = True, pairs_a_pass: int = PAIRS) -> dict:
    import trl.trainer.dpo_trainer
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    meter, pairs = Meter(), synthetic_pairs(PAIRS * (WARM_UP + MEASURED), tiny=tiny)
    # the key of TRL's cache reads the whole model back to the CPU; this cache serves one run
    trl.trainer.dpo_trainer.hash_module = lambda _: "random weights"

    class Timed(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step()

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as output:
        settings = DPOConfig(
            output_dir=output, use_cpu=not CUDA, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_steps=1, num_train_epochs=1, max_length=None, beta=0.1,
            loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], learning_rate=1e-5, optim="adamw_torch_fused",
            per_device_train_batch_size=pairs_a_pass, gradient_accumulation_steps=PAIRS // pairs_a_pass,
            precompute_ref_log_probs=precomputed, gradient_checkpointing=checkpointing, use_liger_kernel=CUDA,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )  # fmt: skip
        trainer = Tokenized(
            model=make_model(tiny=tiny), args=settings, train_dataset=Dataset.from_list(pairs),
            processing_class=small_tokenizer(), callbacks=[Timed()], peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        trainer.train()
    counted = pairs[PAIRS * WARM_UP :]
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in counted)
    figures = meter.result(tokens=tokens, first_loss=float(trainer.state.log_history[0]["loss"]))
    return figures | {"pairs_per_s": round(PAIRS / figures["step_s"], 3)}


def synthetic_pairs(count: int, *, tiny: bool) -> list[dict[str, list[int]]]:
    """Pairs of random token ids; TRL's own columns."""
    shrink, words = (16, SIZE_TINY[0]) if tiny else (1, SIZE_7B[0])
    draw = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(2, words) for _ in range(draw.randint(least, most) // shrink)]

    lengths = {"prompt_ids": (PROMPT, PROMPT), "chosen_ids": ANSWER, "rejected_ids": ANSWER}
    return [{name: ids(*bounds) for name, bounds in lengths.items()} for _ in range(count)]


def small_tokenizer() -> Any:
    """TRL wants one for its padding token; no text is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


if __name__ == "__main__":
    sys.exit(main())

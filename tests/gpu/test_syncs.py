"""How often one optimizer step makes the host wait for the GPU: a few times, however many micro-batches it has.

torch warns of every call that waits, `torch.cuda.synchronize` aside. What is left, once a step each: Megatron's
question whether any token counted, the metrics (read, sent to be summed, read back), and the gradient norm.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import cpt_settings, run_config
from tests.worlds.shapes import SHAPE
from tests.worlds.steps import steps_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = {
    "shape": SHAPE | {"hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512},
    "dtype": "bfloat16",
    "init_std": 0.05,
}
AT_MOST = 8  # 5 are known; the rest is for what another version of torch or Megatron-Core may add once a step
# cuDNN builds plans for streams that it has not met, in any step.
LEAN = {"copies": "ahead", "optimizer": "foreach", "attention": "flash"}
AS_BEFORE = {"copies": "blocking", "optimizer": "megatron", "attention": "flash"}


def waits(take: Callable[[int], Any], step: int) -> tuple[Counter[str], int]:
    """Where the step waited, by file and line, and how many micro-batches it had."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = take(step)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    found = Counter(
        f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    )
    return found, len(result.micro_batches)


def third_step(settings: dict) -> tuple[Counter[str], int]:
    """The first two compile kernels and make what is kept."""
    with steps_of(run_config(settings)) as take:
        take(0)
        take(1)
        return waits(take, 2)


def check(make: Callable[[dict, int], dict]) -> None:
    """`make(switches, batch)`: settings of a run of that many rows or pairs a step."""
    found, few = third_step(make(LEAN, 4))
    large, many = third_step(make(LEAN, 16))
    before, _ = third_step(make(AS_BEFORE, 16))
    print(f"waits of {few} micro-batches: {found}; of {many}: {large}; as before: {before}")
    assert many > few
    assert 1 <= large.total() <= AT_MOST, large
    assert large.total() == found.total(), (found, large)  # none is once a micro-batch
    assert before.total() > large.total() + many, before


@pytest.mark.parametrize("adapter", [None, {"rank": 8}])
def test_pretraining(adapter: dict | None, tiny_world: Path, tmp_path: Path) -> None:
    def make(switches: dict, batch: int) -> dict:
        cpt = {"adapter": adapter, "global_batch_size": batch, "train_tokens": 4 * 16 * 64}
        run_dir = tmp_path / f"{switches['copies']}-{batch}"
        return cpt_settings(tiny_world, run_dir, model=BF16, kernels=switches, cpt=cpt)

    check(make)


@pytest.mark.parametrize("base", ["bf16", "fp8"])
def test_preferences(base: str, tmp_path: Path) -> None:
    from megatron_medllm.train.scoring import score

    model = write_model(tmp_path / "hf", hidden=256, ffn=512, std=0.05)
    pairs = write_pairs(tmp_path / "pairs.jsonl", random_pairs(64))

    def make(switches: dict, batch: int) -> dict:
        run_dir = tmp_path / f"{switches['copies']}-{batch}"
        changes = {"adapter": {"rank": 8, "base": base}, "micro_batch_size": 1, "global_batch_size": batch}
        settings = rpo_settings(model, pairs, run_dir, **changes) | {"kernels": switches}
        settings["model"]["dtype"] = "bfloat16"
        score(run_config(settings))
        return settings

    check(make)

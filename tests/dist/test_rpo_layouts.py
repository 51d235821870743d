"""The same global batch of pairs in every layout: loss, metrics and gradients of one process; one reference for all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from tests.worlds.pairs import WORDS, random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import metrics, run_config

from megatron_medllm.train.loop import train
from megatron_medllm.train.scoring import score
from tests.worlds.ranks import run_ranks
from tests.worlds.first_step import first_step

# Without the distributed optimizer every replica holds the whole gradient.
LAYOUTS = {
    "dp": {"dp": 2, "distributed_optimizer": False},
    "cp": {"cp": 2, "distributed_optimizer": False},
    "tp": {"tp": 2},
    "sp": {"tp": 2, "sp": True},
    "pp": {"pp": 2},
    "vpp": {"pp": 2, "vpp": 2},
}
ROW_SPLIT = ("linear_proj.weight", "linear_fc2.weight")
SIDE_BY_SIDE = {"share_prompt": False, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left: `score` under TP 2, the first step of every layout, and a PP 2 run on TP 2's reference."""
    place = tmp_path_factory.mktemp("rpo_layouts")
    model = write_model(place / "hf")
    pairs = write_pairs(place / "pairs.jsonl", random_pairs(19))  # 8 a step: the last step of an epoch crosses it

    def settings(name: str, **rpo: Any) -> dict:
        layout = rpo.pop("layout", {})
        # One process copies as a CPU does by default; the layouts lay all into one buffer, as on CUDA.
        copies = {"kernels": {"copies": "ahead" if layout else "auto"}}
        rpo = {"reference": str(place / "reference")} | rpo
        return rpo_settings(model, pairs, place / name, layout=layout, **rpo) | copies

    scoring = settings("score", layout={"tp": 2, "sp": True})
    context = settings("score_cp", layout={"cp": 2}, reference=str(place / "reference_cp"))
    jobs = [{"do": "score", "settings": scoring}, {"do": "score", "settings": context}]
    jobs += [
        {"do": "first step", "settings": settings(name, layout=layout), "out": str(place / name)}
        for name, layout in LAYOUTS.items()
    ]
    jobs += [{"do": "train", "settings": settings(f"{name}_run", layout=LAYOUTS[name])} for name in ("pp", "tp")]
    (place / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(2, "tests.dist.rpo_ranks", str(place / "jobs.json"), timeout_s=300, runtimes=len(jobs))
    for name, rpo in {"one": {}, "side_by_side": SIDE_BY_SIDE}.items():
        torch.save(first_step(run_config(settings(name, **rpo))), place / f"{name}.0.pt")
    assert train(run_config(settings("one_run"))) == 0
    score(run_config(settings("score_one", reference=str(place / "reference_one"))))
    return place


def ranks_of(directory: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(path) for path in sorted(directory.glob(f"{name}.[0-9].pt"))]


def whole(name: str, parts: list[torch.Tensor], expected: torch.Tensor) -> torch.Tensor:
    """The slices of a gradient put together in one process's order, without the vocabulary's padding."""
    if "word_embeddings" in name or "output_layer" in name:
        return (parts[0] if len(parts[0]) >= len(expected) else torch.cat(parts))[: len(WORDS) + 2]
    if parts[0].shape == expected.shape:
        assert all(torch.allclose(part, parts[0], rtol=1e-6, atol=1e-9) for part in parts), f"{name}: copies differ"
        return parts[0]
    if name.endswith(ROW_SPLIT):
        return torch.cat(parts, dim=1)
    if "linear_fc1" in name:  # gate and up are split each on its own
        return torch.cat([part.chunk(2)[block] for block in (0, 1) for part in parts])
    return torch.cat(parts)


@pytest.mark.parametrize("name", [*LAYOUTS, "side_by_side"])
def test_loss_and_gradients_are_those_of_one_process(directory: Path, name: str) -> None:
    (one,) = ranks_of(directory, "one")
    ranks = ranks_of(directory, name)
    for key in ("loss", "nll", "chosen_logprob", "rejected_logprob", "pairs", "chosen_tokens"):
        assert ranks[0]["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-6), key
    seen, squares, total = set(), 0.0, 0.0
    for parameter, expected in one["gradients"].items():
        parts = [rank["gradients"][parameter] for rank in ranks if parameter in rank["gradients"]]
        found = whole(parameter, parts, expected)
        expected = expected[: len(found)]
        assert expected.norm() > 0, parameter
        # One process itself is off from float64 by 1e-6 and more in small parameters (test_rpo_gradients.py).
        assert (found - expected).norm() < 1.5e-6 * expected.norm() + 1e-9, parameter
        squares += (found - expected).double().square().sum().item()
        total += expected.double().square().sum().item()
        seen.add(parameter)
    assert squares < 1e-6**2 * total
    assert len(seen) == 4 * 7 + 2  # a layer's two norms, qkv and its bias, proj, fc1, fc2; embedding, final norm


def test_a_reference_scored_under_tensor_parallelism_serves_a_pipeline(directory: Path) -> None:
    assert metrics(directory / "pp_run" / "rpo", "abs_margin")[0] < 1e-5
    one, two = metrics(directory / "one_run" / "rpo"), metrics(directory / "pp_run" / "rpo")
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("name", ["pp", "tp"])
def test_the_gradient_norm_by_which_steps_are_clipped_is_that_of_one_process(directory: Path, name: str) -> None:
    one, two = (metrics(directory / run / "rpo", "grad_norm") for run in ("one_run", f"{name}_run"))
    assert min(one) > 1.0  # clipped
    assert two == pytest.approx(one, rel=5e-6)


@pytest.mark.parametrize("name", ["reference", "reference_cp"])
def test_the_layout_is_not_in_the_reference(directory: Path, name: str) -> None:
    ours, theirs = (json.loads((directory / each / "key.json").read_text()) for each in (name, "reference_one"))
    assert ours == theirs
    scored, expected = (read_scores(directory / each) for each in (name, "reference_one"))
    assert scored.keys() == expected.keys() and len(scored["row"]) == 19
    for column, values in expected.items():
        assert scored[column] == pytest.approx(values, rel=1e-6), column


def read_scores(reference: Path) -> dict[str, np.ndarray]:
    (part,) = reference.glob("part-*.parquet")
    return {name: np.array(values) for name, values in parquet.read_table(part).to_pydict().items()}

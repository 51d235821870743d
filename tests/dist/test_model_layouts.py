"""Full training over two ranks: uneven stages, padded FFNs and FP8 give the losses of whole models."""

import json

import pytest

from tests.worlds.ranks import run_ranks

TP, SP, DP = {"tp": 2}, {"tp": 2, "sp": True}, {"dp": 2}
JOBS = {
    "whole": {"layout": DP},
    "uneven": {"layout": {"pp": 2, "first_stage_layers": 1}},
    "padded": {"layout": SP, "fp8_weights": True},
    "fp8": {"layout": DP, "fp8": "blockwise"},
    "fp8_tp": {"layout": TP, "fp8": "blockwise"},
    "fp8_sp": {"layout": SP, "fp8": "blockwise"},
    "fp8_sp_recompute": {"layout": SP | {"recompute": "full"}, "fp8": "blockwise"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Job name -> what each of its ranks left."""
    directory = tmp_path_factory.mktemp("model")
    path = directory / "jobs.list"
    path.write_text(json.dumps([job | {"name": name, "out": str(directory)} for name, job in JOBS.items()]))
    run_ranks(2, "tests.dist.model_ranks", str(path), timeout_s=200, runtimes=len(JOBS))
    return {name: [json.loads((directory / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in JOBS}


def test_uneven_stages_are_the_same_model(results: dict):
    assert [rank["layers"] for rank in results["uneven"]] == [1, 2]
    assert results["uneven"][0]["losses"] == pytest.approx(results["whole"][0]["losses"], abs=2e-6)


def test_a_padded_ffn_is_the_same_model(results: dict):
    assert (results["padded"][0]["ffn"], results["whole"][0]["ffn"]) == (512, 320)
    assert results["padded"][0]["losses"] == pytest.approx(results["whole"][0]["losses"], abs=2e-6)


@pytest.mark.parametrize("name", ["padded", "fp8", "fp8_tp", "fp8_sp"])
def test_padding_stays_zero(results: dict, name: str):
    assert all(rank["padding_is_zero"] for rank in results[name])


@pytest.mark.parametrize("name", ["fp8_tp", "fp8_sp", "fp8_sp_recompute"])
def test_fp8_is_the_same_under_tensor_parallelism(results: dict, name: str):
    """Sums in another order move an activation by 1e-7, so now and then to the next FP8 value, one in sixteen away."""
    split, whole, exact = (results[job][0] for job in (name, "fp8", "whole"))
    assert (whole["ffn"], split["ffn"]) == (384, 512)
    assert split["losses"][0] == pytest.approx(whole["losses"][0], abs=2e-4)
    assert abs(whole["losses"][0] - exact["losses"][0]) > 4e-3, "nothing was cast"
    assert split["grad_norms"][0] == pytest.approx(whole["grad_norms"][0], rel=2e-3)
    # Adam's first steps go by the gradients' signs, and rounding decides those of the smallest.
    assert split["losses"] == pytest.approx(whole["losses"], abs=2e-2)

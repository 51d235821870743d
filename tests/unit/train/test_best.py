"""Which step is the best, what a failed save and a roll-back do to it, and when a run has had enough."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from megatron_medllm.config.train import CptConfig
from megatron_medllm.errors import UserError
from megatron_medllm.train.best import Best, build_best


def noted(metric: str, values: list[float], *, patience: int = 0) -> Best:
    """Validated after steps 10, 20, …"""
    best = Best(metric, patience=patience)
    for number, value in enumerate(values, start=1):
        best.note(10 * number, {metric: value})
    return best


def config(**changes) -> CptConfig:
    settings = {"optimizer": {"lr": 1e-3}, "sequence_length": 8, "global_batch_size": 1, "data": [{"path": "x"}]}
    return CptConfig.model_validate(settings | {"epochs": 1} | changes)


@pytest.mark.parametrize(
    ("metric", "ranked"),
    [
        ("validation_loss", [20, 30, 10]),
        ("validation_loss_medical", [20, 30, 10]),
        ("validation_perplexity", [20, 30, 10]),
        ("validation_accuracy", [10, 30, 20]),
        ("validation_chosen_logprob_per_token", [10, 30, 20]),
    ],
)
def test_the_metric_says_what_is_better(metric: str, ranked: list[int]) -> None:
    best = noted(metric, [3.0, 1.0, 2.0])
    assert (best.ranked(), best.step, best.value(30)) == (ranked, ranked[0], 2.0)


def test_a_tie_a_nan_and_a_missing_number_are_no_improvement() -> None:
    best = Best("validation_loss")
    assert best.note(1, {"validation_loss": 2.0})
    assert not best.note(2, {"validation_loss": 2.0})
    assert not best.note(3, {"validation_loss": float("nan")})
    assert not best.note(4, {})
    assert best.note(5, {"validation_loss": 1.9})
    assert best.ranked() == [5, 1, 2]


def test_without_a_metric_only_what_was_validated_is_known() -> None:
    best = Best()
    assert not best.note(7, {"validation_loss": 1.0})
    assert (best.step, best.validated, best.exhausted) == (None, 7, False)


def test_patience_counts_validations_behind_the_best() -> None:
    assert not noted("validation_loss", [3.0, 1.0, 2.0], patience=2).exhausted
    assert noted("validation_loss", [3.0, 1.0, 2.0, 1.0], patience=2).exhausted
    assert not noted("validation_loss", [3.0, 1.0, 2.0, 0.5], patience=2).exhausted
    assert noted("validation_loss", [float("nan")] * 2, patience=2).exhausted
    assert not noted("validation_loss", [3.0, 4.0, 5.0]).exhausted


def test_a_step_without_a_checkpoint_is_no_candidate() -> None:
    best = noted("validation_loss", [3.0, 1.0])
    best.forget(20)
    assert (best.step, best.validated) == (10, 20)
    assert best.note(30, {"validation_loss": 2.0})


def test_a_resume_takes_what_the_checkpoint_holds_and_a_roll_back_keeps_what_was_found() -> None:
    stored = noted("validation_loss", [3.0, 1.0]).to_json()
    resumed = Best("validation_loss")
    resumed.go_back(20, stored)
    assert resumed.to_json() == stored
    # The checkpoint of step 20 was written before the validation behind it; the run has seen it and rolls back.
    rolled_back = noted("validation_loss", [3.0, 1.0, 0.5])
    rolled_back.go_back(20, noted("validation_loss", [3.0]).to_json())
    assert (rolled_back.ranked(), rolled_back.validated) == ([20, 10], 20)
    other = Best("validation_accuracy")
    other.go_back(20, stored)
    assert (other.step, other.validated) == (None, 20)
    old = Best("validation_loss")
    old.go_back(20, None)
    assert (old.step, old.validated) == (None, -1)


def test_a_metric_that_the_run_does_not_report_is_refused() -> None:
    asked = config(checkpoint={"best": "validation_accuracy"}, validate_every_steps=5)
    step = SimpleNamespace(validation_metrics=("validation_loss", "validation_perplexity", "validation_kl"))
    with pytest.raises(UserError, match=r"validation_accuracy: .* by validation_loss, validation_perplexity$"):
        build_best(asked, step)
    with pytest.raises(UserError, match="nothing is held out"):
        build_best(asked, SimpleNamespace(validation_metrics=()))
    kl = config(checkpoint={"best": "validation_kl"}, validate_every_steps=5)
    with pytest.raises(UserError, match=r"checkpoint\.best=validation_kl"):
        build_best(kl, step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {"export": "best"}}, "set checkpoint.best"),
        ({"checkpoint": {"best": "validation_loss"}}, "set validate_every_steps"),
        ({"guard": {"patience": 3}}, "set checkpoint.best"),
    ],
)
def test_settings_that_need_another_say_which(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_the_best_is_exported_where_one_is_kept_unless_told_otherwise() -> None:
    def exports_best(**checkpoint: str) -> bool:
        return config(checkpoint=checkpoint, validate_every_steps=5).checkpoint.exports_best

    assert exports_best(best="validation_loss")
    assert not exports_best(best="validation_loss", export="last")
    assert not exports_best()

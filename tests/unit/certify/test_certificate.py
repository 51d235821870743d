"""Certificates without the proof: folding, shrinking, what a certificate depends on, and how a stale one is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_medllm.certify.certificate import (
    Certificate,
    Check,
    certificate_report,
    read_certificate,
    settings_of,
    state_of,
    versions,
    write_certificate,
)
from megatron_medllm.certify.compare import worst_tensor
from megatron_medllm.certify.run import certify
from megatron_medllm.certify.shrink import fold, shrink, shrink_shape
from megatron_medllm.certify.stages import certify_stages
from megatron_medllm.certify.world import write_documents
from megatron_medllm.cli.app import app
from megatron_medllm.config.layout import LayoutConfig, padded_vocab_size
from megatron_medllm.config.model import SIZES
from megatron_medllm.config.run import RunConfig
from megatron_medllm.corpus.index import read_index
from megatron_medllm.errors import UserError

CPT = {
    "data": [{"path": "x"}], "epochs": 1, "sequence_length": 4096, "global_batch_size": 64, "optimizer": {"lr": 1e-5},
}  # fmt: skip


def run_of(run_dir: Path, layout: dict[str, Any] | None = None, size: str = "7b", **cpt: Any) -> RunConfig:
    settings = {"run_dir": str(run_dir), "model": {"size": size}, "layout": layout or {}, "cpt": CPT | cpt}
    return RunConfig.model_validate(settings)


def certificate_for(run: RunConfig, *checks: Check) -> Certificate:
    return Certificate(
        stage=run.stage,
        settings=json.loads(json.dumps(settings_of(run))),
        versions=versions(),
        folding=("layout.tp 8 -> 2",),
        layout={},
        ranks=2,
        checks=checks or (Check("losses", 1e-8, 1e-5, "step 1"),),
        seconds=1.0,
        made="2026-11-27T00:00:00Z",
    )


@pytest.mark.parametrize(
    ("layout", "max_ranks", "folded", "notes"),
    [
        ({"tp": 2, "dp": 2}, 4, {"tp": 2, "dp": 2}, []),
        ({"tp": 4}, 4, {"tp": 4}, []),
        ({"tp": 4}, 2, {"tp": 2}, ["layout.tp 4 -> 2"]),
        (
            {"nodes": 4, "gpus_per_node": 8, "tp": 8, "pp": 4, "vpp": 5, "sp": True},
            8,
            {"tp": 2, "pp": 2, "vpp": 2, "dp": 1, "sp": True},
            ["layout.tp 8 -> 2", "layout.pp 4 -> 2", "layout.vpp 5 -> 2"],
        ),
        ({"dp": 16, "cp": 4}, 8, {"dp": 2, "cp": 2}, ["layout.dp 16 -> 2", "layout.cp 4 -> 2"]),
        (
            {"pp": 4, "dp": 4, "first_stage_layers": 19, "last_stage_layers": 17},
            8,
            {"pp": 2, "dp": 2, "first_stage_layers": 1, "last_stage_layers": 3},
            ["layout.dp 4 -> 2", "layout.pp 4 -> 2"],
        ),
    ],
)
def test_sizes_above_two_become_two_where_there_are_too_many_ranks(layout, max_ranks, folded, notes):
    found, said = fold(LayoutConfig.model_validate(layout), max_ranks=max_ranks)
    assert found.model_dump(include=folded.keys()) == folded
    assert said == notes and found.world_size <= max_ranks


def test_a_layout_that_folds_to_too_many_ranks_is_refused(tmp_path):
    layout = {"tp": 8, "pp": 4, "cp": 2, "dp": 2}
    with pytest.raises(UserError, match=r"folded to tp=2 pp=2 cp=2 dp=2 it still takes 16 processes.*--max-ranks 8"):
        certify(run_of(tmp_path, layout, size="72b"))


def test_what_gpus_overlap_is_overlapped_here():
    found, _ = fold(LayoutConfig(dp=2), max_ranks=2)
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == ("on", "on")
    found, _ = fold(LayoutConfig(dp=2, overlap_param_gather="off", distributed_optimizer=False), max_ranks=2)
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == ("on", "off")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "pp": 2, "vpp": 3}, {"pp": 2, "last_stage_layers": 2}])
def test_the_small_shape_is_cut_as_the_large_one(size, blocks, layout):
    whole = LayoutConfig.model_validate(layout)
    folded, _ = fold(whole, max_ranks=4)
    shape, small = SIZES[size], shrink_shape(SIZES[size], whole, folded, blocks=blocks)
    folded.check_model(small)
    assert small.tie_embeddings == shape.tie_embeddings
    assert small.num_layers <= 8 and small.hidden_size <= 512
    multiples = 128 * whole.tp, 128 * folded.tp
    pads = [padded_vocab_size(s.vocab_size, m) != s.vocab_size for s, m in zip((shape, small), multiples, strict=True)]
    assert pads[0] == pads[1]
    if blocks:
        ffn_pads = [s.ffn_hidden_size % m != 0 for s, m in zip((shape, small), multiples, strict=True)]
        assert ffn_pads[0] == ffn_pads[1]
        assert small.hidden_size % (128 * folded.tp) == 0
    else:
        assert (
            small.num_attention_heads // small.num_query_groups == shape.num_attention_heads // shape.num_query_groups
        )


def test_fewer_kv_heads_than_ranks_stay_fewer():
    whole = LayoutConfig(tp=4)
    folded, _ = fold(whole, max_ranks=2)
    small = shrink_shape(SIZES["0.5b"].model_copy(update={"num_attention_heads": 16}), whole, folded, blocks=False)
    assert (small.num_query_groups, folded.tp) == (1, 2)
    folded.check_model(small)


def test_what_stands_for_what_is_said(tmp_path):
    adapter = {"rank": 64, "alpha": 128, "base": "nf4", "dropout": 0.1, "path": "somewhere"}
    shrunken = shrink(run_of(tmp_path, adapter=adapter), tmp_path, max_ranks=8, has_nf4=False)
    said = "\n".join(shrunken.notes)
    for what in ("bfloat16 -> float32", "nf4 -> bf16", "dropout 0.1 -> 0", "adapter.path"):
        assert what in said
    small = shrunken.run.cpt.adapter
    assert (small.rank, small.alpha, small.base, small.path) == (8, 16.0, "bf16", None)


def test_documents_of_several_lengths_with_and_without_the_marker(tmp_path):
    write_documents(tmp_path / "corpus", tokens=2000, vocab_size=96, seed=0)
    index = read_index(tmp_path / "corpus" / "documents")
    assert index.lengths.sum() >= 2000 and len(set(index.lengths.tolist())) > 10


def test_a_certificate_that_holds_is_found_again(tmp_path):
    run = run_of(tmp_path, {"tp": 2})
    assert read_certificate(run) is None
    write_certificate(certificate_for(run), tmp_path)
    found, was_there = certify(run)
    assert was_there and found.passed and found.checks[0].difference == 1e-8
    # What does not change how a layout computes may change.
    for free in ({"optimizer": {"lr": 3.0}}, {"epochs": 3}, {"global_batch_size": 128}, {"data": [{"path": "y"}]}):
        assert read_certificate(run_of(tmp_path, {"tp": 2}, **free)) is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layout": {"tp": 4}}, r"another config: layout.tp was 2, is 4"),
        ({"layout": {"tp": 2, "recompute": "full"}}, r"layout.recompute was none, is full"),
        ({"layout": {"tp": 2, "gpus_per_node": 8}}, r"layout.dp was 1, is 4"),
        ({"size": "72b"}, r"model.shape.ffn_hidden_size was 18944, is 29568"),
        ({"fp8": "hybrid"}, r"cpt.fp8 was none, is hybrid"),
        ({"adapter": {"rank": 8}}, r"cpt.adapter was None, is"),
        ({"checkpoint": {"async_save": True}}, r"cpt.checkpoint.async_save was False, is True"),
    ],
)
def test_a_certificate_of_another_config_is_refused_by_name(tmp_path, changed, message):
    write_certificate(certificate_for(run_of(tmp_path, {"tp": 2})), tmp_path)
    other = run_of(tmp_path, **({"layout": {"tp": 2}} | changed))
    with pytest.raises(UserError, match=rf"certificate.json: stage cpt .*{message}.*run medllm certify"):
        read_certificate(other)
    assert "no valid certificate" in state_of(other)


@pytest.mark.parametrize("program", ["megatron-medllm", "source", "megatron-core", "torch"])
def test_a_certificate_of_another_version_is_refused_by_name(tmp_path, program):
    run = run_of(tmp_path)
    write_certificate(replace(certificate_for(run), versions=versions() | {program: "0.0.1"}), tmp_path)
    with pytest.raises(UserError, match=f"another version: {program} was 0.0.1, is "):
        read_certificate(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "not a certificate"), ('{"format": 1, "stages": {"cpt": {}}}', "damaged"), ("{", "not JSON")],
)
def test_a_damaged_certificate_is_one_line(tmp_path, content, message):
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_certificate(run_of(tmp_path))


def test_stages_have_certificates_of_their_own(tmp_path):
    cpt = run_of(tmp_path)
    other = cpt.model_copy(update={"stage": "base", "base": cpt.cpt})
    write_certificate(certificate_for(cpt), tmp_path)
    assert read_certificate(other) is None and state_of(other).startswith("no certificate")
    write_certificate(certificate_for(other), tmp_path)
    assert read_certificate(cpt) and read_certificate(other)


def test_an_infinite_difference_survives_the_file(tmp_path):
    run = run_of(tmp_path)
    write_certificate(certificate_for(run, Check("layout: runs to its end", math.inf, 0.0, "rank 1: …")), tmp_path)
    found = read_certificate(run)
    assert not found.passed and found.checks[0].difference == math.inf
    assert "CERTIFICATION FAILED" in state_of(run)
    assert "FAIL layout: runs to its end" in certificate_report(found)


def test_nothing_is_submitted_that_is_not_certified(tmp_path):
    run = run_of(tmp_path)
    write_certificate(certificate_for(run, Check("gradients, step 1", 0.5, 1e-5, "model.norm.weight")), tmp_path)
    with pytest.raises(UserError, match=r"stage cpt is not certified: gradients, step 1 \(model.norm.weight\)"):
        certify_stages(run)


def test_tensors_that_are_missing_or_not_numbers_differ_infinitely():
    one = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert worst_tensor("x", one, one, 0.0).passed
    assert worst_tensor("x", {"a": one["a"]}, one, 1.0).difference == math.inf
    assert worst_tensor("x", one | {"c": torch.ones(1)}, one, 1.0).difference == math.inf
    assert worst_tensor("x", one | {"a": torch.full((3,), math.nan)}, one, 1.0).difference == math.inf
    assert worst_tensor("x", one | {"a": torch.ones(1)}, one, 1.0).difference == math.inf
    assert not Check("x", math.nan, 1.0).passed


def test_the_command_only_checks_when_told_to(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"run_dir": str(tmp_path), "model": {"size": "7b"}, "cpt": CPT}))
    with pytest.raises(UserError, match="no certificate for stage cpt"):
        CliRunner().invoke(app, ["certify", str(recipe), "--check"], catch_exceptions=False)
    write_certificate(certificate_for(run_of(tmp_path)), tmp_path)
    found = CliRunner().invoke(app, ["certify", str(recipe), "--check"])
    assert found.exit_code == 0 and "ok   losses" in found.stdout
    found = CliRunner().invoke(app, ["certify", str(recipe)])
    assert found.exit_code == 0 and "unchanged since 2026-11-27T00:00:00Z" in found.stdout

"""A certificate finds faults: each breaks one thing in every process. `make certify-faults` runs them all."""

import json
import os
from pathlib import Path

import pytest
from tests.worlds.run import run_config

from megatron_medllm.certify.certificate import Certificate, certificate_report
from megatron_medllm.certify.run import prove
from megatron_medllm.config.run import RunConfig
from tests.dist.certify_faults import FAULTS, VARIABLE

HOST = "tests.dist.certify_faults"
# One of every kind; the others run where MEDLLM_CERTIFY_ALL is set.
IN_CI = ("no_head_all_reduce", "lora_half_not_reduced", "tied_embedding", "rejected_sees_chosen", "fc1_in_checkpoint",
         "head_norms_not_reduced")  # fmt: skip


def faulty_run(name: str, run_dir: Path) -> RunConfig:
    """The run whose layout shows the fault."""
    fault = FAULTS[name]
    shape = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 128,
        "vocab_size": 1500, "tie_embeddings": fault.tied, "family": fault.family,
    }  # fmt: skip
    data = {"pairs": "x"} if fault.stage == "rpo" else {"data": [{"path": "x"}], "epochs": 1}
    section = {"sequence_length": 64, "global_batch_size": 8, "optimizer": {"lr": 1e-3}} | data | fault.section
    model = {"shape": shape, "dtype": "float32"}
    settings = {"run_dir": str(run_dir), "stage": fault.stage, "model": model, "layout": fault.layout}
    return run_config(settings | {fault.stage: section})


def certificate_of(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Certificate:
    monkeypatch.setenv(VARIABLE, name)
    return prove(faulty_run(name, place), max_ranks=8, host=HOST)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in IN_CI and "MEDLLM_CERTIFY_ALL" not in os.environ:
        pytest.skip("runs with make certify-faults")
    certificate = certificate_of(name, tmp_path, monkeypatch)
    report = certificate_report(certificate)
    failing = {check.name: check.difference for check in certificate.checks if not check.passed}
    if "MEDLLM_CERTIFY_ALL" in os.environ:
        with open(os.environ["MEDLLM_CERTIFY_ALL"], "a") as stream:
            stream.write(json.dumps({"fault": name, "what": FAULTS[name].what, "failing": failing}) + "\n")
    assert FAULTS[name].found_by in failing, report

"""Ranks that this machine starts itself, the clock they stop by, and the W&B run that they go on in."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE, STALLED_EXIT_CODE
from megatron_medllm.config.train import GuardConfig
from megatron_medllm.train import local_ranks, signals
from megatron_medllm.train.metrics import MetricsLog, forget_wandb_run


def python(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


def test_ranks_that_asked_to_be_run_again_let_the_others_save(monkeypatch):
    monkeypatch.setattr(local_ranks, "SHUTDOWN_TIMEOUT_S", 0.0)
    saving = f"import time, sys; time.sleep(1.5); sys.exit({REQUEUE_EXIT_CODE})"
    ranks = [python(f"raise SystemExit({REQUEUE_EXIT_CODE})"), python(saving)]
    assert local_ranks.wait_for_ranks(ranks) == REQUEUE_EXIT_CODE
    assert [rank.returncode for rank in ranks] == [REQUEUE_EXIT_CODE] * 2


def test_a_stopped_rank_does_not_outlive_one_that_failed(monkeypatch):
    monkeypatch.setattr(local_ranks, "SHUTDOWN_TIMEOUT_S", 0.5)
    stopped = python("import time; time.sleep(3600)")
    stopped.send_signal(signal.SIGSTOP)  # never sees SIGTERM
    assert local_ranks.wait_for_ranks([python("raise SystemExit(3)"), stopped]) == 3
    assert stopped.returncode == -signal.SIGKILL  # it would have slept for an hour


def test_the_verdict_of_a_stall_outranks_the_rank_that_was_killed_for_it():
    killed = python("import time; time.sleep(3600)")
    killed.kill()
    killed.wait()
    watcher = python(f"raise SystemExit({STALLED_EXIT_CODE})")
    watcher.wait()
    assert local_ranks.wait_for_ranks([killed, watcher]) == STALLED_EXIT_CODE
    assert local_ranks.wait_for_ranks([killed]) == 137


def test_the_allotted_time_begins_where_the_training_did():
    started = time.monotonic() - 100
    with signals.stop_requests(GuardConfig(walltime_s=90), started) as late:
        assert late.is_late()
    with signals.stop_requests(GuardConfig(walltime_s=1000), started) as early:
        assert not early.is_late()
        early.note_step(400)
        early.note_save(210)  # 1.5 x (400 + 210) = 915 > 900
        assert early.is_late()


@pytest.fixture
def wandb_runs(monkeypatch):
    """What a stand-in for wandb is asked to begin: no account and no network here."""
    begun = []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return begun


def test_a_requeue_goes_on_in_the_same_wandb_run_and_a_new_start_does_not(tmp_path, wandb_runs):
    def start(directory):
        MetricsLog(directory, wandb_project="p", config={}).close()
        return wandb_runs[-1]["id"]

    first = start(tmp_path / "cpt")
    assert first and start(tmp_path / "cpt") == first
    assert all(settings["resume"] == "allow" for settings in wandb_runs)
    assert start(tmp_path / "rpo") != first
    forget_wandb_run(tmp_path / "cpt")
    assert start(tmp_path / "cpt") != first

from pathlib import Path

import pytest

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inference.answer_log import Answers, answer_requests
from megatron_medllm.inference.model_files import model_digest
from megatron_medllm.inference.protocol import Request
from tests.worlds.exam import ScriptedEndpoint
from tests.worlds.model_dir import write_tiny_model


def ask(url: str, requests: list[Request], log: Path) -> Answers:
    config = EngineConfig(kind="openai", url=url, concurrency=1, retries=0)
    return answer_requests(config, Path("m"), requests, log=log, title="test")


def test_answers_are_asked_once(tmp_path: Path) -> None:
    log = tmp_path / "answers.jsonl"
    requests = [Request(str(i), f"p{i}") for i in range(4)]
    with ScriptedEndpoint(lambda body: body["prompt"].upper()) as server:
        first = ask(server.url, requests[:2], log)
        assert first.timing["answered"] == 2
        again = ask(server.url, requests, log)
        assert again.timing["answered"] == 2 and again.timing["taken_from_log"] == 2
        assert len(server.calls) == 4
        assert {k: c.text for k, c in again.completions.items()} == {"0": "P0", "1": "P1", "2": "P2", "3": "P3"}
        changed = [Request("0", "p0", temperature=0.5), *requests[1:]]
        assert ask(server.url, changed, log).timing["answered"] == 1


def test_a_failing_engine_keeps_what_was_finished(tmp_path: Path) -> None:
    log = tmp_path / "answers.jsonl"
    requests = [Request(str(i), f"p{i}") for i in range(6)]
    broken = {"p3": True}
    with ScriptedEndpoint(lambda body: 500 if broken.get(body["prompt"]) else "c") as server:
        with pytest.raises(UserError, match="3 failed"):
            ask(server.url, requests, log)
        kept = len(log.read_bytes().splitlines())
        assert kept >= 3
        broken.clear()
        assert ask(server.url, requests, log).timing["answered"] == 6 - kept


def test_a_cut_off_line_is_asked_again(tmp_path: Path) -> None:
    log = tmp_path / "answers.jsonl"
    requests = [Request(str(i), f"p{i}") for i in range(3)]
    with ScriptedEndpoint(lambda body: "c") as server:
        ask(server.url, requests, log)
        whole = log.read_bytes()
        log.write_bytes(whole[:-20])  # as a kill in the middle of a write leaves it
        assert ask(server.url, requests, log).timing["answered"] == 1
        assert sorted(log.read_bytes().splitlines()) == sorted(whole.splitlines())
        log.write_bytes(b'{"no": "answer"}\n' + whole)
        with pytest.raises(UserError, match=r"answers\.jsonl:1: not an answer"):
            ask(server.url, requests, log)


def test_another_model_is_asked_anew(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert model_digest(tiny_model) != model_digest(other)
    assert model_digest(tiny_model) == model_digest(tiny_model)
    log, requests = tmp_path / "answers.jsonl", [Request("x", "ソラ", max_new_tokens=4)]
    config = EngineConfig(device="cpu")
    for model, answered in ((tiny_model, 1), (tiny_model, 0), (other, 1), (tiny_model, 0)):
        answers = answer_requests(config, model, requests, log=log, title="test")
        assert answers.timing["answered"] == answered
        assert answers.provenance["model_digest"] == model_digest(model)

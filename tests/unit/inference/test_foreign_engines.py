"""Engines that are other processes: an HTTP endpoint, and the vLLM worker around a stand-in for vLLM."""

import shutil
import sys
from pathlib import Path

import pytest

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inference.answer_log import answer_requests
from megatron_medllm.inference.engines import open_engine
from megatron_medllm.inference.protocol import Request
from megatron_medllm.storage import read_json
from tests.worlds.exam import ScriptedEndpoint

STAND_IN = """
import json, os, sys
from types import SimpleNamespace
__version__ = "stand-in"
class SamplingParams(SimpleNamespace):
    pass
class LLM:
    def __init__(self, **options):
        print("noise on standard output", options)
        invariant = os.environ.get("VLLM_BATCH_INVARIANT")
        with open(os.environ["STAND_IN_OPTIONS"], "w") as stream:
            json.dump(options | {"VLLM_BATCH_INVARIANT": invariant}, stream)
    def _reply(self, text, p):
        if text.startswith("say "):  # a scripted continuation, ended by max_tokens characters or the first stop text
            text, reason, stop = text[4 : 4 + p.max_tokens], "length" if len(text) - 4 > p.max_tokens else "stop", None
            for mark in p.stop:
                if mark in text:
                    text, reason, stop = text[: text.index(mark)], "stop", mark
            out = SimpleNamespace(text=text, token_ids=list(text), finish_reason=reason, stop_reason=stop)
            return SimpleNamespace(outputs=[out], prompt_token_ids=[1])
        text = f"{text}|{p.temperature}|{p.top_p}|{p.seed}|{p.max_tokens}|{p.stop}"
        if "die" in text:
            sys.stderr.write("CUDA error: the stand-in died\\n"); sys.stderr.flush(); os._exit(7)
        reason, stop = ("length", None) if p.max_tokens == 1 else ("stop", "X" if p.stop else None)
        out = SimpleNamespace(text=text, token_ids=[1, 2, 3], finish_reason=reason, stop_reason=stop)
        return SimpleNamespace(outputs=[out], prompt_token_ids=[1] * 5)
    def generate(self, prompts, sampling):
        return [self._reply(t, p) for t, p in zip(prompts, sampling, strict=True)]
    def chat(self, messages, sampling, **more):
        said = f" {json.dumps(more)}" if more else ""
        return [self._reply(m[-1]["content"] + said, p) for m, p in zip(messages, sampling, strict=True)]
"""


@pytest.fixture
def vllm_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    module = tmp_path / "vllm" / "model_executor" / "layers" / "batch_invariant.py"
    module.parent.mkdir(parents=True)
    for package in (module.parent, module.parents[1]):
        (package / "__init__.py").touch()
    module.touch()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STAND_IN_OPTIONS", str(tmp_path / "options.json"))
    return EngineConfig(kind="vllm", python=Path(sys.executable), tensor_parallel=4, max_model_len=2048)


def test_vllm_worker(vllm_config: EngineConfig, tiny_model: Path) -> None:
    engine = open_engine(vllm_config, tiny_model)
    assert engine.describe() == {
        "engine": "vllm",
        "vllm": "stand-in",
        "dtype": "auto",
        "tensor_parallel": 4,
        "max_model_len": 2048,
        "memory_share": 0.9,
        "prefix_caching": True,
        "engine_seed": 0,
        "batch_invariant": False,
    }
    requests = [
        Request("1", "問", max_new_tokens=9, temperature=0.5, top_p=0.9, seed=11, stop=("X",)),
        Request("2", messages=({"role": "user", "content": "話"},), max_new_tokens=1),
        Request("3", "終", max_new_tokens=5),
    ]
    done = {c.request_id: c for c in engine.generate(requests)}
    again = [c.text for c in engine.generate([Request("4", "又", max_new_tokens=1)])]
    engine.close()
    assert again == ["又|0.0|1.0|0|1|[]"]
    assert done["1"].text == "問|0.5|0.9|11|9|['X']"
    assert done["2"].text == "話|0.0|1.0|0|1|[]"
    assert [done[i].finish_reason for i in "123"] == ["stop", "length", "eos"]
    assert (done["1"].prompt_tokens, done["1"].new_tokens) == (5, 3)


def test_vllm_settings_reach_it(vllm_config: EngineConfig, tiny_model: Path, tmp_path: Path) -> None:
    changes = {"memory_share": 0.85, "prefix_caching": False, "seed": 3, "dtype": "bfloat16"}
    requests = [Request("1", "問"), Request("2", "話")]
    config = vllm_config.model_copy(update=changes)
    answers = answer_requests(config, tiny_model, requests, log=tmp_path / "a.jsonl", title="test")
    assert read_json(tmp_path / "options.json") == {
        "model": str(tiny_model),
        "dtype": "bfloat16",
        "tensor_parallel_size": 4,
        "gpu_memory_utilization": 0.85,
        "enable_prefix_caching": False,
        "seed": 3,
        "trust_remote_code": False,
        "max_model_len": 2048,
        "VLLM_BATCH_INVARIANT": "1",
    }
    told = {
        "memory_share": 0.85,
        "prefix_caching": False,
        "engine_seed": 3,
        "batch_invariant": True,
        "vllm": "stand-in",
    }
    assert told.items() <= answers.provenance.items()
    again = answer_requests(config, tiny_model, requests, log=tmp_path / "a.jsonl", title="test")
    assert again.timing["answered"] == 0 and again.provenance == answers.provenance


@pytest.mark.parametrize(("warm", "setting", "asked"), [(1.0, None, None), (1.0, True, "1"), (0.0, False, None)])
def test_batch_invariance_is_asked_for_when_all_is_greedy(
    vllm_config: EngineConfig, tiny_model: Path, tmp_path: Path, warm: float, setting: bool | None, asked: str | None
) -> None:
    requests = [Request("1", "問"), Request("2", "話", temperature=warm)]
    config = vllm_config.model_copy(update={"batch_invariant": setting})
    answers = answer_requests(config, tiny_model, requests, log=tmp_path / "a.jsonl", title="test")
    assert read_json(tmp_path / "options.json")["VLLM_BATCH_INVARIANT"] == asked
    assert answers.provenance["batch_invariant"] == bool(asked)


def test_a_vllm_without_batch_invariance_does_not_claim_it(
    vllm_config: EngineConfig, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "vllm" / "model_executor")
    answers = answer_requests(vllm_config, tiny_model, [Request("1", "問")], log=tmp_path / "a.jsonl", title="test")
    assert answers.provenance["batch_invariant"] is False


def test_vllm_that_dies_midway_tells_its_last_words(vllm_config: EngineConfig, tiny_model: Path) -> None:
    engine = open_engine(vllm_config, tiny_model)
    requests = [Request(str(i), "die" if i == 700 else "ok") for i in range(1000)]
    kept = []
    with pytest.raises(UserError, match=r"ended with status 7: .*the stand-in died"):
        for completion in engine.generate(requests):
            kept.append(completion)
    engine.close()
    assert len(kept) == 512  # the first chunk came back before the worker died


def test_vllm_that_cannot_start(tiny_model: Path) -> None:
    config = EngineConfig(kind="vllm", python=Path("/nowhere/python"))
    with pytest.raises(UserError, match="/nowhere/python: cannot be started"):
        open_engine(config, tiny_model)


def test_endpoint(tmp_path: Path) -> None:
    def script(body: dict) -> str:
        return (body.get("prompt") or body["messages"][-1]["content"]) + "→c\n問題:次"

    with ScriptedEndpoint(script) as server:
        engine = open_engine(EngineConfig(kind="openai", url=server.url + "/"), tmp_path / "my-model")
        requests = [
            Request("1", "p", max_new_tokens=5, temperature=0.3, seed=4, stop=("\n問題:",)),
            Request("2", messages=({"role": "user", "content": "m"},)),
        ]
        done = {c.request_id: c for c in engine.generate(requests)}
    assert (done["1"].text, done["1"].finish_reason) == ("p→c", "stop")
    assert (done["2"].text, done["2"].finish_reason) == ("m→c\n問題:次", "eos")
    calls = dict(server.calls)
    assert calls["/v1/completions"] == {
        "model": "my-model",
        "max_tokens": 5,
        "temperature": 0.3,
        "top_p": 1.0,
        "seed": 4,
        "stop": ["\n問題:"],
        "prompt": "p",
    }
    assert calls["/v1/chat/completions"]["messages"] == [{"role": "user", "content": "m"}]


def test_endpoint_is_asked_again_after_a_failure(tmp_path: Path) -> None:
    answers: list[str | int] = [503, "c"]
    with ScriptedEndpoint(lambda body: answers.pop(0)) as server:
        engine = open_engine(EngineConfig(kind="openai", url=server.url, concurrency=1), tmp_path)
        assert [c.text for c in engine.generate([Request("1", "p")])] == ["c"]
    assert len(server.calls) == 2


def test_endpoint_that_refuses(tmp_path: Path) -> None:
    with ScriptedEndpoint(lambda body: 401) as server:
        engine = open_engine(EngineConfig(kind="openai", url=server.url), tmp_path)
        with pytest.raises(UserError, match=r"1 failed \(HTTP 401"):
            list(engine.generate([Request("1", "p")]))
    assert len(server.calls) == 1  # a refusal is not worth another try
    config = EngineConfig(kind="openai", url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UserError, match="1 failed"):
        list(open_engine(config, tmp_path).generate([Request("1", "p")]))


def test_configuration_says_what_an_engine_needs() -> None:
    with pytest.raises(ValueError, match=r"needs engine\.python"):
        EngineConfig(kind="vllm")
    with pytest.raises(ValueError, match=r"needs engine\.url"):
        EngineConfig(kind="openai")


# What a base model writes after the prompt, by mode: (continuation, its answer).
RUNS_ON = {
    "short": ("answer_only", "c\n考察: cは正しい。\n答え: d\n", "c"),
    "short-empty-line": ("answer_only", "\n答え:\n b,c\n次に\n", "\n答え:\n b,c"),
    "explained": ("explained", "aは誤り。\n答え: c\n次に、dは\n答え: d\n", "aは誤り。\n答え: c"),
    "no-answer": ("explained", "aは誤り。\n" * 20, "aは誤り。\n" * 10),  # cut off: no answer came
}


def runs_on(**changes: object) -> list[Request]:
    return [
        Request(name, f"say {text}", max_new_tokens=60, stop=("\n問題:",), ends_as=mode)
        for name, (mode, text, _) in RUNS_ON.items()
    ]


def test_answers_end_where_they_are_complete_in_vllm(vllm_config: EngineConfig, tiny_model: Path) -> None:
    engine = open_engine(vllm_config, tiny_model)
    done = {c.request_id: c for c in engine.generate(runs_on())}
    engine.close()
    assert {name: c.text for name, c in done.items()} == {name: answer for name, (*_, answer) in RUNS_ON.items()}
    assert {name for name, c in done.items() if c.finish_reason == "length"} == {"no-answer"}
    assert done["short"].new_tokens == 1  # vLLM itself stopped there


def test_answers_end_where_they_are_complete_at_an_endpoint(tmp_path: Path) -> None:
    def script(body: dict) -> str:
        text = body["prompt"].removeprefix("say ")[: body["max_tokens"]]
        ends = [text.index(mark) for mark in body["stop"] if mark in text]
        return text[: min(ends, default=None)]

    with ScriptedEndpoint(script) as server:
        engine = open_engine(EngineConfig(kind="openai", url=server.url), tmp_path)
        done = {c.request_id: c for c in engine.generate(runs_on())}
        assert {name: c.text for name, c in done.items()} == {name: answer for name, (*_, answer) in RUNS_ON.items()}
        four = Request("4", "say c\nd", max_new_tokens=9, stop=("w", "x", "y", "z"), ends_as="answer_only")
        assert [c.text for c in engine.generate([four])] == ["c"]
    stops = [body["stop"] for _, body in server.calls]
    assert stops.count(["\n問題:", "\n"]) == 2 and stops.count(["\n問題:"]) == 3  # one was asked again
    assert ["w", "x", "y", "z"] in stops  # the interface takes no fifth

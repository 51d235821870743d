"""vLLM in its own environment: its dependencies do not fit beside Megatron-Core's, so it is a process of its own."""

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inference.model_files import check_model_dir, require_thinking_switch
from megatron_medllm.inference.protocol import Completion, Request, engine_stop, finish, is_blank_line

WORKER = Path(__file__).with_name("vllm_worker.py")
_SHUTDOWN_S = 60
_TAIL_LINES = 5


class VllmEngine:
    """Starts the worker with `engine.python`; it loads the model while this process waits."""

    def __init__(self, config: EngineConfig, model_dir: Path) -> None:
        check_model_dir(model_dir)
        self._config, self._directory = config, model_dir
        self._errors = tempfile.NamedTemporaryFile("w+", suffix=".vllm.log")  # noqa: SIM115 (closed by `close`)
        self._idle = False
        try:
            self._process = subprocess.Popen(
                [str(config.python), str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise UserError(f"engine.python={config.python}: cannot be started ({error.strerror})") from None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._send({"batch_invariant": bool(config.batch_invariant), "options": vllm_options(config, model_dir)})
        ready = self._read()
        self._version, self._batch_invariant = ready["ready"], ready["batch_invariant"]
        self._idle = True

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {
            "engine": "vllm",
            "vllm": self._version,
            "dtype": self._config.dtype,
            "tensor_parallel": self._config.tensor_parallel,
            "max_model_len": self._config.max_model_len,
            "memory_share": self._config.memory_share,
            "prefix_caching": self._config.prefix_caching,
            "engine_seed": self._config.seed,
            "batch_invariant": self._batch_invariant,
        }

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See `Engine.generate`."""
        if any(request.thinking != "auto" for request in requests):
            require_thinking_switch(self._directory)
        self._idle = False
        by_id = {request.request_id: request for request in requests}
        again: list[Request] = []
        for completion in self._ask([(request, engine_stop(request)) for request in requests]):
            request = by_id[completion.request_id]
            if completion.finish_reason == "stop" and is_blank_line(request, completion.text):
                again.append(request)
            else:
                yield _finished(completion, request)
        for completion in self._ask([(request, request.stop) for request in again]) if again else ():
            yield _finished(completion, by_id[completion.request_id])
        self._idle = True

    def _ask(self, asked: list[tuple[Request, tuple[str, ...]]]) -> Iterator[Completion]:
        """Send requests with the stop texts that the worker is to use; its completions as they come."""
        # A thread writes: the worker may answer before it has read everything, and both pipes are finite.
        rows = [request.to_dict() | {"stop": stop} for request, stop in asked]
        writer = threading.Thread(target=self._send, args=(*rows, None), daemon=True)
        writer.start()
        for _ in asked:
            yield Completion(**self._read())
        writer.join()

    def close(self) -> None:
        """See `Engine.close`."""
        if self._idle:
            self._stdin.close()  # the worker ends with its input
        else:
            self._process.terminate()
        try:
            self._process.wait(_SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _send(self, *rows: dict[str, Any] | None) -> None:
        """Write one line a row; None is an empty line."""
        try:
            for row in rows:
                self._stdin.write("\n" if row is None else json.dumps(row) + "\n")
            self._stdin.flush()
        except OSError:  # the worker is gone: the reading side says why
            return

    def _read(self) -> dict[str, Any]:
        line = self._stdout.readline()
        if not line:
            code = self._process.wait()
            raise UserError(f"the vLLM worker ended with status {code}: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        self._errors.flush()
        lines = Path(self._errors.name).read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-_TAIL_LINES:]) or "it printed nothing"


def vllm_options(config: EngineConfig, model_dir: Path) -> dict[str, Any]:
    """What `vllm.LLM` is called with. Code that a model directory brings is never run."""
    options = {
        "model": str(model_dir),
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.memory_share,
        "enable_prefix_caching": config.prefix_caching,
        "seed": config.seed,
        "trust_remote_code": False,
    }
    return options if config.max_model_len is None else options | {"max_model_len": config.max_model_len}


def _finished(completion: Completion, request: Request) -> Completion:
    # vLLM has taken the stop texts off already.
    text, reason = finish(completion.text, replace(request, stop=()), completion.finish_reason)
    return replace(completion, text=text, finish_reason=reason)

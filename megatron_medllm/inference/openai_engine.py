"""Any server that speaks the OpenAI HTTP interface (vLLM serve, llama.cpp, SGLang, a hosted model).

Standard library only. Prompts go to `/completions`, chat messages to `/chat/completions`. Several requests are in
flight at once; a failed one is tried again with growing pauses.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inference.protocol import Completion, FinishReason, Request, engine_stop, finish, is_blank_line

_RETRY_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE_S = 30.0


class OpenAIEngine:
    """Sends requests to one address."""

    def __init__(self, config: EngineConfig, model_dir: Path) -> None:
        if config.url is None:
            raise UserError("engine.url is not set")
        self._config = config
        self._url = config.url.rstrip("/")
        self._model = config.served_model or model_dir.name

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {"engine": "openai", "endpoint": self._url, "served_model": self._model}

    def close(self) -> None:
        """See `Engine.close`."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See `Engine.generate`."""
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            for done in as_completed([pool.submit(self._ask, request) for request in requests]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: Request) -> Completion:
        completion = self._complete(request, engine_stop(request))
        if completion.finish_reason != "length" and is_blank_line(request, completion.text):
            completion = self._complete(request, request.stop)
        return completion

    def _complete(self, request: Request, stop: tuple[str, ...]) -> Completion:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        if stop:
            body["stop"] = list(stop)
        if request.messages and request.thinking != "auto":  # as vLLM and SGLang take it
            body["chat_template_kwargs"] = {"enable_thinking": request.thinking == "on"}
        if request.messages:
            answer = self._post("/chat/completions", body | {"messages": list(request.messages)}, request.request_id)
        else:
            answer = self._post("/completions", body | {"prompt": request.prompt}, request.request_id)
        return _completion(answer, request, stop, self._url)

    def _post(self, path: str, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._config.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        call = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        problem = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(min(2.0**attempt / 2, _LONGEST_PAUSE_S))
            try:
                with urllib.request.urlopen(call, timeout=self._config.timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code not in _RETRY_STATUS:
                    break
            except (OSError, ValueError) as error:  # no connection, a timeout, or an answer that is not JSON
                problem = str(error)
        raise UserError(f"{self._url}{path}: {request_id} failed ({problem})")


def _completion(answer: dict[str, Any], request: Request, stop: tuple[str, ...], url: str) -> Completion:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if request.messages else choice["text"]
        usage = answer.get("usage") or {}
        # The interface says "stop" for a stop text and for end-of-text alike.
        reason: FinishReason = "length" if choice.get("finish_reason") == "length" else "eos"
        cut, reason = finish(text or "", request, reason)
        return Completion(
            request.request_id, cut, reason, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        )
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{url}: not an OpenAI completion: {str(answer)[:200]}") from None

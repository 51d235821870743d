"""Runs inside vLLM's own environment: JSON lines in, JSON lines out. Imports nothing of this package.

The first line on standard input is the setup (`batch_invariant`, and `options` for `vllm.LLM`), then one request a
line; an empty line says that these are to be answered now. Standard output carries `{"ready": …, "batch_invariant": …}`
and then one completion a line; everything that vLLM itself prints goes to standard error.
"""

import importlib.util
import json
import os
import signal
import sys
from typing import Any

_CHUNK = 512  # answers come back, and are kept, after each so many


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's, to every process: the one that started us answers it
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM and its workers print to standard output
    setup = json.loads(sys.stdin.readline())
    if setup["batch_invariant"]:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"  # read by vLLM and its workers when they start
    import vllm

    model = vllm.LLM(**setup["options"])
    invariant = setup["batch_invariant"] and has_batch_invariance()
    print(json.dumps({"ready": vllm.__version__, "batch_invariant": invariant}), file=replies, flush=True)
    requests = []
    for line in sys.stdin:
        if line.strip():
            requests.append(json.loads(line))
            continue
        for start in range(0, len(requests), _CHUNK):
            for reply in answer(vllm, model, requests[start : start + _CHUNK]):
                print(json.dumps(reply), file=replies, flush=True)
        requests = []


def has_batch_invariance() -> bool:
    """Whether this vLLM has a batch-invariant mode; an older one passes over its variable."""
    try:
        return importlib.util.find_spec("vllm.model_executor.layers.batch_invariant") is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def answer(vllm: Any, model: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete one chunk; prompts, chat messages, and those with another switch for thinking are asked apart."""
    replies = []
    kinds = {(bool(request["messages"]), request.get("thinking")): None for request in requests}
    for chat, thinking in kinds:
        part = [r for r in requests if (bool(r["messages"]), r.get("thinking")) == (chat, thinking)]
        sampling = [
            vllm.SamplingParams(
                temperature=request["temperature"],
                top_p=request["top_p"],
                seed=request["seed"],
                max_tokens=request["max_new_tokens"],
                stop=request["stop"],
            )
            for request in part
        ]
        if chat:
            switch = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking == "on"}}
            outputs = model.chat([request["messages"] for request in part], sampling, **switch)
        else:
            outputs = model.generate([request["prompt"] for request in part], sampling)
        for request, output in zip(part, outputs, strict=True):
            text = output.outputs[0]
            stopped = text.finish_reason == "stop" and isinstance(text.stop_reason, str)
            replies.append(
                {
                    "request_id": request["request_id"],
                    "text": text.text,
                    "finish_reason": "length" if text.finish_reason == "length" else "stop" if stopped else "eos",
                    "prompt_tokens": len(output.prompt_token_ids),
                    "new_tokens": len(text.token_ids),
                }
            )
    return replies


if __name__ == "__main__":  # vLLM's tensor-parallel workers import this module again
    main()

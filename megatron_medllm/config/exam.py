"""What an evaluation asks, how it asks it, and which engine answers."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_medllm.config.base import Section, Switch
from megatron_medllm.config.cluster import Seconds

# The variable of Qwen3's chat template that tells whether the model may think before it answers.
THINKING_SWITCH = "enable_thinking"
ModeName = Literal["answer_only", "explained"]


class ExamConfig(Section):
    """Which questions."""

    name: str = Field(
        default="igakuqa", description="igakuqa and yakugakuqa bring their rules; any other name has none"
    )
    data: tuple[Path, ...] = Field(min_length=1, description="files or directories of JSON-lines questions")
    years: tuple[str, ...] = Field(default=(), description="keep these years only; all when empty")
    text_only: bool = Field(default=False, description="leave out the questions that need an image")
    limit: int | None = Field(default=None, gt=0, description="keep the first so many")


class PromptConfig(Section):
    """How the questions are put."""

    template: str = Field(default="igakuqa", description="a shipped prompt set (igakuqa, compact) or a directory")
    shots: int = Field(default=0, ge=0, description="worked examples before the question")
    shot_file: Path | None = Field(default=None, description="default: fewshot_prompt.jsonl in the exam's directory")
    explain_shots: bool = Field(default=True, description="explained mode: the worked examples explain too")
    reveal_count: bool = Field(default=True, description="tell how many choices are right, as the official prompt does")
    chat: bool = Field(default=False, description="use the tokenizer's chat template (Instruct models)")
    thinking: Switch = Field(
        default="auto",
        description="chat: the template's switch for thinking first (Qwen3's enable_thinking); "
        "auto: the template's own default",
    )

    @model_validator(mode="after")
    def _thinks_in_chat(self) -> "PromptConfig":
        if self.thinking != "auto" and not self.chat:
            raise ValueError(f"thinking={self.thinking} is a chat template's switch: set chat=true")
        return self


class EngineConfig(Section):
    """What runs the model."""

    kind: Literal["transformers", "vllm", "openai"] = "transformers"
    device: str = Field(default="auto", description="transformers: cpu, cuda, cuda:1, or auto")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: what the checkpoint holds")
    replicas: int = Field(default=1, gt=0, description="copies of the model that share the work; no text depends on it")
    unit_requests: int = Field(
        default=64, gt=0, description="requests that go to one replica whole; transformers also decodes them together"
    )
    batch_size: int = Field(default=256, gt=0, description="transformers: most sequences at once")
    batch_tokens: int = Field(
        default=131_072, gt=0, description="transformers: most tokens of KV cache at once (prompt + new, padded)"
    )
    python: Path | None = Field(default=None, description="vllm: the interpreter of the environment that has vLLM")
    tensor_parallel: int = Field(default=1, gt=0, description="vllm: GPUs per model")
    max_model_len: int | None = Field(default=None, gt=0, description="vllm: context length to reserve")
    memory_share: float = Field(default=0.9, gt=0, le=1, description="vllm: share of a GPU's memory to take")
    prefix_caching: bool = Field(default=True, description="vllm: keep the cache of prompts that begin alike")
    seed: int = Field(default=0, description="vllm: the engine's own seed; every request that samples brings one")
    batch_invariant: bool | None = Field(
        default=None, description="vllm: texts that do not depend on the batch; default: when all requests are greedy"
    )
    url: str | None = Field(default=None, description="openai: base address, e.g. http://127.0.0.1:8000/v1")
    served_model: str | None = Field(default=None, description="openai: model name; default: the model directory's")
    api_key_variable: str = Field(default="OPENAI_API_KEY", description="openai: environment variable with the key")
    concurrency: int = Field(default=8, gt=0, description="openai: requests in flight")
    retries: int = Field(default=3, ge=0, description="openai: further attempts after a failed request")
    timeout_s: Seconds = Field(default=600.0, gt=0, description="openai: seconds to wait for one answer")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "EngineConfig":
        if self.kind == "vllm" and self.python is None:
            raise ValueError("engine.kind=vllm needs engine.python, the interpreter of the environment that has vLLM")
        if self.kind == "openai" and self.url is None:
            raise ValueError("engine.kind=openai needs engine.url")
        if self.replicas > 1 and self.kind == "openai":
            raise ValueError("engine.replicas: an endpoint has replicas of its own; raise engine.concurrency")
        if self.replicas > 1 and ":" in self.device:
            raise ValueError(f"engine.replicas={self.replicas} cannot share engine.device={self.device}; say cuda")
        return self

    @property
    def unit_size(self) -> int:
        """Requests in a unit: no more than are decoded at once."""
        return min(self.unit_requests, self.batch_size) if self.kind == "transformers" else self.unit_requests

    @property
    def gpus(self) -> int:
        """What one copy of the model asks for: none behind an address, `tensor_parallel` in vLLM."""
        if self.kind == "openai":
            return 0
        return self.tensor_parallel if self.kind == "vllm" else 1


class MaxNewTokens(Section):
    """How long an answer may get, in tokens."""

    answer_only: int = Field(default=32, gt=0)
    explained: int = Field(default=1024, gt=0)


class DecodingConfig(Section):
    """How tokens are chosen."""

    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    max_new_tokens: MaxNewTokens = MaxNewTokens()
    stop: tuple[str, ...] = Field(default=("\n問題:",), description="texts that end an answer, besides end-of-text")


class EvalConfig(Section):
    """One model, one exam, answered with and without an explanation."""

    exam: ExamConfig
    prompt: PromptConfig = PromptConfig()
    modes: tuple[ModeName, ...] = Field(default=("answer_only", "explained"), min_length=1)
    engine: EngineConfig = EngineConfig()
    decoding: DecodingConfig = DecodingConfig()
    samples: int = Field(
        default=1, gt=0, description="answers per question and mode; > 1 adds majority and consistency"
    )
    parser: Literal["lenient", "strict"] = "lenient"
    resamples: int = Field(default=10_000, ge=100, description="bootstrap resamples")
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    require: tuple[str, ...] = Field(default=(), description='gates such as "gap >= -0.02" or "accuracy >= 0.85"')
    examples: int = Field(default=12, ge=0, description="malformed answers and flips shown in the report")
    html: bool = Field(default=True, description="write report.html beside the JSON and Markdown")

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvalConfig":
        if self.samples > 1 and self.decoding.temperature == 0:
            raise ValueError("samples > 1 with decoding.temperature=0 would give the same answer again")
        if len(set(self.modes)) != len(self.modes):
            raise ValueError("modes: the same mode twice")
        return self

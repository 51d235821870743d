"""`medllm bench generation`: how fast the inference engine writes, as `medllm pairs` samples from it."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_medllm.bench.harness import (
    BenchSettings,
    Measured,
    free_device_memory,
    measured_window,
    require_steps,
    summarize,
    write_result,
)
from megatron_medllm.bench.synthetic import RandomTexts, SyntheticData, with_random_weights
from megatron_medllm.checkpoint.hf_writer import export_hf
from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.pairs import PairsConfig, SamplingConfig
from megatron_medllm.config.run import RunConfig
from megatron_medllm.data.number_words import write_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.inference.engines import open_engine
from megatron_medllm.inference.exam_requests import ExamPrompter
from megatron_medllm.inference.protocol import Engine, Request, request_seed
from megatron_medllm.models.config import DTYPES
from megatron_medllm.parallel import runtime
from megatron_medllm.preference.pairs import training_questions
from megatron_medllm.preference.sampling import sampling_requests
from megatron_medllm.train.model import build_chunks
from megatron_medllm.train.throughput import StepClock


def measure_generation(run: RunConfig, settings: BenchSettings) -> Path:
    """Answer `engine.batch_size` requests a step; write OUTPUT/generation.json.

    The requests are those of the recipe's section `pairs`, or random prompts with its sampling settings (the defaults
    without such a section).

    Raises:
        UserError: neither a section `pairs` nor synthetic data, fewer requests than the steps need, or the engine
            cannot start.
    """
    engine_config = run.pairs.engine if run.pairs is not None else EngineConfig()
    if settings.synthetic is not None:
        if engine_config.kind == "openai":
            raise UserError("bench generation --synthetic: engine.kind=openai serves a model of its own")
        model_dir = _random_model(run, settings.output / "synthetic")
        vocab_size = run.model.resolve_shape().vocab_size
        count = settings.all_steps * engine_config.batch_size
        sampling = run.pairs.sampling if run.pairs is not None else SamplingConfig()
        requests = random_requests(count, settings.synthetic, sampling, vocab_size=vocab_size, seed=run.seed)
    else:
        if run.pairs is None or run.model.path is None:
            raise UserError("medllm bench generation needs the section 'pairs' and model.path, or --synthetic")
        model_dir, requests = run.model.path, _exam_requests(run.pairs)
    require_steps(len(requests) // engine_config.batch_size, settings)
    engine = open_engine(engine_config, model_dir)
    try:
        engine_facts = engine.describe()
        device = torch.device(engine_facts.get("device", "cpu"))
        rows = measured_window(_answerer(engine, requests, engine_config.batch_size), settings, device)
        result = summarize(
            "generation", run, settings, rows, device=device, facts={"engine": engine_facts},
            world_size=engine_config.tensor_parallel if engine_config.kind == "vllm" else 1,
        )  # fmt: skip
    finally:
        engine.close()
    if engine_config.kind != "transformers":
        del result["peak_memory_bytes"]  # this process's, not the engine's
    return write_result(result, settings.output)


def _answerer(engine: Engine, requests: Sequence[Request], size: int) -> Callable[[int], Measured]:
    """A function that has a step's requests answered. Its tokens are those that the engine wrote."""

    def step(index: int) -> Measured:
        asked = requests[index * size : (index + 1) * size]
        clock = StepClock()
        with clock.part("generate"):
            completions = list(engine.generate(asked))
        return Measured(
            seconds=clock.seconds(),
            parts=clock.parts,
            tokens=sum(c.new_tokens for c in completions),
            padding=0,
            counts={"samples": len(completions), "prompt_tokens": sum(c.prompt_tokens for c in completions)},
            flops={},  # decoding waits for memory: FLOP/s would say nothing about it
        )

    return step


def random_requests(
    count: int, lengths: SyntheticData, sampling: SamplingConfig, *, vocab_size: int, seed: int
) -> list[Request]:
    """Requests for `sampling.samples` answers each to random prompts, at the last temperature."""
    texts, samples = RandomTexts(vocab_size, seed), max(sampling.samples, 1)
    prompts = [texts.draw(lengths.prompt_length) for _ in range(-(-count // samples))]
    return [
        Request(
            request_id=f"{number}",
            prompt=prompts[number // samples],
            max_new_tokens=lengths.response_length,
            temperature=sampling.temperatures[-1],
            top_p=sampling.top_p,
            seed=request_seed(sampling.seed, f"{number}"),
            stop=sampling.stop,
        )
        for number in range(count)
    ]


def _exam_requests(config: PairsConfig) -> list[Request]:
    """What `medllm pairs` would ask."""
    questions, _ = training_questions(config)
    prompter = ExamPrompter(config.prompt, config.questions.data)
    return [request for question in questions for _, request in sampling_requests(config, prompter, question)]


def _random_model(run: RunConfig, directory: Path) -> Path:
    """Write an HF directory of random weights of the recipe's shape and dtype, and its tokenizer of numbers."""
    hf_dir = directory / "model"
    shape = run.model.resolve_shape()
    write_tokenizer(directory, vocab_size=shape.vocab_size)
    shutil.rmtree(hf_dir, ignore_errors=True)  # of an earlier measurement
    run = with_random_weights(run, directory).model_copy(update={"layout": LayoutConfig()})
    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        chunks = build_chunks(run, ranks, adapter=None, fp8=None)
        export_hf(chunks, shape, hf_dir, runtime=ranks, source_dir=directory, dtype=DTYPES[run.model.dtype])
    finally:
        runtime.stop()
    del chunks
    free_device_memory()
    return hf_dir

"""Open the engine that the configuration names, and say which model it is."""

from pathlib import Path

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.inference.model_files import check_model_dir, model_digest
from megatron_medllm.inference.openai_engine import OpenAIEngine
from megatron_medllm.inference.protocol import Engine
from megatron_medllm.inference.vllm_engine import VllmEngine


def open_engine(config: EngineConfig, model_dir: Path) -> Engine:
    """Load the model.

    Raises:
        UserError: the model directory is incomplete, or the engine cannot start.
    """
    if config.kind == "openai":
        return OpenAIEngine(config, model_dir)
    if config.kind == "vllm":
        return VllmEngine(config, model_dir)
    # Imported here, so that the other engines work without loading torch.
    from megatron_medllm.inference.transformers_engine import TransformersEngine

    return TransformersEngine(config, model_dir)


def model_identity(config: EngineConfig, model_dir: Path) -> dict[str, str]:
    """What makes an answer this model's: a digest of its files, or an endpoint's address and model name.

    Raises:
        UserError: the model directory is incomplete.
    """
    if config.kind == "openai":
        return {"endpoint": str(config.url), "served_model": config.served_model or model_dir.name}
    check_model_dir(model_dir)
    return {"model_digest": model_digest(model_dir)}

"""An HF model directory: is it complete, and which weights are these?"""

import hashlib
from pathlib import Path

from megatron_medllm.config.exam import THINKING_SWITCH
from megatron_medllm.config.hf_files import INDEX_NAME, SINGLE_NAME, weight_files
from megatron_medllm.errors import UserError

_WHOLE_BYTES = 256 * 2**20
_SAMPLE_BYTES = 2**20
_SAMPLES = 64
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def check_model_dir(model_dir: Path) -> None:
    """Refuse a directory that no engine could load.

    Raises:
        UserError: names what is missing: the directory, config.json, weights or the tokenizer; or what leaves a choice
            of weights, which engines make differently.
    """
    if not model_dir.is_dir():
        raise UserError(f"{model_dir}: no such model directory")
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir}: holds no config.json; expected a Hugging Face model directory")
    if not any(model_dir.glob("*.safetensors")) and not any(model_dir.glob("*.bin")):
        raise UserError(f"{model_dir}: holds no weights (*.safetensors)")
    if (model_dir / SINGLE_NAME).exists() or (model_dir / INDEX_NAME).exists():
        for path in weight_files(model_dir):
            if not path.is_file():
                raise UserError(f"{path}: no such file, though {INDEX_NAME} names it")
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{model_dir}: holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the base model's there")


def require_thinking_switch(model_dir: Path) -> None:
    """Refuse a model whose chat template would pass over the switch for thinking.

    Raises:
        UserError: no file of a chat template has it.
    """
    files = [model_dir / name for name in _TEMPLATE_FILES]
    if not any(THINKING_SWITCH in path.read_text(encoding="utf-8") for path in files if path.is_file()):
        raise UserError(f"{model_dir}: prompt.thinking is set, but the chat template has no switch `{THINKING_SWITCH}`")


def model_digest(model_dir: Path) -> str:
    """SHA-256 that tells one model directory from another: its configuration, tokenizer and weights.

    Files above 256 MiB are sampled (size, and 64 pieces of 1 MiB spread evenly): training changes every tensor, and
    reading 140 GB to name a 72B model would cost minutes.
    """
    digest = hashlib.sha256()
    names = sorted(p for p in model_dir.iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".model", ".jinja"))
    for path in names:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as stream:
            if size <= _WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for piece in range(_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * piece // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()

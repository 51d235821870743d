"""The model families that can be trained, by Hugging Face's `model_type`. Each is one file here."""

from megatron_medllm.config.families import qwen3, qwen25
from megatron_medllm.config.families.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (qwen25.FAMILY, qwen3.FAMILY)}

"""Qwen2.5 on Megatron-Core: Japanese medical continued pretraining, then Reasoning Preference Optimization."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says so eight times at import, of packages that this one does without; `medllm doctor` tells what is here.
warnings.filterwarnings(
    "ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed", category=UserWarning
)

"""Qwen2.5 on Megatron-Core: Japanese medical continued pretraining, then Reasoning Preference Optimization."""

__version__ = "0.1.0"

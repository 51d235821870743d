"""Training: continued pretraining and RPO, and their state on disk."""

import megatron_medllm.parallel  # noqa: F401  (refuses an untested Megatron-Core before anything imports it)

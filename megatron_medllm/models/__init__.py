"""The models, over Megatron-Core."""

import megatron_medllm.parallel  # noqa: F401  (refuses an untested Megatron-Core before anything imports it)

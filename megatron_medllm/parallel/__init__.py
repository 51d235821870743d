"""Processes, groups, optimizer and distributed checkpoints, over a Megatron-Core that the tests ran on."""

from megatron_medllm.versions import refuse_untested

refuse_untested()

"""Whether a chat model may think before it answers: a switch of Qwen3's chat template."""

from typing import Literal

Thinking = Literal["auto", "on", "off"]  # auto: the template's own default
SWITCH = "enable_thinking"  # the template's variable

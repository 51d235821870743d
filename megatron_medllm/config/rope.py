"""RoPE as a config.json spells it: its base, and YaRN (arXiv 2309.00071) where the context was stretched."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, StrictBool, StrictStr, ValidationError, model_serializer

from megatron_medllm.config.base import Section, first_problem

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_NAMES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")  # of any kind of RoPE


class Yarn(Section):
    """YaRN's settings, in transformers' spelling; what is not given has the paper's value."""

    factor: Annotated[
        float, Field(strict=True, ge=1, allow_inf_nan=False, description="how far the context is stretched")
    ]
    original_max_position_embeddings: int = Field(gt=0, lt=2**31, description="the context before, in tokens")
    attention_factor: Positive | None = Field(
        default=None, description="factor of cosines and sines; default: 0.1 ln(factor) + 1"
    )
    beta_fast: Positive | None = Field(default=None, description="default: 32")
    beta_slow: Positive | None = Field(default=None, description="default: 1")
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: StrictBool | None = Field(default=None, description="whole numbers as the ramp's ends; default: yes")

    @model_serializer
    def given(self) -> dict[str, Any]:
        """The settings that were given, as they were."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}


class HFRope(BaseModel):
    """RoPE in a config.json: `rope_parameters` (transformers 5) or `rope_scaling` (4)."""

    rope_type: StrictStr | None = None
    type: StrictStr | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(strict=True)] | None = None
    yarn: Yarn | None = None

    @classmethod
    def read(cls, value: dict[str, Any], *, context: int) -> "HFRope":
        """Parse; transformers 5 may nest the settings by kind of layer.

        Args:
            value: the JSON object.
            context: the model's `max_position_embeddings`, which YaRN takes where the context before is not given.

        Raises:
            ValueError: a kind of RoPE that is not computed here, a setting that YaRN does not have, or a wrong value.
        """
        nested = {name: part for name, part in value.items() if name.endswith("_attention") and part is not None}
        if set(nested) - {"full_attention"}:
            raise ValueError(f"RoPE for {min(set(nested) - {'full_attention'})!r} is not supported")
        if nested and not isinstance(nested["full_attention"], dict):
            raise ValueError("RoPE's 'full_attention' is no JSON object")
        flat = {name: part for name, part in value.items() if not name.endswith("_attention")}
        flat |= nested.get("full_attention", {})
        rope = cls.model_validate({name: flat[name] for name in _NAMES if name in flat})
        kind = rope.rope_type or rope.type or "default"
        if kind not in ("default", "yarn"):
            raise ValueError(f"RoPE type {kind!r} is not supported; only 'default' and 'yarn' are")
        if rope.partial_rotary_factor not in (None, 1.0):
            raise ValueError("partial_rotary_factor is not 1; whole heads are rotated here")
        if kind == "default":
            return rope
        settings = {name: part for name, part in flat.items() if name not in _NAMES and part is not None}
        try:
            yarn = Yarn.model_validate({"original_max_position_embeddings": context} | settings)
        except ValidationError as error:
            raise ValueError(f"RoPE type 'yarn': {first_problem(error)}") from None
        return rope.model_copy(update={"yarn": yarn})

"""The keys of `torch_dist` checkpoints, as Megatron-LM, Megatron-Bridge, NeMo and this package spell them.

| layout | key of layer 3's fc1 |
|---|---|
| layers stacked (the default) | `decoder.layers.mlp.linear_fc1.weight`, first axis the layer |
| layers apart (`non_homogeneous_layers`) | `decoder.layers.3.mlp.linear_fc1.weight` |
| gate and up apart too (`singleton_local_shards`) | `decoder.layers.3.mlp.linear_fc1.weight_w`, `…_v` |

NeMo puts `module.` before every key. Optimizer, random states and other objects are passed over.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_medllm.checkpoint.foreign.family import other_family
from megatron_medllm.checkpoint.names import LAYER_NAME, LAYER_PREFIX, TORCH_BACKEND_NAMES
from megatron_medllm.checkpoint.stored import StoredWeight
from megatron_medllm.checkpoint.torch_dist import TorchDistReader
from megatron_medllm.errors import UserError

_MODULE = "module."
_NOT_OF_THE_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", "iteration")
_SPELLED = {te: local for local, te in TORCH_BACKEND_NAMES.items()}
_HALVES = ("_w", "_v")


class DistTensors:
    """The model's tensors in a `torch_dist` checkpoint."""

    def __init__(self, reader: TorchDistReader, *, ours: bool) -> None:
        """Find the prefix of the keys and refuse another family's model.

        Args:
            reader: of the checkpoint.
            ours: this package wrote it.

        Raises:
            UserError: a model of no family that is read.
        """
        self.reader, self.directory = reader, reader.directory
        keys = [key for key in reader.tensor_keys() if not key.startswith(_NOT_OF_THE_MODEL)]
        bare = [_without_modules(key) for key in keys]
        prefixes = {key.removesuffix(plain) for key, plain in zip(keys, bare, strict=True)}
        if not keys:
            raise UserError(f"{self.directory}: holds no model")
        if len(prefixes) > 1:
            raise UserError(f"{self.directory}: keys of two models: {min(keys)!r}, {max(keys)!r}")
        self.prefix = prefixes.pop()
        if (why := other_family(bare, ours=ours)) is not None:
            raise UserError(f"{self.directory}: {why}")
        self.names = tuple(bare)

    def find(self, mcore: str) -> StoredWeight | None:
        """The weight of this name, in whichever layout.

        Raises:
            UserError: it is stored incompletely.
        """
        for key, layer in self._spellings(mcore):
            if self.reader.shape_of(key) is not None:
                return self.reader.stored(key, layer)
            halves = [key + half for half in _HALVES]
            if all(self.reader.shape_of(half) is not None for half in halves):
                return _joined(key, [self.reader.stored(half, layer) for half in halves])
        return None

    def _spellings(self, mcore: str) -> Iterator[tuple[str, int | None]]:
        match = LAYER_NAME.fullmatch(mcore)
        if match is None:
            yield self.prefix + mcore, None
            return
        for rest in (match["rest"], _SPELLED.get(match["rest"])):
            if rest is not None:
                yield f"{self.prefix}{LAYER_PREFIX}{rest}", int(match["layer"])
                yield f"{self.prefix}{LAYER_PREFIX}{match['layer']}.{rest}", None


def _without_modules(key: str) -> str:
    while key.startswith(_MODULE):
        key = key.removeprefix(_MODULE)
    return key


def _joined(name: str, parts: list[StoredWeight]) -> StoredWeight:
    """Weights one below the other."""
    blocks, rows = [], 0
    for part in parts:
        blocks += [replace(block, row=block.row + rows) for block in part.blocks]
        rows += part.sizes[0]
    return StoredWeight(name, (rows, *parts[0].sizes[1:]), parts[0].dtype, tuple(blocks))

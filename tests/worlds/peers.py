"""Checkpoints as Megatron-LM, Megatron-Bridge and NeMo lay them out, written without them.

The layouts are those of the peers' own small checkpoints; a test compares the two where those are at hand. Nothing here
uses the package's table of names or its slicing: the weights are put together with reshape and cat.
"""

import argparse
import io
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml

from megatron_medllm.checkpoint.torch_dist import Item, serialize, write_index
from megatron_medllm.config.model import ModelShape, shape_from_hf_config
from tests.worlds.model_dir import read_tensors

Tensors = dict[str, torch.Tensor]
LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")  # cut by columns under tensor parallelism
WHOLE = ("layer_norm_weight", "layernorm.weight")


def megatron_tensors(hf: Tensors, shape: ModelShape, *, vocab: int | None = None) -> Tensors:
    """The whole model's tensors under Transformer Engine's names; the vocabulary padded with 0.25."""
    kv, width = shape.num_query_groups, shape.kv_channels

    def padded(table: torch.Tensor) -> torch.Tensor:
        rows = (vocab or len(table)) - len(table)
        return torch.cat((table, torch.full((rows, table.shape[1]), 0.25, dtype=table.dtype)))

    found = {"embedding.word_embeddings.weight": padded(hf["model.embed_tokens.weight"])}
    for layer in range(shape.num_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            q, k, v = (hf[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv")
            rest = q.shape[1:]
            groups = (q.view(kv, -1, *rest), k.view(kv, width, *rest), v.view(kv, width, *rest))
            found[f"{new}self_attention.linear_qkv.{kind}"] = torch.cat(groups, dim=1).flatten(0, 1)
        found[f"{new}self_attention.linear_qkv.layer_norm_weight"] = hf[f"{old}input_layernorm.weight"]
        found[f"{new}self_attention.linear_proj.weight"] = hf[f"{old}self_attn.o_proj.weight"]
        gate_up = (hf[f"{old}mlp.gate_proj.weight"], hf[f"{old}mlp.up_proj.weight"])
        found[f"{new}mlp.linear_fc1.weight"] = torch.cat(gate_up)
        found[f"{new}mlp.linear_fc1.layer_norm_weight"] = hf[f"{old}post_attention_layernorm.weight"]
        found[f"{new}mlp.linear_fc2.weight"] = hf[f"{old}mlp.down_proj.weight"]
    found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if "lm_head.weight" in hf:
        found["output_layer.weight"] = padded(hf["lm_head.weight"])
    return found


def whole(hf_dir: Path, *, vocab: int | None = None) -> Tensors:
    """The tensors of an HF directory, as `megatron_tensors`."""
    return megatron_tensors(read_tensors(hf_dir), shape_from_hf_config(hf_dir), vocab=vocab)


def tp_part(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """One tensor-parallel rank's part."""
    if name.endswith(WHOLE):
        return whole
    if name.endswith(COLUMNS):
        return whole.chunk(size, dim=1)[rank].contiguous()
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size)[rank].contiguous()


def write_legacy(
    root: Path,
    tensors: Tensors,
    shape: ModelShape,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    local_names: bool = True,
    change: Callable[[dict], None] | None = None,
    **args: object,
) -> Path:
    """`iter_0000010/mp_rank_*` below `root`, with tracker. `change` alters each rank's state before it is saved."""
    folder = root / "iter_0000010"
    each = shape.num_layers // (pp * vpp)
    assert each * pp * vpp == shape.num_layers
    settings = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "swiglu": True,
        "exit_signal": signal.Signals.SIGTERM,
    }
    for stage in range(pp):
        for rank in range(tp):
            chunks = []
            for chunk in range(vpp):
                first = (chunk * pp + stage) * each
                ends = (stage == chunk == 0, stage == pp - 1 and chunk == vpp - 1)
                part = _chunk(tensors, range(first, first + each), starts=ends[0], ends=ends[1], local=local_names)
                chunks.append(
                    OrderedDict((name, tp_part(whole_name, tensors[whole_name], rank, tp)) for name, whole_name in part)
                )
            state = {
                "args": argparse.Namespace(**(settings | args)),
                "iteration": 10,
                "optimizer": {"param_groups": [{"lr": 0.1}], "state": {0: {"exp_avg": torch.ones(5)}}},
                "rng_state": [{"np_rng_state": np.random.RandomState(1).get_state(), "random": torch.arange(4)}],
            }
            state |= {"model": chunks[0]} if vpp == 1 else {f"model{n}": part for n, part in enumerate(chunks)}
            if change is not None:
                change(state)
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            (folder / name).mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / name / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return root


def _chunk(tensors: Tensors, layers: range, *, starts: bool, ends: bool, local: bool) -> list[tuple[str, str]]:
    """A pipeline chunk's tensors: name within the chunk, name within the model."""
    names = []
    for name in tensors:
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            if int(number) in layers:
                rest = LOCAL_NORMS.get(rest, rest) if local else rest
                names.append((f"decoder.layers.{int(number) - layers.start}.{rest}", name))
        elif (starts and name.startswith("embedding")) or (ends and not name.startswith("embedding")):
            names.append((name, name))
    return names


def write_dist(
    folder: Path,
    tensors: Tensors,
    *,
    prefix: str = "",
    tp: int = 1,
    layers: str = "stacked",
    objects: dict[str, bytes] | None = None,
    common: dict | None = None,
    extra: Tensors | None = None,
) -> Path:
    """A `torch_dist` checkpoint.

    Args:
        folder: is made.
        tensors: of the whole model.
        prefix: of every key.
        tp: parts that each tensor is stored in.
        layers: `stacked`, `apart` or `singleton` (apart, gate and up apart too).
        objects: key -> pickled bytes, stored as they are.
        common: what `common.pt` holds; None: there is none, as Megatron-Core 0.19 does.
        extra: tensors stored whole under just these keys.
    """
    folder.mkdir(parents=True)
    depth = 1 + max((int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")), default=0)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    items: list[Item] = []
    with open(folder / "__0_0.distcp", "wb") as stream:

        def store(key: str, whole: tuple[int, ...], offsets: tuple[int, ...], part: torch.Tensor) -> None:
            start, data = stream.tell(), serialize(part.clone())
            stream.write(data)
            shapes[key] = (whole, part.dtype)
            items.append(Item(key, offsets, tuple(part.shape), "__0_0.distcp", start, len(data), None))

        for name, tensor in tensors.items():
            for suffix, block, rows_before in _apart(name, tensor, layers):
                key, layer = prefix + name + suffix, None
                if name.startswith("decoder.layers.") and layers == "stacked":
                    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
                    key, layer = f"{prefix}decoder.layers.{rest}", int(number)
                for offsets, part in _grid(name, block, tp):
                    offsets = (offsets[0] + rows_before, *offsets[1:])
                    whole = tuple(tensor.shape) if not suffix else tuple(block.shape)
                    if layer is None:
                        store(key, whole, offsets, part)
                    else:
                        store(key, (depth, *whole), (layer, *offsets), part[None])
        for key, tensor in (extra or {}).items():
            store(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor)
        for key, data in (objects or {}).items():
            items.append(Item(key, None, None, "__0_0.distcp", stream.tell(), len(data), None))
            stream.write(data)
    write_index(folder, shapes, items, common=common or {})
    if common is None:
        (folder / "common.pt").unlink()
    return folder


def _apart(name: str, tensor: torch.Tensor, layers: str) -> list[tuple[str, torch.Tensor, int]]:
    """Suffix of the key, block, rows above it: gate and up are stored one by one."""
    if not name.endswith("linear_fc1.weight"):
        return [("", tensor, 0)]
    gate, up = tensor.chunk(2)
    if layers == "singleton":
        return [("_w", gate, 0), ("_v", up, 0)]
    return [("", gate, 0), ("", up, len(gate))]


def _grid(name: str, block: torch.Tensor, tp: int) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Offsets and tensor of the parts that tensor parallelism stores of a block."""
    if name.endswith(WHOLE):
        return [((0,) * block.dim(), block)]
    axis = 1 if name.endswith(COLUMNS) else 0
    found, at = [], 0
    for part in block.chunk(tp, dim=axis):
        found.append((tuple(at if d == axis else 0 for d in range(block.dim())), part))
        at += part.shape[axis]
    return found


def megatron_settings(shape: ModelShape) -> dict:
    """The model's settings as Bridge and NeMo write them, the telling ones."""
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "kv_channels": shape.kv_channels,
        "vocab_size": shape.vocab_size,
        "share_embeddings_and_output_weights": shape.tie_embeddings,
        "layernorm_epsilon": shape.layernorm_epsilon,
        "rotary_base": shape.rotary_base,
        "seq_length": shape.max_position_embeddings,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "num_moe_experts": None,
        "position_embedding_type": "rope",
        "qk_layernorm": False,
    }


def write_bridge(root: Path, tensors: Tensors, shape: ModelShape, *, peft: dict | None = None, **settings) -> Path:
    """Megatron-Bridge's root folder."""
    folder = write_dist(root / "iter_0000000", tensors, objects={"common_state/shard_0_1": pickled([{"iteration": 0}])})
    model = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider"} | megatron_settings(shape) | settings
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "peft": peft, "tokenizer": None}))
    (root / "latest_checkpointed_iteration.txt").write_text("0")
    torch.save({"step": torch.tensor(0)}, root / "latest_train_state.pt")
    return root


def write_nemo(root: Path, tensors: Tensors, shape: ModelShape, *, peft: dict | None = None, **settings) -> Path:
    """NeMo's root folder: it stores a head for every model and says that every model is untied."""
    if "embedding.word_embeddings.weight" in tensors:
        tensors = {"output_layer.weight": tensors["embedding.word_embeddings.weight"]} | tensors
    write_dist(root / "weights", tensors, prefix="module.", common={"pytorch-lightning_version": "2.5"})
    (root / "context").mkdir()
    config = megatron_settings(shape) | {"share_embeddings_and_output_weights": False, "kv_channels": None} | settings
    model = {"_target_": "nemo.collections.llm.gpt.model.qwen2.Qwen2Model", "config": config, "model_transform": peft}
    (root / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    (root / "context" / "io.json").write_text('{"_target_": "os.system"}')
    return root


def pickled(value: object) -> bytes:
    """As `torch.save` writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()

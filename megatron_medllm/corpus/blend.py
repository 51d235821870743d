"""How much of each source a training run sees, read from and written to the manifest."""

from dataclasses import dataclass
from pathlib import Path

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.index import bin_path, idx_path
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json


@dataclass(frozen=True)
class BlendedSource:
    """One prefix with its share of the training tokens. `tokens` and `documents` are what the prefix holds.

    `digests` are those of its two files, as the build took them: they change with the content, the prefix does not.
    """

    name: str
    prefix: Path
    weight: float
    tokens: int
    documents: int
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class CorpusBlend:
    """A built corpus as the trainer sees it. `split` holds the shares of training, validation and test."""

    sources: tuple[BlendedSource, ...]
    split: tuple[float, float, float]
    tokenizer_digest: str
    vocab_size: int
    eod_id: int

    def epochs(self, token_budget: int) -> dict[str, float]:
        """How often a run of `token_budget` tokens reads each source's training share."""
        share = self.split[0] / sum(self.split)
        return {
            source.name: round(token_budget * source.weight / (source.tokens * share), 4)
            for source in self.sources
            if source.tokens and share
        }


def read_blend(output_dir: Path) -> CorpusBlend:
    """Read `output_dir`/manifest.json.

    Raises:
        UserError: no manifest there, or one that this version does not read.
    """
    path = output_dir / "manifest.json"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise UserError(f"{path}: not a corpus manifest of format 1")
    return _blend(manifest, output_dir)


def _blend(manifest: dict, output_dir: Path) -> CorpusBlend:
    outputs = manifest.get("outputs", {})
    sources = tuple(
        BlendedSource(
            name,
            prefix := output_dir / facts["prefix"],
            facts["weight"],
            facts["tokens"],
            facts["documents"],
            tuple(outputs.get(path.name, "") for path in (bin_path(prefix), idx_path(prefix))),
        )
        for name, facts in manifest["sources"].items()
    )
    tokenizer = manifest["tokenizer"]
    split = tuple(manifest["split"])
    return CorpusBlend(sources, split, tokenizer["digest"], tokenizer["vocab_size"], tokenizer["eod_id"])


def blend_weights(config: CorpusConfig, tokens: dict[str, int]) -> dict[str, float]:
    """Shares of the sources, summing to 1: by weight, else by tokens; `replay_share` fixes the replay sources' sum.

    Raises:
        UserError: a side of the replay split holds no tokens.
    """
    raw = {
        name: (source.weight if source.weight is not None else float(tokens[name])) if tokens[name] else 0.0
        for name, source in config.sources.items()
    }
    total = sum(raw.values())
    if total == 0:
        return dict.fromkeys(raw, 0.0)
    if config.replay_share is None:
        return {name: weight / total for name, weight in raw.items()}
    replayed = sum(raw[name] for name, source in config.sources.items() if source.replay)
    if replayed == 0 or replayed == total:
        side = "replay" if replayed == 0 else "other"
        raise UserError(f"replay_share = {config.replay_share}, but the {side} sources hold no tokens")
    share = config.replay_share
    return {
        name: raw[name] / replayed * share if source.replay else raw[name] / (total - replayed) * (1 - share)
        for name, source in config.sources.items()
    }


def add_blend(manifest: dict, config: CorpusConfig) -> dict:
    """The manifest with the config's weights, notes, split and epochs: what may change without a new build."""
    weights = blend_weights(config, {name: facts["tokens"] for name, facts in manifest["sources"].items()})
    sources = {
        name: facts
        | {
            "weight": float(f"{weights[name]:.8g}"),  # significant digits: a small source's weight is not rounded to 0
            "replay": config.sources[name].replay,
            "licence": config.sources[name].licence,
        }
        for name, facts in manifest["sources"].items()
    }
    manifest = manifest | {"sources": sources, "split": list(config.split), "token_budget": config.token_budget}
    if config.token_budget is not None:
        for name, epochs in _blend(manifest, Path()).epochs(config.token_budget).items():
            sources[name]["epochs"] = epochs
    return manifest

"""provenance.json of a release: the chain, every file of the release, and a digest over both."""

from pathlib import Path
from typing import Any

import orjson

from megatron_medllm import __version__
from megatron_medllm.errors import UserError
from megatron_medllm.storage import atomic_write, digest_value, read_json

NAME = "provenance.json"


def write_provenance(
    path: Path, *, model: str, chain: list[dict[str, Any]], files: dict[str, str], notes: list[str]
) -> None:
    """Write it; `files` are digests of everything else in the release."""
    value: dict[str, Any] = {
        "format": 1,
        "algorithm": "sha256, unless another stands before the digest",
        "medllm": __version__,
        "model": model,
        "chain": chain,
        "chain_digest": digest_value(chain),
        "not_compared": notes,
        "files": files,
    }
    with atomic_write(path) as stream:
        stream.write(_bytes(value | {"digest": digest_value(value)}))


def read_provenance(path: Path) -> dict[str, Any]:
    """Read it back; not a byte may differ from what `write_provenance` writes.

    Raises:
        UserError: it is missing, or was changed.
    """
    found = read_json(path)
    whole = isinstance(found, dict) and {"digest", "chain", "files", "model"} <= found.keys()
    rest = {key: value for key, value in found.items() if key != "digest"} if whole else {}
    if not whole or found["digest"] != digest_value(rest) or path.read_bytes() != _bytes(found):
        raise UserError(f"{path}: was changed: it does not match its own digest")
    return dict(found)


def _bytes(value: dict[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"

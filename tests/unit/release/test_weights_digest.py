"""The reference's digest of a model, computed from digests of files, is the one that `medllm score` records."""

import shutil
from pathlib import Path

from megatron_medllm.release.links import weights_digest
from megatron_medllm.storage import digest_file
from megatron_medllm.train.reference import digest_weights


def test_it_equals_what_scoring_records(tiny_model: Path, tmp_path: Path) -> None:
    digests = {path: digest_file(path) for path in tiny_model.iterdir() if path.is_file()}
    assert weights_digest(tiny_model, digests) == digest_weights(tiny_model)
    known = {path: digest for path, digest in digests.items() if path.name != "config.json"}
    assert weights_digest(tiny_model, known) is None
    assert weights_digest(tmp_path, {}) is None
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    changed = {path: digest_file(path) for path in other.iterdir() if path.is_file()}
    assert weights_digest(other, changed) == digest_weights(other) != digest_weights(tiny_model)

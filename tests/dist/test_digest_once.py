"""A model's files are read for their digest once, whatever the number of ranks."""

import json
from pathlib import Path

from megatron_medllm.train.reference import digest_weights
from tests.worlds.ranks import run_ranks


def test_every_file_is_read_by_one_rank(tmp_path: Path):
    model = tmp_path / "hf"
    model.mkdir()
    names = [f"model-{number}.safetensors" for number in range(5)]
    for number, name in enumerate(names):
        (model / name).write_bytes(bytes([number]) * 1000)
    (model / "config.json").write_text("{}")
    alone = digest_weights(model)
    run_ranks(2, "tests.dist.digest_ranks", str(model), str(tmp_path), timeout_s=120)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [found["digest"] for found in ranks] == [alone, alone]
    shares = [found["read"][:3] for found in ranks]
    assert sorted(shares[0] + shares[1]) == sorted([*names, "config.json"])
    # A file that one rank cannot read is told by all of them.
    for found in ranks:
        assert found["problem"] == f"{model / 'config.json'}: No such file or directory"

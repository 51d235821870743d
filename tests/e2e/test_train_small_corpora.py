"""Training on a source of a few documents, and on a corpus that was rebuilt at the same path."""

import json
import shutil
from pathlib import Path

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.build import build
from megatron_medllm.corpus.index import read_index
from megatron_medllm.storage import read_json
from tests.worlds.run import cpt_settings, run_medllm, write_recipe


def build_corpus(world: Path, folder: Path, *, documents: int, repeats: int) -> None:
    """A corpus of short documents in `folder`/corpus, in place of the one there."""
    shutil.rmtree(folder / "corpus", ignore_errors=True)
    rows = [{"text": f"{number}番目の患者は高血圧症と診断された。" * repeats} for number in range(documents)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source, tokenizer = {"paths": str(folder / "*.jsonl")}, str(world / "world" / "tokenizer")
    build(CorpusConfig(sources={"few": source}, tokenizer=tokenizer, eod_id=1), folder / "corpus", workers=1)


def check_ledger(folder: Path) -> None:
    """Every span of the ledger lies within a document of the corpus that is there now."""
    lengths = read_index(folder / "corpus" / "few").lengths
    lines = (folder / "run" / "cpt" / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        for row in json.loads(line)["consumed"]:
            assert sum(length for _, _, _, length in row) == 65
            assert all(offset + length <= lengths[document] for _, document, offset, length in row)


def test_few_documents_train_and_a_rebuilt_corpus_is_another(tiny_world, tmp_path):
    build_corpus(tiny_world, tmp_path, documents=10, repeats=2)
    changes = {"data": [{"path": str(tmp_path / "corpus")}], "train_tokens": 2 * 8 * 64, "loss_after": []}
    recipe = write_recipe(cpt_settings(tiny_world, tmp_path / "run", cpt=changes), tmp_path / "cpt.yaml")
    status, output = run_medllm("train", recipe, timeout_s=250)
    assert status == 0, output
    output = " ".join(output.split())  # the log folds its lines
    assert "few: lost 1 (a validation share that fills no row)" in output
    assert "0 of 10 documents with 0 tokens" in output and "trained without validation of this source" in output
    assert read_json(tmp_path / "run" / "cpt" / "account.json")["subjects"]["few"]["kept"] == 0
    check_ledger(tmp_path)

    status, output = run_medllm("train", recipe, "cpt.validate_every_steps=1", f"run_dir={tmp_path / 'other'}")
    assert status == 2 and "give the split a larger validation share, or set validate_every_steps=0" in output
    assert "Traceback" not in output

    build_corpus(tiny_world, tmp_path, documents=7, repeats=6)
    status, output = run_medllm("train", recipe)
    assert status == 2 and "rows" in output and "Traceback" not in output  # the old checkpoint is of other rows
    shutil.rmtree(tmp_path / "run" / "cpt" / "checkpoints")
    status, output = run_medllm("train", recipe)
    assert status == 0, output
    check_ledger(tmp_path)

"""A changed input redoes what depends on it, and nothing else; and which change it was is said."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.errors import UserError
from megatron_medllm.recipe.inputs import DigestMemory, Input, InputKind, input_digests, input_files
from megatron_medllm.recipe.records import Parts, Record, recipe_parts
from megatron_medllm.recipe.stages import recipe_stages
from tests.worlds.exam import write_exam

TRAINING = {
    "sequence_length": 64,
    "global_batch_size": 2,
    "optimizer": {"lr": 1e-3},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Inputs of every kind, none of which a stage makes."""
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.jsonl").write_text('{"text": "本文"}\n')
    write_exam(tmp_path / "exam")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    for number in (1, 2):
        (tmp_path / "model" / f"model-{number}-of-2.safetensors").write_bytes(bytes(4096))
    return tmp_path


def recipe(place: Path, **changes: object) -> RunConfig:
    settings = {
        "run_dir": str(place / "run"),
        "model": {"path": str(place / "model")},
        "corpora": {
            "medical": {
                "sources": {"medical": {"paths": [str(place / "text" / "*.jsonl")]}},
                "tokenizer": str(place / "model"),
                "eod_id": 0,
            }
        },
        "cpt": {**TRAINING, "data": [{"path": str(place / "run" / "corpus" / "medical")}], "train_tokens": 1000},
        "rpo": {**TRAINING, "pairs": str(place / "pairs.jsonl")},
        "eval": {"exam": {"name": "mine", "data": [str(place / "exam")]}},
        **changes,
    }
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load(path, [])


def parts_of(run: RunConfig) -> dict[str, Parts]:
    stages = recipe_stages(run, Path("config.yaml"))
    memory = DigestMemory(run.run_dir / "digests.json")
    inputs = {stage.name: input_digests(stage.inputs, memory) for stage in stages}
    return recipe_parts(stages, run.model_dump(mode="json"), inputs)


def edit_in_secret(path: Path) -> None:
    """Change a byte, and put size and date back as they were."""
    found = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)


def append_question(place: Path) -> None:
    path = next(path for path in sorted((place / "exam").rglob("*.jsonl")) if "fewshot" not in path.name)
    path.write_text(path.read_text() + "\n")


AFTER_RPO = {"rpo", "eval-rpo", "export", "report"}
CHANGES: dict[str, tuple[Callable[[Path], object], set[str], str]] = {
    "an exam file": (append_question, {"eval-base", "eval-cpt", "eval-rpo", "report"}, "eval-base"),
    "pairs": (lambda place: edit_in_secret(place / "pairs.jsonl"), {"score"} | AFTER_RPO, "score"),
    "a new file of a glob": (
        lambda place: shutil.copy(place / "text" / "a.jsonl", place / "text" / "c.jsonl"),
        {"corpus-medical", "cpt", "eval-cpt", "score"} | AFTER_RPO,
        "corpus-medical",
    ),
    "an edited file of a glob": (
        lambda place: edit_in_secret(place / "text" / "b.jsonl"),
        {"corpus-medical", "cpt", "eval-cpt", "score"} | AFTER_RPO,
        "corpus-medical",
    ),
    "a model's shard": (
        lambda place: edit_in_secret(place / "model" / "model-2-of-2.safetensors"),
        {"eval-base", "cpt", "eval-cpt", "score"} | AFTER_RPO,
        "cpt",
    ),
    "a date": (lambda place: os.utime(place / "model" / "model-1-of-2.safetensors"), set(), ""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_redoes_exactly_its_dependants(place: Path, tmp_path: Path, name: str) -> None:
    change, dependants, first = CHANGES[name]
    run = recipe(place)
    for path in (path for path in place.rglob("*") if path.is_file()):  # as if written a while ago
        os.utime(path, (time.time() - 100, time.time() - 100))
    before = parts_of(run)
    assert parts_of(run) == before
    change(place)
    after = parts_of(run)
    assert {stage for stage in after if after[stage] != before[stage]} == dependants
    if first:
        record = Record(tmp_path / f"{first}.json")
        record.write(before[first], "done", 1.0)
        (said,) = record.changes(after[first])
        assert said.endswith((" changed", " is new")) and str(place) in said
        record = Record(tmp_path / "report.json")
        record.write(before["report"], "done", 1.0)
        assert all(
            phrase.startswith("stage ") and phrase.endswith(" redone") for phrase in record.changes(after["report"])
        )


@pytest.mark.parametrize(
    ("setting", "redone"),
    [
        ({"watch": {"stall_timeout_s": 900}}, set()),
        ({"checkpoint": {"every_steps": 7}, "log_every_steps": 5}, set()),
        ({"guard": {"walltime_s": 60}}, set()),
        ({"guard": {"loss_spike_factor": 3.0}}, AFTER_RPO),
        ({"guard": {"max_margin": 5.0}}, AFTER_RPO),
        ({"filters": {"min_edit_distance": 0.1}}, {"score"} | AFTER_RPO),
        ({"epochs": 2.0}, AFTER_RPO),
    ],
    ids=["watch", "checkpoint", "walltime", "spike factor", "largest margin", "pair filter", "epochs"],
)
def test_what_only_the_run_depends_on_redoes_nothing(place: Path, setting: dict, redone: set[str]) -> None:
    before = parts_of(recipe(place))
    rpo = {**TRAINING, "pairs": str(place / "pairs.jsonl"), **setting}
    after = parts_of(recipe(place, rpo=rpo))
    assert {stage for stage in after if after[stage] != before[stage]} == redone


def test_what_a_stage_makes_is_waited_for_and_not_read(place: Path) -> None:
    run = recipe(place, demo={}, eval={"exam": {"name": "m", "data": [str(place / "run" / "world" / "exam")]}})
    stages = {stage.name: stage for stage in recipe_stages(run, Path("config.yaml"))}
    assert stages["eval-base"].after == ("world",)
    assert [entry.setting for entry in stages["eval-base"].inputs] == ["eval.prompt.template", "model.path"]
    assert stages["cpt"].after == ("corpus-medical",)  # its text is not the world's
    assert stages["score"].after == ("cpt",) and stages["rpo"].after == ("cpt", "score")


def test_the_training_of_a_stage_is_data(place: Path) -> None:
    stages = recipe_stages(recipe(place), Path("config.yaml"))
    assert {stage.name: stage.trains for stage in stages if stage.trains} == {"cpt": "cpt", "rpo": "rpo"}
    assert [stage.arguments[:2] for stage in stages[:3]] == [
        ("corpus", "build"),
        ("eval", "run"),
        ("train", "config.yaml"),
    ]
    assert stages[0].arguments == ("corpus", "build", "--only", "medical", "config.yaml")


def test_a_file_is_read_again_only_when_something_touched_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(1000))
    memory = DigestMemory(tmp_path / "digests.json")
    digest = memory.digests([path])
    assert memory.read_bytes == 1000
    assert memory.digests([path]) == digest and memory.read_bytes == 2000  # too fresh to be trusted
    later = time.time() + 10
    monkeypatch.setattr("megatron_medllm.recipe.inputs.time.time", lambda: later)
    assert memory.digests([path]) == digest and memory.read_bytes == 3000
    again = DigestMemory(tmp_path / "digests.json")
    assert again.digests([path]) == digest and again.read_bytes == 0
    edit_in_secret(path)
    assert again.digests([path]) != digest and again.read_bytes == 1000


def test_a_model_may_be_a_checkpoint_of_another_tool(tmp_path: Path) -> None:
    for name in ("context/model.yaml", "weights/metadata.json", "weights/.metadata", "weights/__0_0.distcp"):
        (tmp_path / "nemo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nemo" / name).write_text("{}")
    found = input_files(Input("model.path", InputKind.MODEL, (str(tmp_path / "nemo"),)))
    names = {str(path.relative_to(tmp_path / "nemo")) for path in found}
    assert names == {"context/model.yaml", "weights/metadata.json", "weights/.metadata", "weights/__0_0.distcp"}


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        (InputKind.FILE, "none.jsonl", "rpo.pairs: .*none.jsonl: no such file"),
        (InputKind.TEXT, "none*.jsonl", "rpo.pairs: .* matches no file"),
        (InputKind.EXAM, "none", "none: no such file or directory"),
        (InputKind.MODEL, "none", "rpo.pairs: .*none: no such directory"),
        (InputKind.CORPUS, "text", "holds no manifest.json"),
        (InputKind.SHOTS, "text", "worked examples"),
    ],
)
def test_a_missing_input_names_the_setting(place: Path, kind: InputKind, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        input_files(Input("rpo.pairs", kind, (str(place / path),)))


def test_names_that_are_no_paths_are_left_to_the_settings(place: Path) -> None:
    for kind in (InputKind.TOKENIZER, InputKind.FOLDER):
        assert input_files(Input("tokenizer", kind, ("Qwen/Qwen2.5-7B",))) == []
    assert len(input_files(Input("eval.prompt.template", InputKind.FOLDER, (str(place / "text"),)))) == 2
    tokenizer = place / "model" / "tokenizer.json"
    for path in (tokenizer, tokenizer.parent):
        assert input_files(Input("tokenizer", InputKind.TOKENIZER, (str(path),))) == [tokenizer]


def test_a_built_corpus_counts_by_its_manifest_and_sizes(place: Path) -> None:
    folder = place / "built"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "a.bin").write_bytes(b"1234")
    entry = Input("cpt.data", InputKind.CORPUS, (str(folder),))
    found = input_digests([entry], DigestMemory(place / "digests.json"))
    assert found[str(folder / "a.bin")] == "4 bytes" and set(found) == {
        str(folder / n) for n in ("a.bin", "manifest.json")
    }

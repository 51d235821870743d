"""A finished run is released, verified, damaged byte by byte, and refused where it should be."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from megatron_medllm.cli.app import app
from megatron_medllm.errors import UserError
from megatron_medllm.release.verify import verify_release
from megatron_medllm.release.write import ReleaseOptions, write_release
from megatron_medllm.storage import read_json, write_json
from tests.worlds.run import run_medllm, small_recipe, write_recipe

STAGES = ("recipe", "text", "corpus", "checkpoint base", "checkpoint cpt", "pairs", "reference", "model", "exam")


@pytest.fixture(scope="module")
def finished(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose medical text lies outside of it, as a hospital's would."""
    directory = tmp_path_factory.mktemp("release")
    text = directory / "hospital" / "medical.jsonl"
    text.parent.mkdir()
    shutil.copyfile(tiny_world / "world" / "medical.jsonl", text)
    settings = small_recipe(directory / "run")
    settings["corpora"]["medical"]["sources"]["medical"] |= {"paths": str(text), "licence": "cc-by-nc-4.0"}
    settings["corpora"]["medical"]["decontaminate"] = {"exams": str(directory / "run" / "world" / "exam")}
    status, output = run_medllm("pipeline", write_recipe(settings, directory / "recipe.yaml"), timeout_s=550)
    assert status == 0, output
    return directory / "run"


@pytest.fixture(scope="module")
def released(finished: Path) -> Path:
    """Its release."""
    target = finished.parent / "out" / "tiny-medical"
    write_release(finished, target, ReleaseOptions(hardware="two cores", source_licences={"miniature": "cc0-1.0"}))
    return target


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The run, to be spoiled; its text outside stays where it is."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path, position: int) -> None:
    """Change one bit of one byte. Not in place: a release's weights are hard links."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    changed = path.with_name(f"{path.name}.changed")
    changed.write_bytes(data)
    os.replace(changed, path)


def stage_of(provenance: dict, label: str) -> str:
    return next(part["stage"] for part in provenance["chain"] if label in part["files"])


def test_the_chain_goes_from_the_text_to_the_exam_and_holds(finished: Path, released: Path) -> None:
    provenance = read_json(released / "provenance.json")
    assert tuple(part["stage"] for part in provenance["chain"]) == STAGES
    labels = {part["stage"]: set(part["files"]) for part in provenance["chain"]}
    assert any(label.endswith("/medical.jsonl") and label.startswith("outside/") for label in labels["text"])
    assert "hospital" not in (released / "provenance.json").read_text()  # no path of the hospital's
    assert {"pairs/pairs.jsonl", "pairs/manifest.json"} <= labels["pairs"]
    assert {"reference/key.json", "reference/part-00000.parquet"} <= labels["reference"]
    assert {"rpo/hf/model.safetensors", "rpo/hf/config.json"} <= labels["model"]
    assert {"eval/rpo/results.jsonl", "world/exam/questions.jsonl"} <= labels["exam"]
    assert provenance["not_compared"] == []
    found = verify_release(released, finished)
    assert found.wrong == () and found.files > 70
    assert found.lines()[0].startswith(f"verified: {found.files} files of recipe, text, corpus")


def test_thirty_flipped_bytes_are_found_and_their_stage_is_named(finished: Path, released: Path) -> None:
    """Each place is chosen at random over all stages, the release's own files among them, then mended again."""
    provenance, chance = read_json(released / "provenance.json"), random.Random(18)
    outside = finished.parent / "hospital" / "medical.jsonl"
    places = [
        (part["stage"], outside if label.startswith("outside/") else finished / label)
        for part in provenance["chain"]
        for label in part["files"]
    ]
    places += [("release", path) for path in sorted(released.iterdir())]
    stages = list(dict.fromkeys(stage for stage, _ in places))
    assert len(stages) == len(STAGES) + 1
    for number in range(30):
        stage = stages[number % len(stages)]
        path = chance.choice([path for name, path in places if name == stage and path.stat().st_size])
        before = path.read_bytes()
        position = chance.randrange(len(before))
        flip(path, position)
        found = verify_release(released, finished)
        assert found.wrong and found.wrong[0][0] == stage, f"{path} at {position}: {found.lines()}"
        assert found.lines()[0] == f"does not match: stage {stage}"
        path.write_bytes(before) if path != finished / "rpo/hf/model.safetensors" else _mend(path, before)
    assert verify_release(released, finished).wrong == ()


def _mend(path: Path, before: bytes) -> None:
    """As it was, and no longer one file with the release's."""
    path.unlink()
    path.write_bytes(before)


def test_a_file_that_is_gone_and_a_stray_one_are_named(copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "release"
    write_release(copied, target, ReleaseOptions())
    (copied / "pairs" / "pairs.jsonl").unlink()
    (target / "extra.safetensors").write_bytes(b"x")
    wrong = verify_release(target, copied).wrong
    assert wrong == (
        ("pairs", "pairs/pairs.jsonl is missing"),
        ("release", "extra.safetensors is no part of the release"),
    )


def test_the_release_is_a_model_that_ends_where_it_should(finished: Path, released: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(released)
    tokenizer = AutoTokenizer.from_pretrained(released)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    weights = released / "model.safetensors"
    assert weights.read_bytes() == (finished / "rpo" / "hf" / "model.safetensors").read_bytes()
    assert "python" not in (released / "generation_config.json").read_text()


def test_the_card_is_read_by_the_hubs_own_parser(finished: Path, released: Path) -> None:
    card = ModelCard.load(released / "README.md", ignore_metadata_errors=False)
    summary = read_json(finished / "eval" / "rpo" / "summary.json")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["accuracy, explained"] == pytest.approx(summary["modes"]["explained"]["accuracy"], abs=1e-4)
    assert len(results) == 3 and card.data.eval_results[0].dataset_name == "miniature"
    assert card.data.model_name == "tiny-medical" and card.data.pipeline_tag == "text-generation"
    assert card.data.language == ["ja"] and "license" not in card.data.to_dict()
    assert {"medical", "preference-optimization", "rpo"} <= set(card.data.tags)
    text = card.text
    assert "no medical device" in text and "医療機器ではありません" in text
    assert "| medical | medical | cc-by-nc-4.0 | 300 |" in text
    assert "These licences restrict use, perhaps that of this model too: medical (cc-by-nc-4.0)." in text
    assert "| preference pairs | miniature | cc0-1.0 |" in text
    assert "The licence of base was not stated" in text
    assert "corpus base: NOT checked" in text and "corpus medical: checked against 1 places" in text
    assert "preference pairs: checked against the exam" in text
    assert "Stability gap" in text and "Hardware: two cores." in text
    assert read_json(released / "provenance.json")["chain_digest"] in text


def test_a_given_base_is_part_of_the_chain_and_its_licence_binds(copied: Path, tmp_path: Path) -> None:
    """A run that began with somebody's model: `model.path` outside of the run."""
    base = Path(shutil.copytree(copied / "base" / "hf", tmp_path / "hospital" / "their-model"))
    recipe = yaml.safe_load((copied / "run.yaml").read_text())
    recipe["model"] |= {"path": str(base), "shape": None, "size": None}
    (copied / "run.yaml").write_text(yaml.safe_dump(recipe | {"base": None}))
    target = tmp_path / "out"
    with pytest.raises(UserError, match="licence of the base model their-model is not known"):
        write_release(copied, target, ReleaseOptions(licence="apache-2.0"))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    with pytest.raises(UserError, match="their-model is under qwen-research"):
        write_release(copied, target, ReleaseOptions(licence="apache-2.0"))
    with pytest.raises(UserError, match="qwen-research asks for a copy"):
        write_release(copied, target, ReleaseOptions())
    assert not target.exists()
    (base / "LICENSE").write_text("Qwen RESEARCH LICENSE AGREEMENT")
    assert write_release(copied, target, ReleaseOptions(base_model="A/B")).licence == "qwen-research"
    assert (target / "LICENSE").read_text() == "Qwen RESEARCH LICENSE AGREEMENT"
    assert "Alibaba Cloud" in (target / "NOTICE").read_text()
    card = ModelCard.load(target / "README.md")
    assert (
        card.data.to_dict().items()
        >= {"license": "other", "license_name": "qwen-research", "base_model": "A/B"}.items()
    )
    assert "Improved using Qwen" in card.text
    part = read_json(target / "provenance.json")["chain"][1]
    assert part["stage"] == "base model" and any(label.endswith("/model.safetensors") for label in part["files"])
    assert verify_release(target, copied).wrong == ()
    flip(base / "model.safetensors", 1000)
    assert verify_release(target, copied).wrong[0][0] == "base model"


def test_the_exported_steps_checkpoint_is_the_chains(copied: Path, tmp_path: Path) -> None:
    """The best step's, not the newest; and the card says so."""
    newest = next((copied / "rpo" / "checkpoints").iterdir())
    best = newest.with_name("step-00000001")
    shutil.copytree(newest, best)
    row = {"step": 1, "ended": int(newest.name.removeprefix("step-")), "metric": "validation_loss", "value": 0.5}
    write_json(copied / "rpo" / "exported.json", row)
    write_release(copied, tmp_path / "best", ReleaseOptions())
    files = read_json(tmp_path / "best" / "provenance.json")["chain"][STAGES.index("model")]["files"]
    folders = {label.split("/")[2] for label in files if label.startswith("rpo/checkpoints/")}
    assert folders == {"step-00000001"} and "rpo/exported.json" in files
    assert "| exported step | – | – | 1, the best by validation_loss |" in (tmp_path / "best" / "README.md").read_text()
    shutil.rmtree(best)  # pruned: the chain does without, and does not take another step's for it
    write_release(copied, tmp_path / "pruned", ReleaseOptions())
    assert "rpo/checkpoints" not in (tmp_path / "pruned" / "provenance.json").read_text()


def test_another_stage_may_be_chosen(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "cpt"
    assert write_release(finished, target, ReleaseOptions(stage="cpt")).model == "cpt"
    stages = [part["stage"] for part in read_json(target / "provenance.json")["chain"]]
    assert stages == ["recipe", "text", "corpus", "checkpoint base", "model", "exam"]
    assert verify_release(target, finished).wrong == ()


def _spoil_exam(run: Path) -> None:
    shutil.rmtree(run / "eval" / "rpo")


def _spoil_reference(run: Path) -> None:
    shutil.rmtree(run / "reference")


def _spoil_record(run: Path) -> None:
    (run / "stages" / "pairs.json").unlink()


def _spoil_order(run: Path) -> None:
    record = read_json(run / "stages" / "cpt.json")
    write_json(run / "stages" / "cpt.json", record | {"key": "0" * 64})


def _spoil_pairs(run: Path) -> None:
    path = run / "pairs" / "pairs.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def _spoil_start(run: Path) -> None:
    """Another model where preference training started: its pairs were not sampled from it."""
    flip(run / "cpt" / "hf" / "model.safetensors", -1)


def _spoil_model(run: Path) -> None:
    flip(run / "rpo" / "hf" / "model.safetensors", -1)


def _spoil_weights(run: Path) -> None:
    """A damage before the exam: all digests of whole files agree."""
    from megatron_medllm.inference.model_files import model_digest

    _spoil_model(run)
    path = run / "eval" / "rpo" / "summary.json"
    summary = read_json(path)
    summary["provenance"]["model_digest"] = model_digest(run / "rpo" / "hf")
    write_json(path, summary)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_exam, "its model 'rpo' has not sat an exam"),
        (_spoil_reference, "chain: stage reference is missing"),
        (_spoil_record, "chain: stage pairs is missing"),
        (_spoil_order, "was made before cpt was redone"),
        (_spoil_pairs, "chain: stage pairs: pairs.jsonl is not what its manifest.json describes"),
        (_spoil_start, "chain: stage pairs was sampled from another model"),
        (_spoil_model, "chain: stage exam was sat by another model"),
        (_spoil_weights, "does not match its digest: a damaged file"),
    ],
    ids=lambda value: value.__name__.removeprefix("_spoil_") if callable(value) else "",
)
def test_a_broken_chain_is_named_and_nothing_is_left(copied: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(copied)
    with pytest.raises(UserError, match=message) as raised:
        write_release(copied, tmp_path / "out" / "model", ReleaseOptions())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_wrongly_is_refused(finished: Path, released: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for options, message in [
        (ReleaseOptions(stage="rpo-2"), "--stage rpo-2: .* has no such model .there are: base, cpt, rpo."),
        (ReleaseOptions(source_licences={"moon": "mit"}), "--source-licence moon: no such source or exam"),
        (ReleaseOptions(base_licence="mit"), "this run began with random weights"),
        (ReleaseOptions(licence="not a licence"), "expected an id such as apache-2.0"),
        (ReleaseOptions(licence_file=tmp_path / "none"), "--licence-file .*none: no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            write_release(finished, target, options)
    with pytest.raises(UserError, match="already exists"):
        write_release(finished, released, ReleaseOptions())
    with pytest.raises(UserError, match=r"holds no run\.yaml"):
        write_release(tmp_path, target, ReleaseOptions())
    with pytest.raises(UserError, match=r"holds no provenance\.json"):
        verify_release(finished, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(UserError, match="no space left"):
        write_release(finished, tmp_path / "out", ReleaseOptions())
    assert list(tmp_path.iterdir()) == []


def test_without_hard_links_the_weights_are_copied(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    write_release(finished, tmp_path / "out", ReleaseOptions())
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1
    assert verify_release(tmp_path / "out", finished).wrong == ()


def test_from_the_command_line(finished: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["release", *map(str, arguments)], catch_exceptions=False)
        return result.exit_code, result.output

    target = tmp_path / "model"
    status, output = run("--licence", "apache-2.0", "--source-licence", "base=mit", finished, target)
    assert status == 0 and "model rpo, licence apache-2.0" in output
    assert "licences of sources that restrict use: medical (cc-by-nc-4.0)" in output
    assert (target / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert ModelCard.load(target / "README.md").data.license == "apache-2.0"
    status, output = run("verify", target, "--run", finished)
    assert status == 0 and output.startswith("verified: ")
    flip(target / "README.md", 100)
    status, output = run("verify", target)
    assert status == 1 and output.startswith("does not match: stage release")
    assert json.loads((target / "provenance.json").read_text())["model"] == "rpo"

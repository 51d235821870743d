"""Which licence a release may stand under: its base's, told by size, by the hub's README, or by the user."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData

from megatron_medllm.config.model import SIZES
from megatron_medllm.errors import UserError
from megatron_medllm.release.licences import base_model, choose, licence_named, licence_text, restricts


def model(folder: Path, size: str | None = None, *, card: str | None = None, **config: object) -> Path:
    """A model directory with a config.json of one of Qwen2.5's sizes, and the hub's README.md."""
    folder.mkdir(parents=True)
    if size is not None:
        shape = SIZES[size]
        config |= {"model_type": "qwen2", "num_hidden_layers": shape.num_layers, "hidden_size": shape.hidden_size}
        config["intermediate_size"] = shape.ffn_hidden_size
    (folder / "config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    return folder


# The published licences: https://huggingface.co/Qwen, September 2024.
@pytest.mark.parametrize(
    ("size", "licence"),
    [
        ("0.5b", "apache-2.0"),
        ("1.5b", "apache-2.0"),
        ("3b", "qwen-research"),
        ("7b", "apache-2.0"),
        ("14b", "apache-2.0"),
        ("32b", "apache-2.0"),
        ("72b", "qwen"),
    ],
)
def test_qwens_licence_goes_by_the_size_whatever_the_folder_is_called(tmp_path: Path, size: str, licence: str) -> None:
    base = base_model(model(tmp_path / "our-copy", size), hub_id=None, licence=None)
    assert base.licence is not None and base.licence.identifier == licence
    assert base.hub_id is None and base.name == "our-copy"
    found = choose(base, None)
    assert found == base.licence
    metadata = ModelCardData(**found.metadata()).to_dict()
    if licence == "apache-2.0":
        assert metadata == {"license": "apache-2.0"}
    else:
        link = f"https://huggingface.co/Qwen/Qwen2.5-{size.upper()}/blob/main/LICENSE"
        assert metadata == {"license": "other", "license_name": licence, "license_link": link}
        assert found.notice is not None and "Alibaba Cloud" in found.notice


@pytest.mark.parametrize(
    ("folder", "size", "hub_id"),
    [
        ("Qwen2.5-3B", "3b", "Qwen/Qwen2.5-3B"),
        ("qwen2.5-72b-instruct", "72b", "Qwen/Qwen2.5-72B-Instruct"),
        ("Qwen2.5-7B", "3b", None),  # a wrong name
        ("models--Someone--Their-Qwen/snapshots/0a1b", "7b", "Someone/Their-Qwen"),
    ],
)
def test_the_hubs_name_is_told_where_it_is_sure(tmp_path: Path, folder: str, size: str, hub_id: str | None) -> None:
    base = base_model(model(tmp_path / folder, size), hub_id=None, licence=None)
    assert base.hub_id == hub_id
    assert base_model(tmp_path / folder, hub_id="A/B", licence=None).hub_id == "A/B"


def test_qwen3_is_under_apache(tmp_path: Path) -> None:
    directory = model(
        tmp_path / "Qwen3-4B-Base", model_type="qwen3", num_hidden_layers=36, hidden_size=2560, intermediate_size=9728
    )
    base = base_model(directory, hub_id=None, licence=None)
    assert base.licence == licence_named("apache-2.0") and base.hub_id == "Qwen/Qwen3-4B-Base"


def test_the_hubs_readme_says_what_no_table_knows(tmp_path: Path) -> None:
    mine = model(tmp_path / "a", model_type="qwen2", card="license: mit\nlanguage: ja")
    assert base_model(mine, hub_id=None, licence=None).licence == licence_named("mit")
    custom = model(
        tmp_path / "b",
        model_type="qwen2",
        card="license: other\nlicense_name: tongyi-qianwen\nlicense_link: https://example.org/LICENSE",
    )
    licence = base_model(custom, hub_id=None, licence=None).licence
    assert licence is not None and licence.metadata() == {
        "license": "other",
        "license_name": "tongyi-qianwen",
        "license_link": "https://example.org/LICENSE",
    }
    for card in ("license: other", "license: [a, b]", "- a list", "tags: [x]"):
        unclear = model(tmp_path / card.replace(" ", "").replace(":", ""), model_type="qwen2", card=card)
        assert base_model(unclear, hub_id=None, licence=None).licence is None
    with pytest.raises(UserError, match=r"README\.md"):
        base_model(model(tmp_path / "c", card="license: [", model_type="qwen2"), hub_id=None, licence=None)


def test_a_fine_tune_cannot_make_a_size_freer(tmp_path: Path) -> None:
    """Many models made from 3B call themselves Apache-2.0."""
    directory = model(tmp_path / "tuned", "3b", card="license: apache-2.0")
    licence = base_model(directory, hub_id=None, licence=None).licence
    assert licence is not None and licence.identifier == "qwen-research"
    with pytest.raises(UserError, match=r"--base-licence apache-2.0: .* under qwen-research"):
        base_model(directory, hub_id=None, licence="apache-2.0")
    told = base_model(directory, hub_id=None, licence="qwen-research").licence
    assert told is not None and told.link == "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE"
    stricter = model(tmp_path / "nc", "7b", card="license: cc-by-nc-4.0")
    licence = base_model(stricter, hub_id=None, licence=None).licence
    assert licence is not None and licence.identifier == "cc-by-nc-4.0"


@pytest.mark.parametrize("size", ["3b", "72b"])
def test_what_the_base_forbids_is_refused(tmp_path: Path, size: str) -> None:
    base = base_model(model(tmp_path / "base", size), hub_id=None, licence=None)
    with pytest.raises(UserError, match=r"--licence apache-2.0: the base model base is under qwen") as raised:
        choose(base, "apache-2.0")
    assert "\n" not in str(raised.value)
    assert base.licence is not None and choose(base, base.licence.identifier) == base.licence


def test_an_unknown_licence_is_refused_until_it_is_said(tmp_path: Path) -> None:
    directory = model(tmp_path / "base", model_type="qwen2", num_hidden_layers=2)
    for asked in (None, "apache-2.0"):
        with pytest.raises(UserError, match="licence of the base model base is not known: say it with --base-licence"):
            choose(base_model(directory, hub_id=None, licence=None), asked)
    told = base_model(directory, hub_id=None, licence="mit")
    assert choose(told, "cc-by-4.0") == licence_named("cc-by-4.0")
    assert choose(told, None) == licence_named("mit")


def test_a_free_base_lets_its_user_choose(tmp_path: Path) -> None:
    base = base_model(model(tmp_path / "base", "7b"), hub_id=None, licence=None)
    assert choose(base, "cc-by-nc-sa-4.0") == licence_named("cc-by-nc-sa-4.0")
    assert choose(None, None) is None and choose(None, "mit") == licence_named("mit")


def test_an_agreement_travels_with_the_model(tmp_path: Path) -> None:
    directory = model(tmp_path / "base", "72b")
    base = base_model(directory, hub_id=None, licence=None)
    with pytest.raises(UserError, match=r"qwen asks for a copy .* --licence-file .from https://huggingface.co/Qwen/"):
        licence_text(base.licence, base, None)
    given = tmp_path / "agreement"
    given.write_text("given")
    assert licence_text(base.licence, base, given) == b"given"
    (directory / "LICENSE").write_text("Qwen LICENSE AGREEMENT")
    assert licence_text(base.licence, base, None) == b"Qwen LICENSE AGREEMENT"
    apache = licence_text(licence_named("apache-2.0"), None, None)
    assert apache is not None and b"Apache License" in apache and len(apache) > 11_000
    assert licence_text(licence_named("mit"), base, None) is None  # another licence than the base's text
    assert licence_text(None, None, None) is None


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("CC BY-ND 4.0", True),
        ("cc_by_nc_sa", True),
        ("for research only", True),
        ("研究目的に限る", True),
        ("apache-2.0", False),
        ("cc-by-sa-4.0", False),
        ("not stated", False),
        ("public domain", False),
        ("advance-nce", False),
    ],
)
def test_restrictions_are_read_from_a_sources_licence(licence: str, expected: bool) -> None:
    assert restricts(licence) is expected

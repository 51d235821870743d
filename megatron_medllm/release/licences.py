"""Under which licence a model may be passed on: its base's, which for Qwen depends on the size.

Qwen2.5 of 0.5B, 1.5B, 7B, 14B and 32B, and the dense Qwen3 models, are under Apache-2.0. Qwen2.5 of 3B is under the
Qwen RESEARCH LICENSE AGREEMENT (`qwen-research` on the hub: no commercial use), that of 72B under the Qwen LICENSE
AGREEMENT (`qwen`). The hub files both as `license: other` with `license_name` and `license_link`. Both ask for a copy
of the agreement, a NOTICE, and "Built with Qwen" or "Improved using Qwen" in the documentation.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_medllm.config.families import FAMILIES
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

_HUB = "https://huggingface.co/"
_APACHE_TEXT = Path(__file__).with_name("apache-2.0.txt")
# Ids of the hub whose terms let a derived model stand under any other licence.
_PERMISSIVE = ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "unlicense", "isc")
_RESTRICTED = re.compile(
    r"(?i)\b(nc|nd|non-?commercial|no-?derivatives?|research|academic|非営利|非商用|研究)\b|研究目的"
)


@dataclass(frozen=True)
class Licence:
    """A licence as the hub names it: `identifier` goes to `license`, or is a `license_name` under `other`."""

    identifier: str
    title: str
    link: str | None = None
    notice: str | None = None
    is_custom: bool = False  # no id of the hub's list

    @property
    def is_permissive(self) -> bool:
        """Whether what is derived may stand under another licence."""
        return self.identifier in _PERMISSIVE

    def metadata(self) -> dict[str, str]:
        """The keys of a model card."""
        if not self.is_custom:
            return {"license": self.identifier}
        link = {"license_link": self.link} if self.link else {"license_link": "LICENSE"}
        return {"license": "other", "license_name": self.identifier, **link}


APACHE = Licence("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0")
QWEN_RESEARCH = Licence(
    "qwen-research",
    "Qwen RESEARCH LICENSE AGREEMENT (no commercial use)",
    notice="Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. "
    "All Rights Reserved.",
    is_custom=True,
)
QWEN = Licence(
    "qwen",
    "Qwen LICENSE AGREEMENT",
    notice="Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
    is_custom=True,
)
_OF_SIZE = {"Qwen2.5-3B": QWEN_RESEARCH, "Qwen2.5-72B": QWEN}
_MINIATURE = "mini"  # a size of ours, published by nobody


@dataclass(frozen=True)
class BaseModel:
    """What a run started from. `name` is an id of the hub where one is known, else the folder's name."""

    name: str
    hub_id: str | None
    licence: Licence | None
    directory: Path


def base_model(directory: Path, *, hub_id: str | None, licence: str | None) -> BaseModel:
    """Find out what a model directory is, and its licence.

    A published size's own licence counts where it is stricter than what somebody's README says. A licence that the user
    states is believed, unless the size says otherwise.

    Args:
        directory: the HF directory or checkpoint that `model.path` named.
        hub_id: the user's word for what it is.
        licence: the user's word for its licence.

    Raises:
        UserError: the user's word contradicts the size.
    """
    found = hub_id or _hub_id(directory)
    published = _published(directory, found)
    told = None if licence is None else licence_named(licence)
    written = told or _card_licence(directory)
    same = written is not None and published is not None and written.identifier == published.identifier
    chosen = published if same else written or published  # ours has the link and the notice
    if published is not None and not published.is_permissive and (written is None or written.is_permissive):
        if told is not None:
            raise UserError(
                f"--base-licence {licence}: {directory} has the size of a model under {published.identifier} "
                f"({published.title})"
            )
        chosen = published
    return BaseModel(found or directory.name, found, chosen, directory)


def choose(base: BaseModel | None, asked: str | None) -> Licence | None:
    """The release's licence; None for a model of the user's own whose licence was not stated.

    Raises:
        UserError: the base's licence is unknown, or does not allow what is asked.
    """
    wanted = None if asked is None else licence_named(asked)
    if base is None:
        return wanted
    if base.licence is None:
        raise UserError(
            f"the licence of the base model {base.name} is not known: say it with --base-licence, "
            f"or keep the README.md of the hub in {base.directory}"
        )
    if wanted is None or wanted.identifier == base.licence.identifier:
        return base.licence
    if not base.licence.is_permissive:
        raise UserError(
            f"--licence {asked}: the base model {base.name} is under {base.licence.identifier} "
            f"({base.licence.title}), which binds what is derived from it"
        )
    return wanted


def licence_named(identifier: str) -> Licence:
    """A licence by what the hub calls it."""
    known = {licence.identifier: licence for licence in (APACHE, QWEN, QWEN_RESEARCH)}
    name = identifier.strip().lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UserError(f"licence {identifier!r}: expected an id such as apache-2.0, cc-by-4.0 or qwen-research")
    return known.get(name, Licence(name, identifier.strip()))


def licence_text(licence: Licence | None, base: BaseModel | None, given: Path | None) -> bytes | None:
    """The text for the file LICENSE: the user's, the one beside the base model, or Apache's.

    Raises:
        UserError: it cannot be read, or an agreement that asks for a copy is not at hand.
    """
    if given is not None:
        if not given.is_file():
            raise UserError(f"--licence-file {given}: no such file")
        return given.read_bytes()
    if licence is None:
        return None
    if licence == APACHE:
        return _APACHE_TEXT.read_bytes()
    if base is not None and base.licence is not None and licence.identifier == base.licence.identifier:
        beside = [base.directory / name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md")]
        text = next((path.read_bytes() for path in beside if path.is_file()), None)
        if text is not None:
            return text
    if licence.is_custom:
        where = f" (from {licence.link})" if licence.link else ""
        raise UserError(
            f"{licence.identifier} asks for a copy of it with every copy of the model: give --licence-file{where}"
        )
    return None


def restricts(licence: str) -> bool:
    """Whether a data source's licence reads as one that restricts what is made of it."""
    return bool(_RESTRICTED.search(licence.replace("_", "-")))


def _hub_id(directory: Path) -> str | None:
    """The hub's name of a directory: from its cache's layout, or from a name that only Qwen's own models bear."""
    for part in directory.absolute().parts:
        if part.startswith("models--") and part.count("--") == 2:
            return "/".join(part.split("--")[1:])
    size = _published_size(_config(directory))
    if size is not None:
        found = re.fullmatch(rf"(?i){re.escape(size)}(-instruct|-base)?", directory.name)
        if found is not None:
            return f"Qwen/{size}{(found.group(1) or '').title()}"
    return None


def _published(directory: Path, hub_id: str | None) -> Licence | None:
    size = _published_size(_config(directory))
    if size is None:
        return None
    licence = _OF_SIZE.get(size, APACHE)
    name = hub_id if hub_id is not None and hub_id.startswith("Qwen/") else f"Qwen/{size}"
    return replace(licence, link=f"{_HUB}{name}/blob/main/LICENSE") if licence.is_custom else licence


def _published_size(config: dict[str, Any]) -> str | None:
    """`Qwen2.5-7B`: the published size that a config.json has, whatever its name; None for any other model."""
    family = FAMILIES.get(str(config.get("model_type")))
    found = tuple(config.get(key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    if family is None:
        return None
    for name, size in family.sizes.items():
        if name != _MINIATURE and (size.layers, size.hidden, size.ffn) == found:
            return f"{family.name}-{name.rpartition('-')[2].upper()}"
    return None


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _card_licence(directory: Path) -> Licence | None:
    """What the README.md of the hub says in its metadata block."""
    path = directory / "README.md"
    block = (
        re.match(r"\s*---\r?\n(.*?)\r?\n---", path.read_text("utf-8", "replace"), re.DOTALL) if path.is_file() else None
    )
    if block is None:
        return None
    try:
        metadata = yaml.safe_load(block.group(1))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    given = metadata.get("license") if isinstance(metadata, dict) else None
    if not isinstance(given, str):
        return None
    if given != "other":
        return licence_named(given)
    name, link = metadata.get("license_name"), metadata.get("license_link")
    if not isinstance(name, str):
        return None
    known = licence_named(name)
    return replace(known, is_custom=True, link=link if isinstance(link, str) else known.link)

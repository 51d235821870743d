"""`medllm examples`: the recipes that come with the package."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from megatron_medllm.cli.options import print_text
from megatron_medllm.errors import UserError
from megatron_medllm.shipped import shipped


def examples(
    name: Annotated[str | None, typer.Argument(help="copy this recipe; without it, list them")] = None,
    target: Annotated[Path, typer.Argument(help="file or folder to copy to")] = Path("."),
) -> None:
    """List the example recipes, or copy one to start from."""
    found = {path.stem: path for path in sorted(shipped("examples").glob("*.yaml"))}
    if name is None:
        for stem, path in found.items():
            print_text(f"{stem:<42} {_first_comment(path)}")
        return
    source = found.get(name.removesuffix(".yaml"))
    if source is None:
        raise UserError(f"no example {name!r}; there are: {', '.join(found)}")
    copy = target / source.name if target.is_dir() else target
    if copy.exists():
        raise UserError(f"{copy}: exists already; name another file")
    shutil.copyfile(source, copy)
    print_text(str(copy))


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""

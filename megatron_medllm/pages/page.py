"""A page from a template, with links to the other pages of the same run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_medllm.pages import numbers
from megatron_medllm.storage import atomic_write

_DEEPEST = 3  # folders between a run directory and a page in it

# Pages that a run may hold: pattern, and what it is called
_KINDS = (
    ("report.html", "Run report"),
    ("corpus/*/summary.html", "Corpus"),
    ("pairs*/report.html", "Preference pairs"),
    ("eval/*/report.html", "Exam"),
    ("bench/*.html", "Benchmark"),
    ("plan*.html", "Plan"),
    ("release*/card.html", "Release"),
)


@dataclass(frozen=True, slots=True)
class Link:
    """A page of the same run, as the current one links to it."""

    title: str
    href: str


def write_page(path: Path, package: str, template: str, **values: Any) -> None:
    """Render `template` of `package` (a dotted name) and write it to `path`.

    The template extends base.html.jinja and finds `links`, the other pages of the run that `path` belongs to.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("megatron_medllm.pages", ".")]),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "rate": numbers.rate,
        "signed": numbers.signed,
        "difference": numbers.difference,
        "count": numbers.count,
        "seconds": numbers.seconds_text,
        "passed": numbers.passed_text,
        "svg": Markup,
    }
    page = environment.get_template(template).render(links=run_links(path), **values)
    with atomic_write(path) as stream:
        stream.write(page.encode())


def run_links(page: Path) -> list[Link]:
    """The other pages of the run that `page` lies in: its report first, whether or not that has been written yet.

    Empty for a page that belongs to no run (no folder above it holds a run.yaml).
    """
    run_dir = next((folder for folder in list(page.resolve().parents)[: _DEEPEST + 1] if _is_run(folder)), None)
    if run_dir is None:
        return []
    found = {run_dir / "report.html": "Run report"}
    for pattern, kind in _KINDS[1:]:
        for path in sorted(run_dir.glob(pattern)):
            name = path.stem if path.parent.name == "bench" or path.parent == run_dir else path.parent.name
            found[path] = kind if name in ("pairs", "plan", "release") else f"{kind}: {name}"
    return [
        Link(title, os.path.relpath(path, page.resolve().parent))
        for path, title in found.items()
        if path != page.resolve()
    ]


def _is_run(folder: Path) -> bool:
    return (folder / "run.yaml").is_file()


def rows_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of a flat mapping, for a two-column table: underscores as spaces, one decimal of a float."""
    return [
        (name.replace("_", " "), f"{value:.1f}" if isinstance(value, float) else str(value))
        for name, value in values.items()
    ]

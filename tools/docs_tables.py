"""Rewrite the documentation's blocks that commands printed, so that they cannot go stale.

python tools/docs_tables.py              rerun every command of docs/tables.toml, rewrite its block
python tools/docs_tables.py --check      rewrite nothing; exit status 1 where a block is stale (slow ones left out)
python tools/docs_tables.py plan-7b ...  these alone
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "docs" / "tables.toml"
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Table:
    """One block of one page; the fields are those of docs/tables.toml."""

    name: str
    page: str
    command: str = ""
    kind: str = "command"
    first: str | None = None
    last: str | None = None
    lines: int | None = None
    strip: str | None = None
    slow: bool = False

    def block(self) -> str:
        """What belongs between the markers, without them."""
        if self.kind == "commands":
            return commands_table()
        printed = "\n".join(self._kept(run(self.command).splitlines())).rstrip()
        return f"```\n$ {self.command}\n{printed}\n```"

    def _kept(self, printed: list[str]) -> list[str]:
        printed = [re.sub(self.strip or "(?!)", "", line).rstrip() for line in printed]
        start = _line_with(printed, self.first, self.name) if self.first is not None else 0
        stop = start + _line_with(printed[start:], self.last, self.name) + 1 if self.last is not None else len(printed)
        kept = printed[start:stop]
        return kept if self.lines is None else kept[: self.lines]


def _line_with(printed: list[str], beginning: str, name: str) -> int:
    for number, line in enumerate(printed):
        if line.startswith(beginning):
            return number
    raise ValueError(f"table {name}: the command printed no line that starts with {beginning!r}")


def run(command: str) -> str:
    """What a command prints on standard output; `medllm` is this checkout's.

    Raises:
        RuntimeError: it failed; says what it printed on standard error.
    """
    program, *arguments = shlex.split(command)
    start = [sys.executable, "-m", "megatron_medllm"] if program == "medllm" else [program]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    plain = {"PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", "MAKEFLAGS": "", "MAKELEVEL": ""}
    done = subprocess.run(
        [*start, *arguments],
        cwd=ROOT,
        env=os.environ | plain,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: exit status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def commands_table() -> str:
    """Every command of `medllm` with its first sentence, groups spelled out."""
    import typer.main

    from megatron_medllm.cli.app import app

    group: Any = typer.main.get_command(app)
    rows = ["| command | what it does |", "|---|---|"]
    for name, command in group.commands.items():
        parts = getattr(command, "commands", None)
        for part, inner in parts.items() if parts else [("", command)]:
            text = " ".join((inner.help or "").split()).replace("|", "\\|")
            rows.append(f"| `{f'medllm {name} {part}'.strip()}` | {text} |")
    return "\n".join(rows)


def read_tables() -> list[Table]:
    """The tables of docs/tables.toml, in its order."""
    return [Table(name=name, **fields) for name, fields in tomllib.loads(CONFIG.read_text()).items()]


def with_block(text: str, name: str, block: str) -> str:
    """`text` with the block of this name replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"table {name}: its markers must stand on its page once each")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{block}\n{end}{after}"


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tables of docs/tables.toml; default: all")
    parser.add_argument("--check", action="store_true", help="compare, rewrite nothing")
    options = parser.parse_args()
    tables = read_tables()
    if unknown := set(options.names) - {table.name for table in tables}:
        parser.error(f"no table {min(unknown)!r}; there are: {', '.join(table.name for table in tables)}")
    stale = []
    for table in tables:
        wanted = table.name in options.names if options.names else not (options.check and table.slow)
        if not wanted:
            continue
        page = ROOT / table.page
        text = page.read_text(encoding="utf-8")
        new = with_block(text, table.name, table.block())
        if new != text:
            stale.append(table)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    for table in stale:
        print(f"{table.page}: {table.name} {'is stale: run make docs-tables' if options.check else 'rewritten'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

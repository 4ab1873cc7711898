"""Writes docs/cli.md: the help of every command, as `imagine-opd --help` prints it."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from imagine_opd.cli import main

HEAD = """\
# Command line

`imagine-opd COMMAND --help` prints what stands here. Exit code 0: well; 1: a failed run, with one sentence on standard
error; 2: a wrong command line.
"""


def show_help(*command: str) -> str:
    """What `imagine-opd COMMAND --help` prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return shown.getvalue().strip()


def write_page(path: Path) -> None:
    """Write the page."""
    os.environ["COLUMNS"] = "100"
    parts = [HEAD]
    for command in ("", "demo", "train", "explain", "ask"):
        title = f"imagine-opd {command}".strip()
        parts.append(f"## `{title}`\n\n```text\n{show_help(*([command] if command else []))}\n```\n")
    path.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    write_page(Path(__file__).parents[1] / "docs" / "cli.md")

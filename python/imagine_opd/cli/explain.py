"""`imagine-opd explain`: what one row of a run becomes, printed, and as a page where one is asked for."""

from __future__ import annotations

from pathlib import Path

from imagine_opd.cli.train import read_call


def run_explain(config: str, row: int, html: str | None, overrides: dict[str, str]) -> None:
    """Explain a row of the run that the file and the options describe. Raises what `train` does before its steps."""
    from imagine_opd.api import explain_row, refuse_unwritable

    call = read_call(config, overrides)
    call.pop("dry_run", None)
    if html is not None:
        refuse_unwritable(Path(html).parent, "--html: folder")
    explain_row(**call, row=row, html=html)

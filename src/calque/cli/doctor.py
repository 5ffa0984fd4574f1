"""`calque doctor`: what a bug report needs."""

from typing import Annotated

import typer

from calque.cli.terminal import complain


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False,
) -> None:
    """Tells versions, processor, runtimes, extras, and whether calque works here; for bug reports."""
    from calque.cli.diagnosis import diagnose

    found = diagnose()
    print(found.to_json() if as_json else found)
    if not found.works:
        complain("error", f"calque does not work here: the trial {found.trial}")
        raise typer.Exit(1)

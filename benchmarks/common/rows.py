"""Rows of a benchmark, kept as they are measured, so that a run can be stopped and goes on where it was."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"  # rows and tables, committed
Row = dict[str, Any]


def read_rows(path: Path, fields: Sequence[str]) -> dict[tuple[Any, ...], Row]:
    """The rows of a file of JSON lines by the fields that tell them apart; of two with the same ones the later."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {tuple(row[field] for field in fields): row for row in rows}


def is_asked(key: Sequence[object], asked: Sequence[Sequence[object] | None]) -> bool:
    """Whether each part of the key is among those asked for; None and nothing ask for all."""
    return all(not chosen or part in chosen for part, chosen in zip(key, asked, strict=True))


def measure_rows(
    path: Path,
    fields: Sequence[str],
    keys: Iterable[tuple[Any, ...]],
    measured: Callable[..., Row],
    write: Callable[[Path], None],
    *,
    again: bool,
) -> None:
    """Measures the rows that the file lacks, appends and prints each, and writes the tables behind each and at the end.

    Args:
        measured: a row from the parts of its key.
        write: writes the tables from the file.
        again: measures rows that the file has, too.
    """
    for key in keys:
        if again or key not in read_rows(path, fields):
            row = measured(*key)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            write(path)
    write(path)

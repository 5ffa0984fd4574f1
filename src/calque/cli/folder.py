"""The run directory: everything that a run decided and made, each file written whole."""

import json
import os
import platform
import shlex
import shutil
import stat
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch

from calque.cli.inputs import InputError
from calque.grid.bits import SEEDS
from calque.quantized.model import QuantizedModel
from calque.recipe import Recipe
from calque.report import Report
from calque.run.checkpoint import IDENTITY, RUN
from calque.run.fields import mapping, measured, optional, parse_json, record, text, whole
from calque.run.files import remove_folder, sweep_drafts, write_whole
from calque.shipping.saved import save

NETWORK, PRICES, PIECES = "q.safetensors", "prices.json", "pieces"
PLANS, CURVE, PICTURE = "plans", "pareto.csv", "pareto.png"  # of calque plan
MARKS = (RUN, PIECES)  # what tells the folder of a run from others


@dataclass(frozen=True, slots=True)
class Run:
    """How a run was started.

    Attributes:
        model: reference of the function that builds the network.  weights, calibration: paths.
        scores: metric of the float and the quantized network, and of its file once it was exported, where one was given.
        evaluate: reference of the function that measures it; None in runs of older versions as well.
    """

    model: str
    weights: str | None
    calibration: str
    seed: int
    command: str
    scores: dict[str, float]
    versions: dict[str, str]
    evaluate: str | None = None


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    return {"calque": version("calque"), "torch": torch.__version__, "python": platform.python_version()}


def claim(folder: Path, marks: tuple[str, ...] = MARKS) -> None:
    """Makes the folder. Raises: InputError if it has files and none of `marks`; OSError."""
    # nobody else writes here, whatever the umask: see trusted_run
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    sweep_drafts(folder)
    if any(folder.iterdir()) and not any((folder / name).exists() for name in marks):
        raise InputError(f"{folder} has files that are not calque's. Choose an empty or a new folder.")


def require_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises InputError where another run is in the folder: an unfinished one without either option, a finished one without
    `overwrite`; or where both options are given.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite starts another one. Give one of them.")
    if overwrite or (resume and is_started(folder)):
        return
    if is_started(folder):
        raise InputError(f"{folder} has an unfinished run. Go on with --resume, or start again with --overwrite.")
    if (folder / RUN).is_file():
        raise InputError(
            f"{folder} has a finished run (calque report {folder}). Replace it with --overwrite, or choose another folder."
        )


def is_started(folder: Path) -> bool:
    """Whether the folder has an unfinished run, which can be gone on with."""
    return (folder / PIECES / IDENTITY).is_file()


def claim_pieces(folder: Path, *, overwrite: bool) -> Path:
    """The folder of the run's pieces, after `require_free` and `claim`.

    With `overwrite` the pieces of an unfinished run are deleted; a finished one stays whole until another takes its place.
    """
    claim(folder)
    if overwrite:
        remove_folder(folder / PIECES)
    return folder / PIECES


def write_run(folder: Path, q: QuantizedModel, recipe: Recipe, run: Run) -> None:
    """Writes all files of a run; RUN, which says that the others are there, comes last. Its pieces are deleted then."""
    for name in (RUN, PRICES, CURVE, PICTURE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PLANS, ignore_errors=True)
    save(q, folder / NETWORK)
    texts = {
        "plan.toml": q.plan.to_toml(),
        "report.txt": f"{q.report}\n",
        "report.json": q.report.to_json(),
        "recipe.toml": recipe.to_toml(),
    }
    for name, content in texts.items():
        write_whole(folder / name, content.encode())
    if q.prices is not None:
        write_whole(folder / PRICES, q.prices.to_json().encode())
    write_start(folder, run)
    remove_folder(folder / PIECES)


def write_start(folder: Path, run: Run) -> None:
    """Writes how the run was started."""
    path = folder / RUN
    write_whole(path, json.dumps(asdict(run), indent=1).encode())
    path.chmod(
        stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH)
    )  # whatever the umask: see trusted_run


def read_run(folder: Path) -> Run:
    """How the run in `folder` was started. Raises: InputError."""
    path = folder / RUN
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a finished run: it has no {RUN}. Start with calque quantize.")
    with path.open(encoding="utf-8") as file:
        return _parsed(path, file)


def trusted_run(folder: Path, *, trust: bool) -> Run:
    """`read_run`, for commands that import and call the function that the file names.

    Raises:
        InputError: as `read_run`; the file belongs to another user, or others may write to it or its folder, without `trust`.
    """
    path = folder / RUN
    if not path.is_file():
        return read_run(folder)
    with path.open(encoding="utf-8") as file:
        run, problem = _parsed(path, file), _open_to_others(path, os.fstat(file.fileno()))
    problem = problem or _open_to_others(folder, folder.stat())
    if problem and not trust:
        raise InputError(
            f"{path} says to import and call {run.model}, and {problem}. Read it, then add --trust, or make both your own: "
            f"chmod go-w {shlex.quote(str(folder))} {shlex.quote(str(path))}."
        )
    return run


def _open_to_others(path: Path, found: os.stat_result) -> str:
    """How somebody else could have written the file or folder; "" where nobody but root could."""
    if not hasattr(os, "getuid"):  # a system without users of this kind
        return ""
    if found.st_uid != os.getuid():
        return f"{path} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users may write to {path}"
    return ""


_check_run = record(
    {
        "model": text, "weights": optional(text), "calibration": text, "seed": whole(*SEEDS), "command": text,
        "scores": mapping(measured), "versions": mapping(text),
    },
    {"evaluate": optional(text)},
)  # fmt: skip


def _parsed(path: Path, file: TextIO) -> Run:
    try:
        plain = parse_json(file.read())
        _check_run("run", plain)
    except ValueError as error:  # SpecError among them, and what is no UTF-8
        raise InputError(f"{path} is damaged: {str(error).rstrip('.')}. Quantize again.") from error
    return Run(**plain)


def read_report(folder: Path) -> Report:
    """The report of the run in `folder`. Raises: InputError."""
    read_run(folder)
    path = folder / "report.json"
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # SpecError among them, and what is no UTF-8
        raise InputError(f"{path} is damaged: {str(error).rstrip('.')}. Quantize again.") from error

"""The run directory: everything that a run decided and made, each file written whole."""

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from calque.checkpoint import IDENTITY, RUN
from calque.cli.inputs import InputError
from calque.files import remove_folder, sweep_drafts, write_whole
from calque.model import QuantizedModel
from calque.recipe import Recipe
from calque.report import Report
from calque.storage import save

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
    folder.mkdir(parents=True, exist_ok=True)
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
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
    if q.prices is not None:
        write_whole(folder / PRICES, q.prices.to_json().encode())
    write_start(folder, run)
    remove_folder(folder / PIECES)


def write_start(folder: Path, run: Run) -> None:
    """Writes how the run was started."""
    write_whole(folder / RUN, json.dumps(asdict(run), indent=1).encode())


def read_run(folder: Path) -> Run:
    """How the run in `folder` was started. Raises: InputError."""
    path = folder / RUN
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a finished run: it has no {RUN}. Start with calque quantize.")
    try:
        return Run(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}. Quantize again.") from error


def read_report(folder: Path) -> Report:
    """The report of the run in `folder`. Raises: InputError."""
    read_run(folder)
    path = folder / "report.json"
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: {error}. Quantize again.") from error

"""The architecture as a test: a room imports only rooms listed before it, and no file grows too long."""

import ast
from pathlib import Path

import pytest

ROOMS = (
    "errors",
    "gains",
    "extras",
    "processes",
    "fields",
    "files",
    "holdout",
    "spec",
    "budget",
    "allocation",
    "prices",
    "checkpoint",
    "arithmetic",
    "ranges",
    "settings",
    "recipe",
    "report",
    "compat",
    "graph",
    "tensors",
    "store",
    "execution",
    "placement",
    "decisions",
    "filenodes",
    "filesize",
    "filecosts",
    "costs",
    "quantizers",
    "calls",
    "kernels",
    "integer",
    "assembled",
    "model",
    "partly",
    "admission",
    "floats",
    "samples",
    "calibration",
    "losses",
    "solvers",
    "channel_statistics",
    "statistics",
    "biases",
    "distillation",
    "fidelity",
    "progress",
    "options",
    "job",
    "migration",
    "factors",
    "smoothing",
    "trial",
    "guard",
    "swept",
    "sweep",
    "parallel",
    "sensitivity",
    "reconstruction",
    "effort",
    "estimate",
    "stages",
    "outliers",
    "search",
    "summary",
    "parts",
    "storage",
    "finished",
    "pipeline",
    "export",
    "demo",
    "machine",
    "diagnosis",
    "cli",
)
FRONT_DOOR = "calque"  # the package itself: it imports the rooms, so only the last room may import it
EXEMPT = ("__init__.py", "__main__.py", "py.typed")
LONGEST_FILE = 300  # lines

PACKAGE = Path(__file__).parents[1] / "src" / "calque"
FILES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
)
SOURCES = [path for path in FILES if path.suffix == ".py"]


def room_of(path: Path) -> str:
    """The room of a file (path relative to the package): its folder, or its name without the ending."""
    return path.parts[0].split(".")[0]


def imported_modules(path: Path, source: str) -> set[str]:
    """Full names that a file imports from calque, wherever in the file; `path` is relative to the package."""
    package = (FRONT_DOOR, *path.parts[:-1])  # what one dot means, for a module and for an __init__ alike
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == FRONT_DOOR}


def imported_rooms(path: Path, source: str) -> set[str]:
    """Rooms that a file imports, its own left out; the front door stands for a name that is no room."""
    parts = [name.split(".") for name in imported_modules(path, source)]
    rooms = {part[1] if len(part) > 1 and part[1] in ROOMS else FRONT_DOOR for part in parts}
    return rooms - {room_of(path)}


def allowed_rooms(room: str) -> set[str]:
    """Rooms listed before this one, and the front door for the last."""
    return {*ROOMS[: ROOMS.index(room)], *([FRONT_DOOR] if room == ROOMS[-1] else [])}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_belongs_to_a_room(path: Path) -> None:
    assert str(path) in EXEMPT or room_of(path) in ROOMS, f"{path} belongs to no room. Rooms: {ROOMS}"


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(path) in ROOMS], ids=str)
def test_a_room_imports_only_rooms_listed_before_it(path: Path) -> None:
    imported = imported_rooms(path, (PACKAGE / path).read_text(encoding="utf-8"))

    forbidden = imported - allowed_rooms(room_of(path))

    assert not forbidden, f"{path} imports {sorted(forbidden)}, which {room_of(path)} may not."


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_module_or_a_package_but_not_both(room: str) -> None:
    assert not ((PACKAGE / f"{room}.py").exists() and (PACKAGE / room).exists())


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_source_file_is_longer_than_300_lines(path: Path) -> None:
    lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())

    assert lines <= LONGEST_FILE, f"{path} has {lines} lines; at most {LONGEST_FILE}. Split it by idea."


@pytest.mark.parametrize(
    ("path", "source", "rooms"),
    [
        ("model.py", "import torch\nfrom torch import nn", set()),
        ("model.py", "import calque.cli", {"cli"}),
        ("model.py", "from calque.export.onnx import write", {"export"}),
        ("model.py", "from calque import pipeline", {"pipeline"}),
        ("model.py", "from calque import quantize", {"calque"}),
        ("model.py", "import calque", {"calque"}),
        ("model.py", "from . import spec", {"spec"}),
        ("model.py", "from .spec import Bits", {"spec"}),
        ("model.py", "def late():\n    from .cli import main", {"cli"}),
        ("solvers/adaquant.py", "from .gram import fit", set()),
        ("solvers/__init__.py", "from . import gram", set()),
        ("solvers/adaquant.py", "from ..ranges import minmax", {"ranges"}),
        ("solvers/adaquant.py", "from .. import cli", {"cli"}),
    ],
)
def test_every_form_of_import_is_seen(path: str, source: str, rooms: set[str]) -> None:
    assert imported_rooms(Path(path), source) == rooms

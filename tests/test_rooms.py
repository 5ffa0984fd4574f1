"""The architecture as a test: what each room may import, what stands at the root of the package, and how long a file may be."""

import ast
from pathlib import Path

import pytest

DATA = frozenset(
    {"errors", "gains", "settings", "recipe", "report"}
)  # files at the root: what was asked and what came out
# Rooms in the order of the method. Each may import the data at the root, except what a room's own line leaves out, and the
# rooms of its line; none of these stands behind it, so that there are no cycles.
ROOMS: dict[str, frozenset[str]] = {
    "run": frozenset(),
    "grid": frozenset({"run"}),
    "network": frozenset({"run", "grid"}),
    "calibration": frozenset({"run", "grid", "network"}),
    "quantized": frozenset({"run", "grid", "network"}),
    "allocation": frozenset({"run", "grid", "network", "calibration", "quantized"}),
    "fitting": frozenset({"run", "grid", "network", "calibration", "quantized"}),
    "correction": frozenset({"run", "grid", "network", "calibration", "quantized", "fitting"}),
    "shipping": frozenset({"run", "grid", "network", "calibration", "quantized", "allocation"}),
    "pipeline": frozenset({
        "run", "grid", "network", "calibration", "quantized", "allocation", "fitting", "correction", "shipping",
    }),
    "cli": frozenset({
        "run", "grid", "calibration", "quantized", "allocation", "shipping", "pipeline",
    }),
}  # fmt: skip
# The two foundations stand below the data; files of data import these and each other in this order.
DATA_IMPORTS = {
    "errors": frozenset[str](),
    "gains": frozenset[str](),
    "settings": frozenset({"errors", "run", "grid"}),
    "report": frozenset({"errors", "gains", "run", "grid"}),
    "recipe": frozenset({"errors", "settings", "run", "grid"}),
}
BELOW_DATA = frozenset({"run", "grid"})
FRONT_DOOR = "calque"  # the package itself; it names what users import, and the roof alone may import it
MOST_AT_ROOT = 8
LONGEST_FILE = 300  # lines

PACKAGE = Path(__file__).parents[1] / "src" / "calque"
FILES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
)
SOURCES = [path for path in FILES if path.suffix == ".py"]


def room_of(path: Path) -> str:
    """The room of a file (path relative to the package): its outermost folder, or its name without the ending."""
    return path.parts[0].split(".")[0]


def allowed(room: str) -> frozenset[str]:
    """What a room, or a file of data, may import beside itself."""
    if room in DATA_IMPORTS:
        return DATA_IMPORTS[room]
    data = frozenset({"errors"}) if room in BELOW_DATA else DATA
    return ROOMS[room] | data | (frozenset({FRONT_DOOR}) if room == "cli" else frozenset())


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
    known = {*ROOMS, *DATA}
    parts = [name.split(".") for name in imported_modules(path, source)]
    rooms = {part[1] if len(part) > 1 and part[1] in known else FRONT_DOOR for part in parts}
    return rooms - {room_of(path)}


def test_every_folder_is_a_room_and_every_room_a_folder() -> None:
    assert {path.parts[0] for path in SOURCES if len(path.parts) > 1} == set(ROOMS)


def test_few_files_stand_at_the_root() -> None:
    at_root = {path.name for path in FILES if len(path.parts) == 1}

    assert at_root == {"__init__.py", "__main__.py", "py.typed", *(f"{name}.py" for name in DATA)}
    assert len(at_root) <= MOST_AT_ROOT


def test_arrows_go_down_only() -> None:
    order = list(ROOMS)

    for room, below in ROOMS.items():
        assert below <= set(order[: order.index(room)]), room


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(path) in {*ROOMS, *DATA}], ids=str)
def test_a_room_imports_what_the_table_says(path: Path) -> None:
    imported = imported_rooms(path, (PACKAGE / path).read_text(encoding="utf-8"))

    forbidden = imported - allowed(room_of(path))

    assert not forbidden, f"{path} imports {sorted(forbidden)}, which {room_of(path)} may not."


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_allows_nothing_that_no_file_imports(room: str) -> None:
    found = [
        imported_rooms(path, (PACKAGE / path).read_text(encoding="utf-8")) for path in SOURCES if room_of(path) == room
    ]

    assert ROOMS[room] <= set().union(*found)


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_says_what_it_owns(room: str) -> None:
    lines = (PACKAGE / room / "README.md").read_text(encoding="utf-8").splitlines()

    assert 8 <= len(lines) <= 25
    assert all(any(name in line for line in lines) for name in ROOMS[room])


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_source_file_is_longer_than_300_lines(path: Path) -> None:
    lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())

    assert lines <= LONGEST_FILE, f"{path} has {lines} lines; at most {LONGEST_FILE}. Split it by idea."


@pytest.mark.parametrize(
    ("path", "source", "rooms"),
    [
        ("quantized/model.py", "import torch\nfrom torch import nn", set()),
        ("quantized/model.py", "import calque.cli", {"cli"}),
        ("quantized/model.py", "from calque.shipping.onnx import write", {"shipping"}),
        ("quantized/model.py", "from calque import pipeline", {"pipeline"}),
        ("quantized/model.py", "from calque import quantize", {"calque"}),
        ("quantized/model.py", "import calque", {"calque"}),
        ("quantized/model.py", "from .. import grid", {"grid"}),
        ("quantized/model.py", "from ..grid.bits import Bits", {"grid"}),
        ("quantized/model.py", "def late():\n    from ..cli import main", {"cli"}),
        ("fitting/adaquant.py", "from .gram import fit", set()),
        ("fitting/__init__.py", "from . import gram", set()),
        ("fitting/channel_scales/factors.py", "from ...grid.ranges import minmax", {"grid"}),
        ("fitting/channel_scales/factors.py", "from ..layer import solve_", set()),
        ("report.py", "from .gains import Tuned", {"gains"}),
    ],
)
def test_every_form_of_import_is_seen(path: str, source: str, rooms: set[str]) -> None:
    assert imported_rooms(Path(path), source) == rooms

"""What is shipped: the sdist has what makes the wheel, and the wheel has what runs, its types, its licence and its README."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from calque.run.extras import EXTRAS

pytest.importorskip(
    "setuptools", minversion="77", reason="what builds calque is not installed: pip install setuptools>=77"
)

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"


def build(kind: str, tree: Path, folder: Path) -> Path:
    """The file that setuptools makes of a tree, without the net."""
    subprocess.run([sys.executable, "-c", BUILD, kind, folder], cwd=tree, capture_output=True, check=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that is made of the sdist of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("sdist", "unpacked", "wheel"):
        (folder / name).mkdir()
    with tarfile.open(build("sdist", tree, folder / "sdist")) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return zipfile.ZipFile(build("wheel", unpacked, folder / "wheel"))


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "src"
    expected = {str(path.relative_to(package)) for path in (package / "calque").rglob("*") if path.is_file()}

    assert shipped == {name for name in expected if "__pycache__" not in name}
    assert "calque/py.typed" in shipped


def test_the_wheel_has_licence_readme_command_and_extras(wheel: zipfile.ZipFile) -> None:
    texts = {name.partition(".dist-info/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_string(wheel.read(texts["METADATA"]).decode())

    assert wheel.read(texts["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()  # type: ignore[union-attr]
    assert set(EXTRAS) <= set(metadata.get_all("Provides-Extra", []))
    assert b"calque = calque.cli:main" in wheel.read(texts["entry_points.txt"])

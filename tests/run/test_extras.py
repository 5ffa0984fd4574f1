"""Optional packages: named in one sentence where they are missing, and no others than pyproject.toml offers."""

import sys
import tomllib
from pathlib import Path

import pytest

from calque.cli import run
from calque.errors import CalqueError, MissingExtraError
from calque.run.extras import EXTRAS, import_extra

DEVELOPMENT = {"dev", "docs"}
PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(autouse=True)
def chosen_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_extras_are_those_of_the_package() -> None:
    offered = PYPROJECT["optional-dependencies"]
    assert set(EXTRAS) == set(offered) - DEVELOPMENT
    for name, extra in EXTRAS.items():
        assert [line.partition(">=")[0] for line in offered[name]] == [extra.package]


def test_nothing_optional_is_required() -> None:
    required = {line.partition(">=")[0] for line in PYPROJECT["dependencies"]}

    assert not required & {extra.package for extra in EXTRAS.values()}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_package_that_is_not_installed_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTRAS[name].module, None)

    with pytest.raises(MissingExtraError) as raised:
        import_extra(name)

    assert str(raised.value) == f"{EXTRAS[name].package} is not installed: pip install 'calque[{name}]'."
    assert isinstance(raised.value, CalqueError)
    assert isinstance(raised.value, ImportError)


def test_a_package_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('libray.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)

    with pytest.raises(MissingExtraError, match=r"^ray is installed, but cannot be imported: libray\.so: cannot open"):
        import_extra("ray")


def test_a_package_that_misses_another_one_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)

    with pytest.raises(MissingExtraError, match=r"cannot be imported: No module named 'no_such_package'\. Install it"):
        import_extra("ray")


def test_the_demo_without_its_digits_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)

    assert run(["demo", "--quiet", "-o", "out"]) == 1
    assert capsys.readouterr().err == "error: scikit-learn is not installed: pip install 'calque[demo]'.\n"

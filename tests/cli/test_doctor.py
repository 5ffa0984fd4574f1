"""`calque doctor`: what it tells of an installation that works, of one that lacks something and of a broken one."""

import getpass
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from calque.cli import run
from calque.cli.diagnosis import SUMS, Diagnosis, Package, diagnose, without_names
from calque.cli.machine import FEATURES, this_machine
from calque.run.extras import EXTRAS

MACHINE = replace(this_machine(), system="Linux 6.1 (x86_64)", processor="Fast CPU", features=("AVX2",), memory=2**33)
HEALTHY = Diagnosis(
    "0.1.0", "3.11.7", MACHINE, (Package("torch", "2.13.0", ""), Package("ray", "", "", "pip install 'calque[ray]'")), 4,
    (), {"onnxruntime": ("CPUExecutionProvider",)}, True, "fine", True,
)  # fmt: skip


def value(text: str, name: str) -> str:
    """What the table has in the row of this name."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).strip()


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return diagnose()


def test_an_installation_that_passes_these_tests_works(here: Diagnosis) -> None:
    assert here.works
    assert "100% of 32 outputs" in here.trial
    assert here.saturates is not None
    assert here.runtimes["onnxruntime"]
    assert {package.name for package in here.packages} >= {
        "torch",
        "onnxruntime",
        *(e.package for e in EXTRAS.values()),
    }


def test_json_has_every_figure(here: Diagnosis) -> None:
    read = json.loads(here.to_json())

    assert read["machine"]["cores"] == here.machine.cores
    assert [package["name"] for package in read["packages"]] == [package.name for package in here.packages]


def test_the_command_prints_the_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    assert value(capsys.readouterr().out, "calque").endswith("works here")
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["works"] is True


def test_the_table_tells_each_finding() -> None:
    text = str(HEALTHY)

    assert value(text, "its features") == "AVX2"
    assert value(text, "uint8 x int8") == SUMS[True]
    assert value(text, "memory") == "8.0 GiB"
    assert value(text, "ray") == "not installed: pip install 'calque[ray]'"
    assert value(text, "GPU") == "none that torch can use"
    silent = replace(HEALTHY, machine=replace(MACHINE, features=None, memory=None), threads=None, saturates=None)
    assert value(str(silent), "its features") == value(str(silent), "memory") == "not told by this system"
    assert value(str(silent), "uint8 x int8") == SUMS[None]


def test_a_broken_extra_is_a_line_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('libopenvino.so: cannot open shared object file')")
    (tmp_path / "openvino-9.9.dist-info").mkdir()
    (tmp_path / "openvino-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: openvino\nVersion: 9.9\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)

    found = diagnose()

    assert found.works
    assert "openvino" not in found.runtimes
    assert value(str(found), "openvino") == (
        "9.9, which cannot be imported: ImportError: libopenvino.so: cannot open shared object file"
    )


def test_an_installation_that_cannot_export_does_not_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calque.shipping.onnx.export_onnx", _fail)

    assert run(["doctor"]) == 1

    printed = capsys.readouterr()
    assert value(printed.out, "calque").endswith("does not work here")
    assert value(printed.out, "trial") == "fails: OSError: no space in ~/models"
    assert printed.err == "error: calque does not work here: the trial fails: OSError: no space in ~/models\n"


def _fail(*_: object) -> None:
    raise OSError(f"no space in {Path.home()}/models")


def test_no_text_has_the_users_home_or_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")

    assert (
        without_names("/home/alice/lib/x.so, /data/alice/y, /tmp/of-alice/z")
        == "~/lib/x.so, /data/user/y, /tmp/of-user/z"
    )
    assert without_names("malice in alice/x") == "malice in alice/x"


def test_nobody_needs_to_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)

    assert without_names("plain") == "plain"


def test_this_machine_has_cores_and_known_features() -> None:
    found = this_machine()

    assert 1 <= found.usable_cores <= found.cores
    assert found.processor
    assert set(found.features or ()) <= set(FEATURES)
    assert found.memory is None or found.memory > 2**20

"""The command line, run in this process except where the process itself is what is tested."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import networks
from calque.cli import run
from calque.cli.inputs import InputError, load_calibration, load_weights, parse_axes, parse_overrides
from calque.cli.terminal import bars
from calque.report import Report
from calque.spec import Bits, Plan
from calque.storage import load

MODULE = """
import torch
from torch import nn

def build():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    net.load_state_dict({key: torch.full_like(value, 0.1) for key, value in net.state_dict().items()})
    return net

def score(model):
    assert not model.training
    return model(torch.ones(2, 1, 8, 8)).mean()

def words(model): return "good"
def raises(): raise RuntimeError("no\\nluck")
def returns_text(): return "text"
value = 3
"""
FILES = {"q.safetensors", "plan.toml", "report.txt", "report.json", "recipe.toml", "run.json"}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module, weights and calibration images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_net.py").write_text(MODULE)
    np.save("images.npy", networks.images(32, seed=0).double().numpy())
    safetensors.torch.save_file(networks.small().state_dict(), "weights.safetensors")
    yield tmp_path
    sys.modules.pop("user_net", None)


def quantize(*arguments: str, output: str = "run") -> int:
    return run(
        [
            "quantize",
            "user_net:build",
            "--calibration",
            "images.npy",
            "--recipe",
            "nearest",
            "-o",
            output,
            *arguments,
        ]
    )


def test_quantize_writes_a_whole_run_and_prints_the_report(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = quantize("--weights", "weights.safetensors", "--bits", "w4a4", "--seed", "3")

    printed = capsys.readouterr()
    assert code == 0
    assert {path.name for path in (work / "run").iterdir()} == FILES
    assert (work / "run" / "report.txt").read_text() == printed.out
    assert Report.from_json((work / "run" / "report.json").read_text()).seed == 3
    settings = json.loads((work / "run" / "run.json").read_text())
    assert settings["model"] == "user_net:build"
    assert settings["weights"] == str(work / "weights.safetensors")
    assert settings["seed"] == 3
    assert settings["versions"]["torch"] == torch.__version__
    assert load(work / "run" / "q.safetensors", networks.small()).plan == Plan.load(work / "run" / "plan.toml")


def test_weights_come_from_the_file(work: Path) -> None:
    quantize("--weights", "weights.safetensors")
    q = load("run/q.safetensors", networks.small())
    images = networks.images(8, seed=1)

    with torch.no_grad():
        error = (q(images) - networks.small()(images)).abs().max().item()

    assert error < 0.05


def test_without_weights_the_function_is_said_to_be_trusted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize() == 0

    assert "user_net:build is trusted to return trained weights" in capsys.readouterr().err


def test_overrides_ends_and_placement_reach_the_plan(work: Path) -> None:
    assert quantize("--bits", "w4a4", "--first-last", "none", "--override", "3=float", "--placement", "inputs") == 0

    assert Plan.load("run/plan.toml") == Plan({"0": Bits(4, 4), "3": Bits(None, None)})


def test_a_plan_recipe_and_axes_are_taken_from_the_command(work: Path) -> None:
    assert quantize("--bits", "w5a5", "--first-last", "w6a6") == 0

    code = run(
        ["quantize", "user_net:build", "--calibration", "images.npy", "-o", "again", "--device", "cpu",
         "--plan", "run/plan.toml", "--recipe", "run/recipe.toml", "--dynamic", "input:2", "--memory", "1MB",
         "--quiet"]
    )  # fmt: skip

    assert code == 0
    assert Plan.load("again/plan.toml")["3"] == Bits(6, 6)
    assert Path("again/recipe.toml").read_text() == Path("run/recipe.toml").read_text()


def test_the_users_metric_scores_float_and_quantized(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--evaluate", "user_net:score") == 0
    assert run(["report", "run"]) == 0

    expected = 144 * 0.1 * (9 * 0.1 + 0.1) + 0.1
    scores = json.loads(Path("run/run.json").read_text())["scores"]
    assert scores["float"] == pytest.approx(expected, rel=1e-4)
    assert scores["quantized"] == pytest.approx(expected, rel=0.1)
    assert len(re.findall(r"^quantized: 1[0-9.]+", capsys.readouterr().out, re.MULTILINE)) == 2


def test_export_writes_a_verified_file_and_report_repeats_the_table(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize("--weights", "weights.safetensors")
    table = capsys.readouterr().out

    assert run(["export", "run", "model.onnx", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert run(["report", "run"]) == 0

    assert f"model.onnx: {Path('model.onnx').stat().st_size:,} bytes" in printed
    assert "float kernels: none" in printed
    assert capsys.readouterr().out == table


def test_a_run_may_be_repeated_in_its_folder_and_another_folder_is_never_touched(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize() == 0
    assert quantize() == 0
    assert quantize(output=".") == 1

    assert "has files that are not calque's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["quantize", "user_net:build"], "Missing option"),
        (["quantize", "user_net:build", "--calibration", "images.npy", "-o", "run", "--seed", "x"], "--seed"),
        (["report", "nothing"], "nothing is not the folder of a finished run"),
        (["export", "nothing", "model.onnx"], "nothing is not the folder of a finished run"),
        (["export", "nothing", "model.onnx", "--target", "qonnx"], "only the target onnxruntime"),
        (["demo", "-o", "."], "has files that are not calque's"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(arguments)

    printed = capsys.readouterr()
    assert code == 1
    assert printed.out == ""
    assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", printed.err)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("user_net", "a function is written package.module:name"),
        ("no_such_module:build", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("user_net:nothing", "user_net has no nothing"),
        ("user_net:value", "must be a function. Got int"),
        ("user_net:raises", "user_net:raises raised RuntimeError: no luck"),
        ("user_net:returns_text", "must return an nn.Module. Got str"),
    ],
)
def test_a_reference_that_gives_no_network_is_one_line(
    model: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["quantize", model, "--calibration", "images.npy", "-o", "run"])

    assert code == 1
    assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", capsys.readouterr().err)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "w9a9"], r"bits must be an int in \[2, 8\]. Got 9"),
        (["--placement", "nowhere"], "placement is"),
        (["--override", "zzz=w8a8"], "matches no layer"),
        (["--override", "zzz"], "pattern=bits"),
        (["--dynamic", "input"], "x:2,3"),
        (["--memory", "much"], "a size is written"),
        (["--device", "nowhere"], "device nowhere cannot be used"),
        (["--plan", "nothing.toml"], "nothing.toml: No such file or directory"),
        (["--recipe", "nothing"], "recipe is one of"),
        (["--weights", "nothing.safetensors"], "nothing.safetensors: No such file"),
        (["--calibration", "nothing.npy"], "nothing.npy: No such file or directory"),
        (["--evaluate", "user_net:words"], "must return a number. Got str"),
    ],
)
def test_a_wrong_option_of_quantize_is_one_line_and_writes_no_run(
    arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = quantize(*arguments)

    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert code == 1
    assert len(lines) == 1
    assert re.match(rf"error: .*{message}", lines[0])
    assert not Path("run/run.json").exists()


def test_a_warning_is_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("flat.npy", np.zeros((8, 1, 8, 8)))

    quantize("--calibration", "flat.npy")

    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("warning: a calibration input has the same value everywhere") for line in lines)


def test_a_damaged_run_is_one_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize()
    Path("run/report.json").write_text("{}")
    Path("run/q.safetensors").write_bytes(b"junk")
    capsys.readouterr()

    assert run(["report", "run"]) == 1
    assert run(["export", "run", "model.onnx"]) == 1

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.match("error: run/report.json is damaged", lines[0])
    assert re.match("error: run/q.safetensors is not a safetensors file", lines[1])
    assert not Path("model.onnx").exists()


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors", "x.pt"])
def test_calibration_is_read_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    images = networks.images(4, seed=0)
    expected: dict[str, object] = {
        "x.npy": images, "x.npz": {"image": images}, "x.safetensors": {"image": images}, "x.pt": (images,)
    }  # fmt: skip
    np.save(tmp_path / "x.npy", images.double().numpy())
    np.savez(tmp_path / "x.npz", image=images.numpy())
    safetensors.torch.save_file({"image": images}, tmp_path / "x.safetensors")
    torch.save((images,), tmp_path / "x.pt")

    found, form = torch.utils._pytree.tree_flatten(load_calibration(tmp_path / name))

    assert form == torch.utils._pytree.tree_flatten(expected[name])[1]
    assert torch.equal(found[0], images)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors", "x.pt", "x.csv"])
def test_a_file_that_is_not_arrays_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("nothing of the kind")

    with pytest.raises(InputError, match=r"does not hold|not a safetensors file|not a \.pt file|ends with \.npy"):
        load_calibration(tmp_path / name)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"x": run}, tmp_path / "x.pt")

    with pytest.raises(InputError, match="tensors alone"):
        load_calibration(tmp_path / "x.pt")


def test_a_state_dict_of_another_network_names_the_first_few_keys(tmp_path: Path) -> None:
    state = {"0.weight": torch.ones(2, 1, 3, 3), **{f"extra{i}": torch.ones(1) for i in range(5)}}
    torch.save(state, tmp_path / "w.pt")

    with pytest.raises(
        InputError,
        match=r"missing: 0.bias, 3.weight, 3.bias; unknown: extra0, extra1, extra2 and 2 more; "
        r"of another shape: 0.weight \[2, 1, 3, 3\] for \[4, 1, 3, 3\]",
    ):
        load_weights(networks.small(), tmp_path / "w.pt")


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")

    with pytest.raises(InputError, match="must hold a state dict"):
        load_weights(networks.small(), tmp_path / "w.pt")


def test_overrides_and_axes_are_read_as_written() -> None:
    assert parse_overrides(["a=b=w8a8", "gate=float"]) == {"a=b": "w8a8", "gate": None}
    assert parse_axes(["x:2,3", "y:1"]) == {
        "x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}, "y": {1: torch.export.Dim.AUTO}
    }  # fmt: skip


def test_quiet_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):  # not a terminal: bars would only litter a log
        with bars(quiet) as show:
            show("fit", 1, 2)

    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal_show_phase_steps_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")

    with bars(False) as show:
        show("fit", 1, 2)

    assert re.search(r"fit .*1/2.*-:--:--", capsys.readouterr().err)


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "calque", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = subprocess.run(
        [sys.executable, "-m", "calque", "quantize", "nothing:build", "--calibration", "x.npy", "-o", "run"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, f"calque {version('calque')}\n")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert re.fullmatch(r"error: nothing cannot be imported[^\n]*\n", wrong.stderr)

"""The command line, run in this process except where the process itself is what is tested."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper

import calque
import networks
from calque.cli import run
from calque.cli.inputs import InputError, parse_axes, parse_overrides
from calque.cli.readers import load_calibration
from calque.cli.weights import load_weights
from calque.errors import SpecError
from calque.grid.bits import Bits, Plan
from calque.recipe import ADVANCED, AdaQuant, Recipe, Search, Tuning, find_recipe
from calque.report import Report
from calque.shipping.saved import load
from slow import slow

MODULE = """
import torch
from torch import nn

def build():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    net.load_state_dict({key: torch.full_like(value, 0.1) for key, value in net.state_dict().items()})
    return net

def pooled():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    net.load_state_dict({key: torch.full_like(value, 0.1) for key, value in net.state_dict().items()})
    return net

def score(model):
    assert not model.training
    return model(torch.ones(2, 1, 8, 8)).mean()

def words(model): return "good"
def raises(): raise RuntimeError("no\\nluck")
def returns_text(): return "text"
value = 3

def distance(reference, output): return (reference - output).square().mean()
def words_loss(reference, output): return "good"
def raises_loss(reference, output): raise RuntimeError("no\\nluck")
def rows_loss(reference, output): return reference[:, 0]
"""
QUICK = replace(
    ADVANCED, name="quick", fit=AdaQuant(steps=4), search=Search(AdaQuant(steps=3), finalists=2), tuning=Tuning(steps=2)
)
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


def test_a_plan_recipe_and_axes_are_taken_from_the_command(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["quantize", "user_net:pooled", "--calibration", "images.npy", "--quiet"]
    assert run([*start, "--bits", "w5a5", "--first-last", "w6a6", "-o", "run"]) == 0

    code = run(
        [*start, "-o", "again", "--device", "cpu", "--plan", "run/plan.toml", "--recipe", "run/recipe.toml",
         "--dynamic", "input:2", "--memory", "1MB"]
    )  # fmt: skip

    assert code == 0
    assert Plan.load("again/plan.toml")["4"] == Bits(6, 6)
    assert Path("again/recipe.toml").read_text() == Path("run/recipe.toml").read_text()
    assert quantize("--dynamic", "input:2", output="flat") == 1
    assert "it fixes axis 2 of input at 8" in capsys.readouterr().err


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


def test_a_runtime_too_old_for_the_file_is_a_note_of_export_and_an_error_of_verify(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize("--weights", "weights.safetensors")
    capsys.readouterr()
    monkeypatch.setattr(ort, "__version__", "1.17.3")

    assert run(["export", "run", "model.onnx"]) == 0
    assert capsys.readouterr().err.startswith("note: model.onnx: the file needs ONNX Runtime 1.18 or newer")
    assert run(["verify", "model.onnx", "run"]) == 1
    assert "1.17.3 is installed. Run it where a newer one is: pip install" in capsys.readouterr().err


def test_names_in_the_file_are_chosen_on_the_command_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize("--weights", "weights.safetensors")

    assert run(["export", "run", "model.onnx", "--input-names", "data", "--output-names", " scores", "--verify"]) == 0
    graph = onnx.load("model.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["data", "scores"]
    capsys.readouterr()
    assert run(["export", "run", "model.onnx", "--output-names", "a,b"]) == 1
    assert (
        "output_names is a list with one distinct name for each output (output). Got 2: a, b" in capsys.readouterr().err
    )


def test_verify_prints_figures_with_the_latency_or_one_line_of_json(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("other.npy", networks.images(24, seed=5).numpy())
    quantize("--weights", "weights.safetensors")
    run(["export", "run", "model.onnx"])
    capsys.readouterr()

    assert run(["verify", "model.onnx", "run"]) == 0
    assert re.search(r"^latency: .* of float32's", capsys.readouterr().out, re.MULTILINE)
    assert run(["verify", "model.onnx", "run", "--inputs", "other.npy", "--json", "--bound", "0"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["latency"]["runs"] >= 3
    assert json.loads(printed)["inputs"] == 24
    assert printed.count("\n") == 1


def test_verify_of_an_edited_file_prints_its_figures_and_ends_in_an_error(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize("--weights", "weights.safetensors")
    run(["export", "run", "model.onnx"])
    proto = onnx.load("model.onnx")
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "3/bias/codes")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.int32(200), bias.name))
    onnx.save(proto, "model.onnx")
    capsys.readouterr()

    code = run(["verify", "model.onnx", "run", "--json"])

    printed = capsys.readouterr()
    assert code == 1
    assert json.loads(printed.out)["optimized"]["exact"] < 0.99
    assert "less than the bound of 99.00%" in printed.err


def test_verify_of_another_runs_file_says_so_and_runs_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize("--weights", "weights.safetensors")
    quantize("--weights", "weights.safetensors", "--override", "[0]=w4a4", output="worse")
    run(["export", "worse", "model.onnx"])
    capsys.readouterr()

    code = run(["verify", "model.onnx", "run"])

    printed = capsys.readouterr()
    assert (code, printed.out) == (1, "")
    assert "exported from another network or run" in printed.err


def test_an_unknown_target_ends_in_an_error(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize("--weights", "weights.safetensors")
    run(["export", "run", "model.onnx"])
    capsys.readouterr()

    for command in (["export", "run", "other.onnx"], ["verify", "model.onnx", "run"]):
        assert run([*command, "--target", "tpu"]) == 1
        assert "target is one of onnxruntime, openvino, qonnx. Got 'tpu'" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_unless_asked(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--bits", "w4a4") == 0
    before = {path.name: path.read_bytes() for path in (work / "run").iterdir() if path.is_file()}
    capsys.readouterr()

    assert quantize("--bits", "w8a8", "--weights", "nothing.safetensors") == 1  # before anything is read

    assert capsys.readouterr().err == (
        "error: run has a finished run (calque report run). Replace it with --overwrite, or choose another folder.\n"
    )
    assert {path.name: path.read_bytes() for path in (work / "run").iterdir() if path.is_file()} == before
    assert quantize("--bits", "w8a8", "--overwrite") == 0
    assert {path.name for path in (work / "run").iterdir()} == FILES
    assert Plan.load("run/plan.toml")["3"] == Bits(8, 8)
    assert "--overwrite" not in json.loads(Path("run/run.json").read_text())["command"]


def test_a_run_that_fails_to_overwrite_leaves_the_old_one_whole(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantize("--bits", "w4a4") == 0
    assert run(["report", "run"]) == 0
    before = capsys.readouterr().out.split("total")[-1]

    assert quantize("--bits", "w8a8", "--overwrite", "--evaluate", "user_net:words") == 1
    assert run(["report", "run"]) == 0
    assert capsys.readouterr().out.endswith(before)

    with monkeypatch.context() as patched:
        patched.setattr("calque.cli.folder.save", _interrupted)
        assert quantize("--bits", "w8a8", "--overwrite") == 130
    assert run(["report", "run"]) == 1  # it says that it is finished no longer
    assert quantize("--bits", "w8a8") == 1
    assert "has an unfinished run. Go on with --resume, or start again with --overwrite" in capsys.readouterr().err
    assert quantize("--bits", "w8a8", "--resume") == 0
    assert Plan.load("run/plan.toml")["3"] == Bits(8, 8)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_unfinished_run_is_started_again_where_that_is_asked(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("calque.cli.folder.save", _interrupted)
        assert quantize("--bits", "w8a8") == 130
    assert "Go on with: " in capsys.readouterr().err

    assert quantize("--bits", "w4a4", "--overwrite", "--resume") == 1
    assert "Give one of them" in capsys.readouterr().err
    assert quantize("--bits", "w4a4", "--overwrite") == 0
    assert {path.name for path in (work / "run").iterdir()} == FILES


def test_a_folder_of_other_files_is_never_touched(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plan.toml", "report.txt", "float.safetensors"):  # whose names calque's files have, too
        (work / "mine").mkdir(exist_ok=True)
        (work / "mine" / name).write_text("mine")

    for options in ([], ["--overwrite"]):
        assert quantize(*options, output="mine") == 1
        assert "has files that are not calque's" in capsys.readouterr().err
    assert run(["demo", "-o", "mine"]) == 1
    assert quantize() == 0
    assert run(["demo", "-o", "run"]) == 1

    assert capsys.readouterr().err.count("has files that are not calque's") == 2
    assert {path.read_text() for path in (work / "mine").iterdir()} == {"mine"}
    assert not Path("run/demo.json").exists()


def test_the_folder_of_a_finished_command_says_how_to_use_it_from_python(work: Path) -> None:
    assert quantize() == 0

    with pytest.raises(SpecError, match=r"finished calque quantize, .* Load its q.safetensors with calque.load"):
        calque.quantize(networks.small(), networks.images(32, seed=0), recipe="nearest", run="run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nothing"], "nothing is not the folder of a finished run"),
        (["export", "nothing", "model.onnx"], "nothing is not the folder of a finished run"),
        (["demo", "-o", "."], "has files that are not calque's"),
    ],
)
def test_a_command_that_fails_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(arguments)

    printed = capsys.readouterr()
    assert code == 1
    assert printed.out == ""
    assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", printed.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["quantize"], "Missing argument"),
        (["quantize", "user_net:build"], "Missing option"),
        (["quantize", "user_net:build", "--frobnicate"], "No such option: --frobnicate"),
        (["quantize", "user_net:build", "--calibration", "images.npy", "-o", "run", "--seed", "x"], "--seed"),
        (["plan", "run", "--size"], "requires an argument"),
        (["report", "run", "walk"], "unexpected extra argument"),
    ],
)
def test_a_misspelt_command_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(arguments)

    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{re.escape(message)}[^\n]*\n", printed.err)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("user_net", "a function is written package.module:name"),
        (
            "no_such_module:build",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'. It is looked for",
        ),
        ("no_such.module:build", ") and in those of PYTHONPATH."),
        ("needs_more:build", "ModuleNotFoundError: No module named 'no_such_library'\n"),
        ("user_net:nothing", "user_net has no nothing"),
        ("user_net:value", "must be a function. Got int"),
        ("user_net:raises", "user_net:raises raised RuntimeError: no luck"),
        ("user_net:returns_text", "must return an nn.Module. Got str"),
    ],
)
def test_a_reference_that_gives_no_network_is_one_line(
    model: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "needs_more.py").write_text("import no_such_library")

    code = run(["quantize", model, "--calibration", "images.npy", "-o", "run"])

    printed = capsys.readouterr().err
    assert code == 1
    assert re.fullmatch(r"error: [^\n]*\n", printed)
    assert message in printed
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.npy", "does not hold plain NumPy arrays"),
        ("x.npz", "does not hold plain NumPy arrays"),
        ("x.safetensors", "is not a safetensors file"),
        ("x.pt", r"is not a file of torch\.save"),
        ("x.csv", r"ends with \.npy"),
    ],
)
def test_a_file_that_is_not_arrays_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("nothing of the kind")

    with pytest.raises(InputError, match=message):
        load_calibration(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_in_place_of_inputs_are_recognized(name: str, tmp_path: Path) -> None:
    state = networks.small().state_dict()
    torch.save({"epoch": 3, "model": state}, tmp_path / "w.pt")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(InputError, match=r"holds weights, not inputs: 0\..*, 0\..* with --weights"):
        load_calibration(tmp_path / name)


def test_an_argument_that_is_called_like_a_weight_is_an_input(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2, 3), "weight": torch.ones(2, 3)}, tmp_path / "x.safetensors")

    assert load_calibration(tmp_path / "x.safetensors").keys() == {"x", "weight"}  # type: ignore[attr-defined]


def test_the_network_of_a_command_is_in_eval_mode_and_no_note_says_so(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize() == 0

    assert "train mode" not in capsys.readouterr().out


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
    assert re.fullmatch(r"error: nothing:build: nothing cannot be imported[^\n]*\n", wrong.stderr)


# ---- budgets, losses, workers, recipes


def under_budget(*arguments: str, output: str = "run") -> int:
    """A quick run under a budget that the options name."""
    Path("quick.toml").write_text(QUICK.to_toml())
    return run([
        "quantize", "user_net:build", "--weights", "weights.safetensors", "--calibration", "images.npy",
        "--bits", "w8a8,w4a4,w2a4", "--recipe", "quick.toml", "-o", output, *arguments,
    ])  # fmt: skip


def report_of(folder: str = "run") -> Report:
    return Report.from_json(Path(folder, "report.json").read_text())


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--size", ("3.3kB", "3.05kB")),
        slow("--size", ("3300B", "3040B")),
        ("--bops", ("0.06", "0.016")),
        slow("--bops", ("400K", "100K")),
        ("--activation-memory", ("0.26", "0.2")),
        ("--latency", ("table.csv=13", "table.csv=7")),
    ],
)
def test_a_smaller_budget_gives_a_smaller_network(work: Path, option: str, values: tuple[str, str]) -> None:
    write_table()
    plans = []
    for number, value in enumerate(values):
        assert under_budget(option, value, output=f"run{number}") == 0
        plans.append(Plan.load(f"run{number}/plan.toml"))

    bits = [[(plan[name].weight or 0, plan[name].activation or 0) for name in ("0", "3")] for plan in plans]
    assert bits[0] != bits[1]
    assert all(large >= small for large, small in zip(bits[0], bits[1], strict=True))


def write_table() -> None:
    lines = [f"{layer},{bits},{milliseconds}" for layer in ("0", "3")
             for bits, milliseconds in (("w8a8", 8), ("w4a4", 4), ("w2a4", 2))]  # fmt: skip
    Path("table.csv").write_text("\n".join(["layer,bits,milliseconds", *lines]))


def test_the_dual_form_makes_the_network_smaller_where_more_may_be_lost(work: Path) -> None:
    sizes = []
    for loss in ("1e-6", "10"):
        assert under_budget("--max-loss", loss, "--minimize", "size", output=f"run{loss}") == 0
        sizes.append(report_of(f"run{loss}").size)
    write_table()
    assert under_budget("--max-loss", "10", "--minimize", "latency", "--latency", "table.csv=inf", output="fast") == 0

    assert sizes[0] > sizes[1]
    assert {str(Plan.load("fast/plan.toml")[name]) for name in ("0", "3")} == {"w2a4"}


def test_prices_are_in_the_loss_that_was_named(work: Path) -> None:
    names = []
    for loss in ("kl", "mse", "user_net:distance"):
        assert under_budget("--size", "3100B", "--loss", loss, output=f"run-{loss[-3:]}") == 0
        prices = json.loads(Path(f"run-{loss[-3:]}", "prices.json").read_text())
        names.append((prices["loss"], report_of(f"run-{loss[-3:]}").loss))

    assert names == [("kl", "kl"), ("mse", "mse"), ("distance", "distance")]


def test_workers_do_not_change_the_result(work: Path) -> None:
    for workers in ("1", "2"):
        assert under_budget("--size", "3100B", "--workers", workers, output=f"run{workers}") == 0

    one, other = (load(f"run{workers}/q.safetensors", networks.small()).state_dict() for workers in ("1", "2"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_printed_recipe_can_be_edited_and_passed_back(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "advanced"]) == 0
    text = capsys.readouterr().out
    edited = text.replace('name = "advanced"', 'name = "mine"')
    Path("r.toml").write_text(re.sub(r"(?m)^steps = \d+", "steps = 4", edited))

    assert under_budget("--size", "3100B", "--recipe", "r.toml") == 0

    assert find_recipe("advanced") == Recipe.parse(text)
    assert report_of().recipe == "mine"
    assert find_recipe("run/recipe.toml") == find_recipe("r.toml")
    assert run(["recipe", "nothing"]) == 1


def test_a_plan_of_another_budget_is_quantized(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert under_budget("--size", "3100B") == 0
    assert run(["plan", "run", "--size", "3050B,3150B,3300B"]) == 0
    (path,) = Path("run/plans").glob("*3150B*")

    assert quantize("--plan", str(path), "--weights", "weights.safetensors", output="again") == 0

    solved, made = Plan.load(path), Plan.load("again/plan.toml")
    assert {name: made[name] for name in solved} == dict(solved)
    size = report_of("again").file_size
    assert size is not None
    assert size <= 3150
    assert (Path("run") / "plans").is_dir()


def test_an_estimate_comes_first_unless_quiet(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize("--weights", "weights.safetensors")
    loud = capsys.readouterr().err
    quantize("--weights", "weights.safetensors", "--quiet", output="other")

    assert re.fullmatch(r"note: about \d+ seconds for 32 inputs\n", loud)
    assert capsys.readouterr().err == ""


def test_one_bar_shows_every_phase_of_a_run_under_a_budget(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")

    assert under_budget("--size", "3100B") == 0
    loud = capsys.readouterr().err
    assert under_budget("--size", "3100B", "--overwrite", "--quiet") == 0

    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", loud)
    assert re.findall(r"(\w+) (\d+)/(\d+)\W+?(\d+)%", plain)[-1] == ("biases", "2", "2", "100")
    assert "note: about" in plain
    quiet = capsys.readouterr().err
    assert "%" not in quiet
    assert "note: " not in quiet


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0.01"], "size at most .* the smallest feasible is"),
        (["--size", "0"], "size as text is a share in"),
        (["--size", "-1"], "size as text is a share in"),
        (["--size", "nan"], "size as text is"),
        (["--size", "300"], "size as text is"),
        (["--size", "300 parsecs"], "size as text is"),
        (["--bops", "x"], "bops as text is"),
        (["--activation-memory", "1B"], "activation memory at most"),
        (["--latency", "1.5"], "written table.csv=milliseconds"),
        (["--latency", "table.csv=x"], "'x' is not a number of milliseconds"),
        (["--latency", "table.csv=0"], "latency's limit is in milliseconds, > 0"),
        (["--latency", "nothing.csv=3"], "nothing.csv: No such file"),
        (["--latency", "quick.toml=3"], "quick.toml, line 1: the header must be"),
        (["--latency", "short.csv=3"], "short.csv has no entry for w8a8"),
        (["--max-loss", "1"], "loss and minimize come together"),
        (["--minimize", "size"], "loss and minimize come together"),
        (["--max-loss", "nan", "--minimize", "size"], "loss must be a finite number"),
        (["--max-loss", "-1", "--minimize", "size"], "loss must be a finite number"),
        (["--max-loss", "1", "--minimize", "money"], "minimize is one of"),
        (["--max-loss", "1", "--minimize", "latency"], r"minimize=.latency. needs"),
        ([], "several bits are candidates that a budget chooses from"),
        (["--size", "3100B", "--bits", "w4a4,,w8a8"], "bits are written"),
        (["--size", "3100B", "--bits", ""], "bits are written"),
        (["--size", "3100B", "--plan", "plan.toml"], "budget and plan exclude each other"),
        (["--size", "3100B", "--workers", "0"], "workers must be an int from 1 to 4,096"),
        (["--size", "3100B", "--loss", "hinge"], "loss is"),
        (["--size", "3100B", "--loss", "user_net:nothing"], "user_net has no nothing"),
        (["--size", "3100B", "--loss", "user_net:value"], "must be a function. Got int"),
        (["--size", "3100B", "--loss", "user_net:words_loss"], "a loss returns one float number. Got str"),
        (["--size", "3100B", "--loss", "user_net:raises_loss"], "raises_loss raised RuntimeError: no luck"),
        (["--size", "3100B", "--loss", "user_net:score"], "score raised"),
        (["--size", "3100B", "--loss", "user_net:rows_loss"], "a loss returns one float number. Got torch.float32"),
        (["--size", "3100B", "--recipe", "damaged.toml"], "does not parse"),
        (["--size", "3100B", "--recipe", "images.npy"], "images.npy"),
        (["--size", "3100B", "--override", "0=w9"], "bits must be an int"),
        (["--size", "3100B", "--memory", "-1MB"], "a size is written"),
    ],
)
def test_a_wrong_option_under_a_budget_is_one_line_and_writes_no_run(
    arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.toml").write_text(Plan({"0": Bits(4, 4), "3": Bits(4, 4)}).to_toml())
    Path("damaged.toml").write_text("name = ")
    Path("short.csv").write_text("layer,bits,milliseconds\n0,w4a4,1")

    code = under_budget(*arguments)

    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert code == 1
    assert len(lines) == 1
    assert re.match(rf"error: .*{message}", lines[0])
    assert "unexpected" not in lines[0]
    assert not Path("run/run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-loss", "x", "--minimize", "size"], "Invalid value for '--max-loss': .* valid number"),
        (["--size", "3100B", "--workers", "two"], "Invalid value for '--workers': .* valid integer"),
    ],
)
def test_a_word_in_place_of_a_number_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert under_budget(*arguments) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: .*{message}", line)


# ---- interrupted


def test_resume_goes_on_and_a_finished_run_refuses_it(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert under_budget("--size", "3100B", "--resume") == 0  # nothing there yet: it starts
    assert under_budget("--size", "3100B", "--resume") == 1
    assert "has a finished run (calque report run). Replace it with --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("refused", [("--size", "0.01"), ("--latency", "nofile.csv=4")])
def test_what_was_refused_at_once_leaves_no_unfinished_run(refused: tuple[str, str], work: Path) -> None:
    assert under_budget("--size", "3100B", *refused) == 1
    assert under_budget("--size", "3100B") == 0


def test_another_run_in_a_finished_folder_leaves_no_plans_of_the_old_one(work: Path) -> None:
    assert under_budget("--size", "3100B") == 0
    assert run(["plan", "run"]) == 0
    assert Path("run/pareto.csv").is_file()

    assert under_budget("--size", "3.3kB", "--overwrite") == 0

    assert not Path("run/pareto.csv").exists()
    assert not Path("run/pareto.png").exists()
    assert not Path("run/plans").exists()


def _heard() -> None:
    """Has signals end the process that a shell ignores in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow  # each runs three processes and their workers
@pytest.mark.parametrize(
    ("number", "code", "said_last"),
    [
        (signal.SIGINT, 130, []),
        (signal.SIGTERM, 143, ["error: ended by SIGTERM"]),
        (signal.SIGHUP, 129, ["error: ended by SIGHUP"]),
    ],
)
def test_a_signal_says_how_to_go_on_and_leaves_nothing_half_written(
    work: Path, number: int, code: int, said_last: list[str]
) -> None:
    Path("temporary").mkdir()
    Path("quick.toml").write_text(replace(QUICK, search=Search(AdaQuant(steps=500), finalists=2)).to_toml())
    Path("run it's").mkdir()
    os.rename("images.npy", "my images.npy")
    command = [
        sys.executable, "-m", "calque", "quantize", "user_net:build", "--calibration", "my images.npy", "--bits",
        "w8a8,w4a4", "--size", "3100B", "--override", "[0]=w4a4", "--recipe", "quick.toml", "-o", "run it's", "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=_heard,
        env={**os.environ, "TMPDIR": str(Path("temporary").absolute())},
    )  # fmt: skip
    while not list(Path("run it's/pieces").rglob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    send = os.kill if number == signal.SIGTERM else os.killpg  # a terminal sends to all processes
    send(process.pid, number)
    _, printed = process.communicate(timeout=60)

    lines = [line for line in printed.splitlines() if "about" not in line and "trusted" not in line]
    assert process.returncode == code, printed
    assert lines[1:] == said_last
    said = re.fullmatch(r"note: finished pieces are kept. Go on with: (.+ --resume)", lines[0])
    assert said is not None
    files = [path for path in Path("run it's").rglob("*") if path.is_file() and path.name != ".lock"]
    assert not [path for path in files if path.name.startswith(".")]
    for _ in range(100):  # workers end with the process that started them
        alive = [_command(pid) for pid in Path("/proc").glob("[0-9]*") if _session(pid) == str(process.pid)]
        if not alive:
            break
        time.sleep(0.1)
    assert alive == []
    assert not [
        *Path("temporary").glob("calque*"),
        *Path("temporary").glob("joblib*"),
    ]  # torch leaves folders of its own
    done = subprocess.run(said[1], shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, "total" in done.stdout) == (0, True), done.stderr
    assert not Path("run it's/pieces").exists()


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def _session(process: Path) -> str:
    """The session of a process that lives; "" of a zombie or where there is none."""
    try:
        state, *fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[2]


def test_a_latency_table_is_measured_and_limits_a_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--bits", "w8a8") == 0
    assert run(["latency", "run", "-o", "table.csv", "--bits", "w8a8,w4a4", "--quiet"]) == 0
    assert "--latency table.csv=" in capsys.readouterr().out
    lines = (work / "table.csv").read_text().splitlines()
    assert lines[0] == "layer,bits,milliseconds"
    assert {line.rpartition(",")[0] for line in lines[1:]} == {"0,w8a8", "0,w4a4", "3,w8a8", "3,w4a4"}

    assert quantize("--bits", "w8a8,w4a4", "--latency", "table.csv=1000", output="budget") == 0
    assert run(["latency", "budget", "-o", "again.csv", "--quiet"]) == 0  # choices are those of its budget
    assert {line.rpartition(",")[0] for line in (work / "again.csv").read_text().splitlines()[1:]} == {
        "0,w8a8", "0,w4a4", "3,w8a8", "3,w4a4",
    }  # fmt: skip
    assert run(["latency", "run", "-o", "missing/table.csv"]) == 1
    assert "the folder missing does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["export", "run", "model.onnx"], "run"),
        (["verify", "model.onnx", "run"], "run/run.json"),
        slow(["export", "run", "model.onnx"], "run/run.json"),
        slow(["verify", "model.onnx", "run"], "run"),
    ],
)
def test_a_function_that_others_may_have_named_is_not_imported_without_trust(
    work: Path, capsys: pytest.CaptureFixture[str], command: list[str], path: str
) -> None:
    quantize()
    assert run(["export", "run", "model.onnx"]) == 0
    sys.modules.pop("user_net")
    Path(path).chmod(0o777)
    capsys.readouterr()

    assert run(command) == 1

    error = capsys.readouterr().err
    assert error.startswith(
        f"error: run/run.json says to import and call user_net:build, and other users may write to {path}."
    )
    assert "--trust" in error
    assert "user_net" not in sys.modules
    assert run([*command, "--trust"]) == 0
    Path(path).chmod(0o755)
    assert run(command) == 0


def test_a_run_of_another_user_is_not_trusted(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize()
    monkeypatch.setattr(os, "getuid", lambda: os.stat("run").st_uid + 1)

    assert run(["export", "run", "model.onnx"]) == 1

    assert "run/run.json belongs to another user" in capsys.readouterr().err


def test_what_quantize_writes_is_trusted_whatever_the_umask(work: Path) -> None:
    before = os.umask(0)
    try:
        quantize()
    finally:
        os.umask(before)

    assert run(["export", "run", "model.onnx"]) == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", 3, "run.model must be text. Got 3"),
        ("seed", True, "run.seed must be an int from"),
        ("scores", {"float": "x"}, "run.scores.float must be a number. Got 'x'"),
        ("extra", 1, "run has an unknown field 'extra'"),
        ("weights", [], "run.weights must be text"),
    ],
)
def test_a_run_with_a_wrong_field_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], field: str, value: object, message: str
) -> None:
    quantize()
    settings = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**settings, field: value}))
    capsys.readouterr()

    for command in (["export", "run", "model.onnx"], ["report", "run"]):
        assert run(command) == 1
        assert message in capsys.readouterr().err

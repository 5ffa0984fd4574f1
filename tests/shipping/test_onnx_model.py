"""An exported file, called as the network that it was made from."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.cli import run
from calque.errors import SpecError, VerificationError
from networks import Branching, Net, Plain

# 7-bit ends, whose products no processor saturates
OPTIONS: dict[str, Any] = {"bits": "w4a4", "first_last": "w7a8", "recipe": "nearest"}
X = networks.images(40, seed=0)


def body(pack: Callable[[Net, Tensor, Tensor], object]) -> Net:
    def forward(net: Net, x: Tensor) -> object:
        y = torch.relu(net.conv(x)).mean((2, 3))
        return pack(net, y, net.head(y))

    return Net(forward, conv=nn.Conv2d(1, 6, 3), head=nn.Linear(6, 4))


PACKS: dict[str, Callable[[Net, Tensor, Tensor], object]] = {
    "tensor": lambda net, y, z: z,
    "tuple": lambda net, y, z: (z, y),
    "dict": lambda net, y, z: {"logits": z, "version": 3, "more": [y, None]},
    "dataclass": lambda net, y, z: Plain(z, hidden=y, version=2),
    "size": lambda net, y, z: (z, y.shape[0]),
}


@pytest.mark.parametrize("name", PACKS)
def test_it_returns_what_the_network_returns(name: str, tmp_path: Path) -> None:
    q = calque.quantize(body(PACKS[name]), X, **OPTIONS)
    path = calque.export_onnx(q, tmp_path / "q.onnx")

    expected, found = q(X[:5]), calque.OnnxModel(path, q)(x=X[:5])

    (one, form), (other, same_form) = map(torch.utils._pytree.tree_flatten, map(opened, (expected, found)))
    assert type(found) is type(expected)
    assert form == same_form
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        else:
            assert a == b


def opened(result: object) -> object:
    return vars(result) if isinstance(result, Plain) else result


def score(model: nn.Module) -> float:
    """A metric as people write them."""
    model.eval()
    device = next(model.parameters()).device
    model.to(device)
    inputs, kinds = networks.stripes(128, seed=5)
    with torch.no_grad():
        answers = torch.cat([model(part.to(device)).argmax(1).cpu() for part in networks.pieces(inputs, 50)])
    return (answers == kinds).float().mean().item()


def test_a_usual_metric_scores_all_three(trained: networks.Residual, calibration: Tensor, tmp_path: Path) -> None:
    q = calque.quantize(trained, calibration, **OPTIONS)
    path = calque.export_onnx(q, tmp_path / "q.onnx")

    assert score(trained) > 0.9
    assert score(calque.OnnxModel(path, q)) == pytest.approx(score(q), abs=0.02)


def test_a_call_in_another_form_is_refused_as_by_the_network(tmp_path: Path) -> None:
    q = calque.quantize(networks.small(), X, **OPTIONS)
    file = calque.OnnxModel(calque.export_onnx(q, tmp_path / "q.onnx"), q)

    with pytest.raises(ValueError, match="axis 2 of input was captured as 8"):
        file(networks.images(2, seed=0, side=9))
    with pytest.raises(ValueError, match="'temperature' is not a parameter of forward"):
        file(X, temperature=2)


@pytest.mark.filterwarnings("ignore::calque.errors.CaptureWarning")
def test_files_of_other_networks_and_parts_are_refused(tmp_path: Path) -> None:
    one, two = (calque.quantize(body(PACKS[name]), X, **OPTIONS) for name in ("tensor", "tuple"))
    path = calque.export_onnx(two, tmp_path / "two.onnx")
    partly = calque.quantize(networks.seeded(Branching()), X, recipe="nearest", placement="inputs")

    with pytest.raises(VerificationError, match=r"the file has 2 outputs .*, the network 1\. Export this network"):
        calque.OnnxModel(path, one)
    with pytest.raises(SpecError, match=r"OnnxModel\(file, q\.parts\[path\]\)"):
        calque.OnnxModel(path, partly)
    with pytest.raises(SpecError, match="target"):
        calque.OnnxModel(path, two, target="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        calque.OnnxModel(tmp_path / "none.onnx", two)


MODULE = """
import torch
import networks
calls = []
def build(): return networks.small()
def score(model):
    calls.append(type(model).__name__)
    with torch.no_grad():
        return model(torch.ones(2, 1, 8, 8)).mean()
def other(model): return len(list(model.eval().parameters())) * 0.0 + 1
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "scored_net.py").write_text(MODULE)
    np.save("images.npy", X.numpy())
    arguments = ["--calibration", "images.npy", "--recipe", "nearest", "--first-last", "w7a8", "--quiet"]
    assert run(["quantize", "scored_net:build", *arguments, "-o", "run", "--evaluate", "scored_net:score"]) == 0
    yield sys.modules["scored_net"]
    sys.modules.pop("scored_net", None)


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/run.json").read_text())
    return found


def test_verify_scores_the_file_by_the_metric_of_the_run(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "run", "m.onnx"]) == 0
    assert work.calls == ["Sequential", "QuantizedModel"]  # exporting alone scores nothing

    code = run(["verify", "m.onnx", "run", "--bound", "0"])

    assert code == 0
    assert work.calls[2:] == ["OnnxModel"]  # the others are known
    assert list(kept()["scores"]) == ["float", "quantized", "file"]
    assert kept()["scores"]["file"] == pytest.approx(kept()["scores"]["quantized"], rel=1e-3)
    assert "file: " in capsys.readouterr().out
    assert run(["report", "run"]) == 0
    assert (
        len(
            [
                line
                for line in capsys.readouterr().out.splitlines()
                if line.startswith(("float: ", "quantized: ", "file: "))
            ]
        )
        == 3
    )


def test_export_scores_by_a_metric_of_its_own_and_json_has_scores(
    work: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "run", "m.onnx", "--evaluate", "scored_net:other"]) == 0
    assert kept()["evaluate"] == "scored_net:other"
    assert kept()["scores"] == {"float": 1.0, "quantized": 1.0, "file": 1.0}
    capsys.readouterr()

    assert run(["verify", "m.onnx", "run", "--bound", "0", "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["scores"] == kept()["scores"]


def test_a_file_below_the_bound_is_scored_before_that_is_an_error(
    work: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calque.shipping.verification.LEAST_DB", 300.0)
    assert run(["export", "run", "m.onnx"]) == 0

    assert run(["verify", "m.onnx", "run"]) == 1

    printed = capsys.readouterr()
    assert "file: " in printed.out
    assert printed.err.startswith("error: output ")


def test_runs_of_older_versions_have_no_metric(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = kept()
    del settings["evaluate"]
    Path("run/run.json").write_text(json.dumps(settings))

    assert run(["export", "run", "m.onnx", "--verify"]) == 0

    assert "file: " not in capsys.readouterr().out

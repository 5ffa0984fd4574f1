"""What a misuse is answered with: one or two sentences that say what is wrong, what was received and what to do."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.cli.inputs import InputError
from calque.cli.readers import load_calibration
from calque.cli.weights import load_weights
from calque.errors import CalibrationError, CaptureError, SpecError
from calque.network.trace import trace
from calque.quantized.calls import CallForm

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 10, (16, 5), generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """An argument besides the tensor, and another that is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x) / temperature
        return y if mask is None else y * mask


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pair: list[Tensor], y: Tensor) -> Tensor:
        result: Tensor = self.layer(pair[0]) + pair[1] + y
        return result


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.layer(self.table(ids))
        return result


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if x.sum() > 0:
            x = x + 1
        return x


def net() -> nn.Module:
    return networks.seeded(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))


def quantize(model: Any, calibration: Any, **options: Any) -> calque.PartlyQuantized | Any:
    return calque.quantize(model, calibration, **{"recipe": "nearest", **options})


@cache
def quantized(kind: str) -> Any:
    made: dict[str, tuple[nn.Module, object]] = {
        "plain": (net(), X),
        "default": (Scaled(), X),
        "scaled": (Scaled(), {"x": X, "temperature": 2.0}),
        "pair": (Summed(), {"pair": [X, X], "y": X}),
        "ids": (Looked(), IDS),
    }
    model, calibration = made[kind]
    return quantize(networks.seeded(model), calibration)


FOUR = r'write "w4a4", or "w4" for weights alone\.$'
OPTIONS: list[tuple[Mapping[str, object], str]] = [
    ({"bits": 4}, r"bits are written .* Got 4; " + FOUR),
    ({"bits": "4"}, r"Got '4'; " + FOUR),
    ({"bits": "int8"}, r"Got 'int8'; write \"w8a8\", or \"w8\" for weights alone\.$"),
    ({"bits": torch.int8}, r"Got torch\.int8; write \"w8a8\""),
    ({"bits": "a4w8"}, r"Got 'a4w8'; write \"w8a4\"\.$"),
    ({"bits": "w4/a8"}, r"Got 'w4/a8'; write \"w4a8\"\.$"),
    ({"bits": "w4a4,w8a8"}, r"candidates for a budget are a tuple of strings"),
    ({"bits": "fp16"}, r"Got 'fp16'; layers stay in float by an override of None"),
    ({"bits": True}, r"bits are written .* Got True\.$"),
    ({"bits": {"0": "w4a4"}}, r"those of single layers go into override"),
    ({"bits": ("w4a4",)}, r"a budget chooses from\. Got \('w4a4',\) without a budget"),
    ({"bits": (4, 8), "budget": calque.Budget(size=0.5)}, r"Got 4; " + FOUR),
    ({"bits": "a8"}, r'^bits must be "w<bits>a<bits>"'),
    ({"override": {"0": 4}}, r"Got 4; " + FOUR),
    ({"override": "0=w8a8"}, r"override is a dict of patterns and bits, such as .* Got '0=w8a8'"),
    ({"override": ["0"]}, r"override is a dict"),
    ({"first_last": 8}, r'first_last is "auto", bits such as "w8a8", or None\. Got 8'),
    ({"plan": "plan.toml"}, r'plan is a calque\.Plan, such as Plan\.load\("plan\.toml"\)'),
    ({"plan": {"0": "w8a8"}}, r"plan is a calque\.Plan"),
    ({"budget": 0.2}, r"budget is a calque\.Budget, such as Budget\(size=0\.13\)\. Got 0\.2"),
    ({"recipe": 3}, r"recipe is the name of a shipped one, a TOML file or a calque\.Recipe\. Got 3"),
    ({"dynamic": [2]}, r"dynamic is a dict of inputs and their axes"),
    ({"dynamic": {"y": {2: torch.export.Dim.AUTO}}}, r"dynamic names inputs of forward: input\. Got 'y'"),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS)
def test_an_option_of_another_kind(options: Mapping[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        quantize(net(), X, **options)


ARGUMENTS: list[tuple[Callable[[], Any], Any, type[Exception], str]] = [
    (lambda: X, net(), SpecError, r"model and calibration are swapped.* Got Tensor and Sequential"),
    (lambda: [X], net(), SpecError, r"swapped.* call quantize\(model, calibration\)"),
    (lambda: X, X, CaptureError, r"Got Tensor; the network comes first and its inputs second"),
    (lambda: "model.pt", X, CaptureError, r"Got str, a file's name; build the network, load its weights"),
    (lambda: lambda x: x, X, CaptureError, r"Got function; pass the module that it calls"),
    (lambda: {"state_dict": net().state_dict(), "epoch": 3}, X, CaptureError, r"with an entry 'state_dict'; build the network"),
    (net, net(), CalibrationError, r"calibration is inputs of the network\. Got the module Sequential"),
    (net, "data.npy", CalibrationError, r"not a file's name\. Got 'data\.npy'; load it first"),
    (net, Path("data.npy"), CalibrationError, r"load it first: torch\.load\(path\), or torch\.from_numpy"),
    (net, [None], CalibrationError, r"a calibration batch is .* Got NoneType"),
    (net, [1.0, 2.0], CalibrationError, r"a calibration batch is .* Got float"),
    (net, X.double(), CalibrationError, r"It runs on input\.float\(\): convert the inputs"),
    (net, X.half(), CalibrationError, r"It runs on input\.float\(\)"),
    (net, X.long(), CalibrationError, r"It runs on input\.float\(\)"),
    (Looked, IDS.float(), CalibrationError, r"It runs on ids\.long\(\)"),
    (lambda: Summed(), [{"pair": [X, X], "y": None}], CalibrationError, r"the model itself fails .*NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "calibration", "kind", "words"), ARGUMENTS)
def test_arguments_that_are_none(model: Callable[[], Any], calibration: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        quantize(model(), calibration)


CONSTANT = "which is a constant of the quantized network"
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("default", (X,), {"temperature": 2}, TypeError, rf"temperature had forward's default at calibration, {CONSTANT}\. Got 2"),
    ("default", (X,), {"mask": X}, TypeError, r"mask had forward's default .* Got a tensor; leave it out, or quantize with it"),
    ("scaled", (X,), {"temperature": 3.0}, TypeError, rf"temperature was 2\.0 at calibration, {CONSTANT}\. Got 3\.0"),
    ("scaled", (X,), {}, TypeError, r"temperature was given at calibration \(2\.0\)\. Pass it in every call"),
    ("plain", (X,), {"temperature": 2}, CalibrationError, r"'temperature' is not a parameter of forward\. forward takes: input"),
    ("plain", (X, X), {}, CalibrationError, r"forward takes at most 1 positional arguments \(input\)\. Got 2"),
    ("plain", (), {}, CalibrationError, r"forward needs the argument\(s\) input\. Got: none"),
    ("plain", (X.numpy(),), {}, TypeError, r"was a tensor at calibration\. Got numpy\.ndarray; pass torch\.from_numpy\(input\)"),
    ("plain", (None,), {}, TypeError, r"input was a tensor at calibration\. Got None"),
    ("plain", (3.0,), {}, TypeError, r"input was a tensor at calibration\. Got 3\.0"),
    ("plain", ((X,),), {}, TypeError, r"input was a tensor at calibration\. Got a tuple of 1; pass it in the same form"),
    ("plain", ({"x": X},), {}, TypeError, r"Got a dict of x; pass it in the same form"),
    ("plain", (X.long(),), {}, TypeError, r"input was captured as torch\.float32\. Got torch\.int64"),
    ("plain", (X[:, :3],), {}, ValueError, r"axis 1 of input was captured as 4\. Got 3\. Calibrate with several sizes"),
    ("plain", (X[0],), {}, ValueError, r"input was captured with 2 axes\. Got 1"),
    ("pair", ([X], X), {}, TypeError, r"pair was a list of 2 at calibration\. Got a list of 1"),
    ("pair", ([X, None], X), {}, TypeError, r"pair\[1\] was a tensor at calibration\. Got None"),
    ("ids", (IDS.float(),), {}, TypeError, r"ids was captured as torch\.int64\. Got torch\.float32"),
]  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("kind", "args", "kwargs", "error", "words"), CALLS)
def test_a_call_in_another_form(
    kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], words: str, exact: bool
) -> None:
    q = quantized(kind).integer() if exact else quantized(kind)

    with pytest.raises(error, match=words):
        q(*args, **kwargs)


def test_the_same_form_is_taken() -> None:
    assert isinstance(quantized("scaled").call_form, CallForm)
    assert quantized("scaled")(X, temperature=2).shape == (16, 4)  # 2 is 2.0
    assert quantized("pair")([X[:3], X[:3]], y=X[:3]).shape == (3, 4)


def test_torch_prints_no_graph_and_logs_nothing_where_it_cannot_capture(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.warns(calque.errors.CaptureWarning, match="captured whole"):
        q = quantize(networks.seeded(Deciding()), X)

    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert not caplog.messages
    assert isinstance(q, calque.PartlyQuantized)
    (note,) = (note for note in q.report.notes if "captured whole" in note)
    assert "if x.sum() > 0: -- what is done there depends on the values of a tensor." in note
    assert "Could not guard" not in note


def test_what_torch_would_have_printed_is_printed_again_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        trace(Deciding(), {"x": X}, {})

    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Deciding(), (X,), strict=False)

    assert "def forward" in capfd.readouterr().err


def test_a_run_folder_needs_a_network_that_is_captured_whole(tmp_path: Path) -> None:
    with pytest.raises(
        CaptureError, match=r"Without a budget, plan, loss, run folder and dynamic axes, calque\.quantize"
    ):
        quantize(networks.seeded(Deciding()), X, run=tmp_path / "run")


class Saved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)


WEIGHTS: list[tuple[Callable[[], object], str]] = [
    (lambda: Saved(), r"holds a Python object \(test_words\.Saved\), as torch\.save\(model\).* Save model\.state_dict\(\)"),
    (lambda: {"epoch": 3}, r"must hold a state dict: names and tensors\. Save model\.state_dict\(\)"),
    (
        lambda: {"model": Saved().state_dict(), "ema": Saved().state_dict()},
        r"several state dicts: model, ema\. Save the one to use alone: torch\.save\(checkpoint\[\"model\"\], file\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), WEIGHTS)
def test_a_weights_file_of_another_kind(content: Callable[[], object], words: str, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "w.pt")

    with pytest.raises(InputError, match=words):
        load_weights(Saved(), tmp_path / "w.pt")


def test_a_whole_model_is_no_calibration_either(tmp_path: Path) -> None:
    torch.save(Saved(), tmp_path / "x.pt")

    with pytest.raises(InputError, match="or a tensor for --calibration"):
        load_calibration(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda state: state, []),
        (lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, ['the entry "state_dict"']),
        (lambda state: {"other": {"a": torch.ones(1)}, "model": state}, ['the entry "model"']),
        (lambda state: {f"module.{key}": value for key, value in state.items()}, ['"module." in front of all names']),
    ],
)
def test_the_state_dict_of_a_checkpoint_is_found_and_said(wrap: Any, notes: list[str], tmp_path: Path) -> None:
    saved, model = Saved(), Saved()
    torch.save(wrap(saved.state_dict()), tmp_path / "w.pt")

    said = load_weights(model, tmp_path / "w.pt")

    assert torch.equal(model.layer.weight, saved.layer.weight)
    assert len(said) == len(notes)
    assert all(words in sentence for words, sentence in zip(notes, said, strict=True))

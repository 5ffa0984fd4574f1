"""Names of arguments, layers and tensors: whatever the user calls them, nothing collides."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.cli import run
from calque.grid.bits import Bits
from calque.network import Network, capture
from calque.network.spelling import respellings
from calque.network.tensors import named_tensors
from calque.quantized.model import QuantizedModel
from calque.quantized.placement import place
from calque.recipe import FAST, Distillation
from networks import Net
from slow import slow

X = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0))
OUTLIERS = X * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 100])
TRAINED = replace(FAST, distillation=Distillation(steps=4))


def journey(model: nn.Module, batch: object, folder: Path, **options: object) -> QuantizedModel:
    """The quantized network after it was reported, saved, loaded, exported and verified."""
    q = calque.quantize(networks.seeded(model), batch, bits="w8a8", **options)  # type: ignore[arg-type]
    assert str(q.report)
    arguments = batch if isinstance(batch, tuple) else (batch,)
    calque.save(q, folder / "q.safetensors")
    assert torch.equal(calque.load(folder / "q.safetensors", model)(*arguments), q(*arguments))
    assert calque.verify(calque.export_onnx(q, folder / "q.onnx"), q, batch).agreement > 0.99
    with torch.no_grad():
        expected = model(*arguments)
        assert F.mse_loss(q(*arguments), expected) < 1e-2 * expected.var()
    return q


class Attention(nn.Module):
    """Arguments called like the layers that read them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (self.query(query) @ self.key(key).transpose(1, 2)).softmax(-1)
        y: Tensor = self.output(weights @ self.value(value)) + query
        return y


@pytest.mark.parametrize("recipe", ["nearest", TRAINED], ids=["nearest", "distilled"])
def test_arguments_may_be_called_like_layers(recipe: object, tmp_path: Path) -> None:
    q = journey(Attention(), (X, X.flip(1), OUTLIERS), tmp_path, recipe=recipe)

    assert list(q.layers) == ["query", "key", "value", "output"]
    assert "query#tensor" in q.plan


class Body(nn.Module):
    """A network whose forward a sub-class has, and whose first layer has the name that is given."""

    def __init__(self, layer: str = "body") -> None:
        super().__init__()
        self.add_module(layer, nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)


def calling(argument: str, layer: str = "body") -> nn.Module:
    source = f"lambda self, {argument}: self.head((self.{layer}({argument}) + {argument}).relu())"
    return type("Calling", (Body,), {"forward": eval(source)})(layer)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["output", slow("torch"), slow("layer_1"), "head"])
def test_an_argument_may_have_any_name(name: str, tmp_path: Path) -> None:
    journey(calling(name), X, tmp_path, recipe="nearest")


@pytest.mark.parametrize("name", ["quantizers", slow("named_0"), "x", slow("add")])
def test_a_layer_may_have_any_name(name: str, tmp_path: Path) -> None:
    q = journey(calling("x", name), X, tmp_path, recipe="nearest")

    assert list(q.layers) == [name, "head"]


def test_factors_stand_beside_a_layer_called_channel_scales(tmp_path: Path) -> None:
    parts = {"norm": nn.LayerNorm(8), "channel_scales": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    model = Net(
        lambda net, x: net.head(F.gelu(net.channel_scales(net.norm(x) * net.gain))), gain=torch.ones(8), **parts
    )
    with torch.no_grad():
        model.gain[7] = 100
    calque.save(q := calque.quantize(model, X, bits="w8a8"), tmp_path / "q.safetensors")

    assert q.facts.scaled
    assert torch.equal(calque.load(tmp_path / "q.safetensors", model)(X), q(X))


def test_a_layer_called_like_a_part_of_graphs_has_an_underscore(tmp_path: Path) -> None:
    q = journey(calling("x", "graph"), X, tmp_path, recipe="nearest")

    assert list(q.layers) == ["graph_", "head"]


# What a module in a ModuleDict may be called, and what its layer is called in plans: code cannot spell the others.
AWKWARD = {
    "a b": "a b", " ": " ", "a'b": "a'b", "#": "#", "[0]": "[0]", "*": "*", "層": "層", "é": "é", "x" * 300: "x" * 300, "0": "0",
    "graph": "graph", "self": "self", "quantizers": "quantizers", "code": "code", "%s{}": "%s{}", "a:b/c": "a:b/c",
    "None": "None_", "class": "class_", "lambda": "lambda_", 'a"b': "a_b", "a\nb": "a_b_", "a\\b": "a_b__", "\0": "_",
    "con\\u0041": "con_u0041", "e\u0301": "é_", "\ud800": "__", "name\u2028x": "name_x",
}  # fmt: skip


class Many(nn.Module):
    """Layers called whatever a dict allows, two of which are asked for by name; their results have these names too."""

    def __init__(self, names: Iterable[str] = AWKWARD) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        self.scales = nn.ParameterDict({name: torch.ones(8) for name in names})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for name, part in self.parts.items():
            x = part(x).relu() * self.scales[name] + x
        return {name: self.head(x) for name in self.parts}


@pytest.fixture(scope="module")
def crowded() -> Network:
    return capture(networks.seeded(Many()), {"x": X})


@pytest.mark.parametrize("name", AWKWARD, ids=ascii)
def test_a_layer_in_a_dict_may_have_any_name(name: str, crowded: Network) -> None:
    given = f"parts.{name}"
    alone = respellings(Many([name])).get(given, given)

    told = [note for note in crowded.left_float if note.startswith(f"{ascii(given)[1:-1]} is called")]

    assert alone.rstrip("_") == f"parts.{AWKWARD[name]}".rstrip("_")  # beside names of the same spelling there are more
    assert f"parts.{AWKWARD[name]}" in crowded.layers
    assert len(told) == (AWKWARD[name] != name)


@pytest.mark.slow
def test_every_awkward_name_makes_the_whole_journey(tmp_path: Path) -> None:
    model = networks.seeded(Many())
    q = calque.quantize(model, X, bits="w8a8", recipe="nearest")
    q.plan.save(tmp_path / "plan.toml")
    assert calque.Plan.load(tmp_path / "plan.toml") == q.plan
    again = calque.quantize(model, X, plan=calque.Plan.load(tmp_path / "plan.toml"), recipe="nearest")
    assert again.plan == q.plan
    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", Many())

    results = loaded(X)

    assert list(results) == list(AWKWARD)
    assert all(torch.equal(value, q(X)[name]) for name, value in results.items())
    assert calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, X).agreement > 0.99


@pytest.mark.slow
def test_every_awkward_name_goes_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in AWKWARD if name != "\ud800"]  # no source file can hold it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "awkward_net", SimpleNamespace(build=lambda: networks.seeded(Many(names))))
    np.save("x.npy", X.numpy())
    arguments = ["quantize", "awkward_net:build", "--calibration", "x.npy", "--recipe", "nearest", "-o", "run"]

    assert run([*arguments, "--bits", "w8a8,w4a8", "--size", "100kB"]) == 0
    for command in (["export", "run", "q.onnx"], ["verify", "q.onnx", "run"], ["plan", "run"], ["report", "run"]):
        assert run(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [slow("a b"), slow("None"), 'a"b', slow("a\nb"), slow("[0]"), slow("層"), slow("graph")]
)
def test_an_argument_may_be_a_dict_of_any_name(name: str, tmp_path: Path) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            y: Tensor = self.head(self.body(x[name]).relu())
            return y

    batch = {"x": {name: X}}
    q = calque.quantize(networks.seeded(Takes()), batch, bits="w8a8", recipe="nearest")
    calque.save(q, tmp_path / "q.safetensors")

    assert torch.equal(calque.load(tmp_path / "q.safetensors", Takes())(**batch), q(**batch))
    assert calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, batch).agreement > 0.99


class Clashing(nn.Module):
    """Layers called like a product, a grid, a result and an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"input": nn.Linear(8, 8), "output": nn.Linear(8, 8)})
        self.matmul, self.add = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body["output"](self.body["input"](x)) + self.matmul(x)
        z: Tensor = self.add(y @ y.transpose(1, 2) @ x) + x
        return z


def test_layers_products_tensors_and_grids_have_names_of_their_own(tmp_path: Path) -> None:
    model = networks.seeded(Clashing())
    network = capture(model, {"x": X})
    tensors = named_tensors(network)
    edges = place(network, {name: Bits(8, 8) for name in network.layers}, "integer")
    everything = [*network.layers, *tensors, *(edge.name for edge in edges if edge.name not in tensors)]

    assert {"matmul", "add"} <= set(network.layers)
    assert len(everything) == len(set(everything))
    journey(model, X, tmp_path, recipe="nearest")


def test_inputs_of_the_file_are_called_like_the_arguments(tmp_path: Path) -> None:
    q = calque.quantize(networks.seeded(Attention()), (X, X, X), recipe="nearest")
    graph = onnx.load(calque.export_onnx(q, tmp_path / "q.onnx")).graph

    assert [value.name for value in graph.input] == ["query", "key", "value"]

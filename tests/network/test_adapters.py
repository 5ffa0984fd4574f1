"""Layers inside a module that is a layer itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import calque
import networks
from calque.allocation.costs import values_outside_layers
from calque.network import capture

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class LowRank(nn.Linear):
    """An adapter, which runs before the layer or behind it."""

    def __init__(self, *, first: bool, up: str = "up"):
        super().__init__(8, 8)
        self.first, self.name = first, up
        self.down = nn.Linear(8, 2, bias=False)
        self.add_module(up, nn.Linear(2, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        up = self.get_submodule(self.name)
        extra: Tensor | None = up(self.down(x)) if self.first else None
        y = super().forward(x)
        return y + (up(self.down(x)) if extra is None else extra)


class Gated(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(1, 4, 3, padding=1)
        self.gate, self.norm, self.gain = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(super().forward(x)) * torch.sigmoid(self.gate(x)) * self.gain
        return y


class Outer(nn.Linear):
    """Three layers deep."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.inner = LowRank(first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(self.inner(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LowRank(first=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(F.relu(self.layer(x)))
        return y


class Rotated(nn.Module):
    """A parametrization with a layer of its own, which computes on weights."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(8, 8, bias=False)

    def forward(self, weight: Tensor) -> Tensor:
        y: Tensor = self.turn(weight)
        return y


def parametrized() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Rotated())
    return layer


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (LowRank(first=True), ["0.down", "0.up", "0.linear"]),
        (LowRank(first=False), ["0.linear", "0.down", "0.up"]),
        (LowRank(first=False, up="linear"), ["0.linear_", "0.down", "0.linear"]),
        (Outer(), ["0.inner.down", "0.inner.up", "0.inner.linear", "0.linear"]),
        (Twice(), ["0.layer.linear", "0.layer.down", "0.layer.up", "0.layer.linear#2", "0.layer.down#2", "0.layer.up#2"]),
        (parametrized(), ["0"]),
    ],
    ids=["first", "last", "same name", "deep", "twice", "parametrized"],
)  # fmt: skip
def test_a_layer_and_the_layers_inside_it_are_layers(layer: nn.Module, names: list[str]) -> None:
    model = networks.seeded(nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3)))

    network = capture(model, {"input": X})

    assert list(network.layers) == [*names, "2"]
    assert values_outside_layers(network) == 0
    with torch.no_grad():
        torch.testing.assert_close(network.module(X)[0], model(X), rtol=1e-4, atol=1e-5)


def test_a_convolution_with_a_gate_inside_is_folded_with_its_norm() -> None:
    model, x = networks.seeded(nn.Sequential(Gated(), nn.ReLU())), networks.images(8, seed=0)

    network = capture(model, {"input": x})

    assert list(network.layers) == ["0.conv2d", "0.gate"]
    assert network.left_float == ()
    assert values_outside_layers(network) == 4  # the gain
    with torch.no_grad():
        torch.testing.assert_close(network.module(x)[0], model(x), rtol=1e-4, atol=1e-5)


def test_adapters_are_fitted_saved_and_exported(tmp_path: Path) -> None:
    model = networks.seeded(nn.Sequential(LowRank(first=True), nn.ReLU(), nn.Linear(8, 3)))

    q = calque.quantize(model, X, bits="w8a8", override={"0.linear": "w6a8"})
    calque.save(q, tmp_path / "q")

    assert str(q.plan["0.linear"]) == "w6a8"
    assert torch.equal(calque.load(tmp_path / "q", model)(X), q(X))
    assert calque.verify(calque.export_onnx(q, tmp_path / "q.onnx"), q, X).agreement > 0.95
    with torch.no_grad():
        assert (q(X) - model(X)).square().mean() < 0.01 * model(X).var()

"""Weights with a scale for each group of inputs: fits, bits, costs, files."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import calque
from calque.allocation.costs import layer_size
from calque.errors import SpecError
from calque.fitting.rounding import Metric, initial_scale, refitted_groups
from calque.grid.arithmetic import by_input
from calque.grid.bits import Bits
from calque.grid.ranges import weight_scale
from calque.network import Geometry
from calque.quantized.modules import QuantizedLayer
from calque.recipe import ACCURATE, Distillation

ROWS = 256


class Net(nn.Module):
    """Linear layers whose inputs have weights of very different sizes, the small ones side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 20)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.mul_(torch.exp(torch.randn(1, 64).sort().values))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return y


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))


def error(net: nn.Module, q: nn.Module) -> float:
    fresh = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference: Tensor = net(fresh) - q(fresh)
    return difference.square().mean().item()


@pytest.mark.parametrize("recipe", ["nearest", "sequential", "fast"])
def test_groups_lower_the_error_of_every_solver(net: nn.Module, x: Tensor, recipe: str) -> None:
    rows, groups = (calque.quantize(net, x, bits=bits, recipe=recipe, seed=0) for bits in ("w3", "w3g16"))

    assert {name: layer.group for name, layer in groups.layers.items()} == {"first": None, "second": 16, "third": None}
    assert groups.layers["second"].scale.shape == (32, 4)
    assert error(net, groups) < 0.9 * error(net, rows)


def test_layers_that_are_no_multiple_of_the_group_have_scales_by_channel(net: nn.Module, x: Tensor) -> None:
    q = calque.quantize(net, x, bits="w4g64", recipe="nearest", first_last=None)

    assert [str(bits) for bits in q.plan.values()] == ["w4g64", "w4g64", "w4"]


def test_convolutions_and_tables_have_no_groups() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv, self.head = nn.Embedding(10, 16), nn.Conv1d(16, 16, 1), nn.Linear(16, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.conv(self.table(ids).mT).mT)
            return y

    torch.manual_seed(0)
    ids = torch.randint(10, (16, 6), generator=torch.Generator().manual_seed(0))
    q = calque.quantize(Mixed(), ids, bits="w4g16", recipe="nearest", first_last=None)

    assert [str(bits) for bits in q.plan.values()] == ["w4", "w4", "w4"]
    assert torch.equal(q.layers["table"].codes, q.layers["head"].codes)


@pytest.mark.parametrize(("bits", "width"), [("w4g16", 4), ("w3g32", 4), ("w8g32", 8)])
def test_files_have_products_with_packed_codes(
    net: nn.Module, x: Tensor, bits: str, width: int, tmp_path: Path
) -> None:
    q = calque.quantize(net, x, bits=bits, recipe="nearest", first_last=None)
    path = calque.export_onnx(q, tmp_path / "q.onnx")

    products = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    assert {attribute.name: attribute.i for attribute in products[0].attribute} == {
        "K": 64, "N": 64, "bits": width, "block_size": Bits.parse(bits).group, "accuracy_level": 1,
    }  # fmt: skip
    assert len(products) == 3
    assert calque.verify(path, q, x).agreement == 1.0


def test_qonnx_files_have_a_scale_per_group(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    q = calque.quantize(net, x, bits="w4g32", recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "q.onnx", target="qonnx")

    assert calque.verify(path, q, x, target="qonnx").agreement == 1.0


def test_saved_networks_come_back(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    q = calque.quantize(net, x, bits="w4g32", recipe="nearest")
    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", Net())

    assert loaded.plan == q.plan
    assert torch.equal(loaded(x), q(x))


def test_distillation_moves_the_scales_of_groups(net: nn.Module, x: Tensor) -> None:
    fast = calque.quantize(net, x, bits="w2g16", recipe="fast")
    few = replace(ACCURATE, distillation=Distillation(steps=60))
    q = calque.quantize(net, x, bits="w2g16", recipe=few)

    assert not torch.equal(q.layers["second"].scale, fast.layers["second"].scale)
    assert q.report is not None
    assert q.report.distilled is not None
    assert q.report.distilled.after < q.report.distilled.before


def test_a_budget_chooses_between_group_sizes(net: nn.Module, x: Tensor) -> None:
    candidates = ("w8", "w4g16", "w4", "w2g16")
    q = calque.quantize(net, x, bits=candidates, budget=calque.Budget(size=0.25), recipe="fast", first_last=None)

    assert q.report is not None
    assert q.report.file_size <= 0.25 * q.report.float_size
    assert len({str(bits) for bits in q.plan.values()} & {"w4g16", "w2g16"}) > 0
    sizes = {layer.name: layer.size for layer in q.report.layers}
    second = q.layers["second"]
    groups = 1 if second.group is None else 64 // second.group
    assert sizes["second"] == layer_size(64 * 32, 32, second.bits, Geometry("linear"), groups)


def test_layer_size_counts_each_scale() -> None:
    linear = Geometry("linear")

    assert layer_size(64 * 32, 32, 4, linear, 4) == layer_size(64 * 32, 32, 4, linear) + 3 * 32 * 4


def test_scales_of_groups_repeat_along_the_inputs() -> None:
    scale, like = torch.tensor([[[1.0, 2.0]]]), torch.zeros(1, 1, 6)

    assert by_input(scale, like).tolist() == [[[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]]]
    assert by_input(scale[..., 0], like).tolist() == [[[1.0]]]


@pytest.mark.parametrize("kind", ["minmax", "least_squares", "output"])
def test_weight_scales_of_groups_are_those_of_the_groups_alone(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(1, 5, 32, generator=generator), torch.randn(64, 32, generator=generator)
    power = (rows.T @ rows / 64)[None]
    found = weight_scale(weight, 3, kind, power, 16)  # type: ignore[arg-type]
    second = weight_scale(weight[..., 16:], 3, kind, power[:, 16:, 16:])  # type: ignore[arg-type]

    assert found.shape == (1, 5, 2)
    assert torch.equal(found[..., 1], second)


def test_refitted_groups_lower_the_error_to_a_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 8, generator=generator)
    metric = Metric.of((rows.T @ rows / 100 + 0.1 * torch.eye(8))[None])
    weight = torch.randn(1, 8, 3, generator=generator)
    groups = [torch.tensor([0, 3, 5, 6]), torch.tensor([1, 2, 4, 7])]
    scale = initial_scale(weight, torch.ones(1, 8), 3).expand(-1, 8, -1)
    codes = (weight / scale).round().clamp(-4, 3)

    def loss(scale: Tensor) -> float:
        return metric.error(codes * scale - weight).sum().item()

    fitted = scale
    for _ in range(50):
        fitted = refitted_groups(metric, weight, codes, fitted, groups)
    assert loss(fitted) < loss(scale)
    for group in groups:
        assert (fitted[:, group] == fitted[:, group[:1]]).all()
        for factor in (0.99, 1.01):
            moved = fitted.clone()
            moved[:, group] *= factor
            assert loss(moved) > loss(fitted)


@pytest.mark.parametrize("text", ["w4g48", "g32"])
def test_groups_need_a_size_that_runtimes_read(text: str) -> None:
    with pytest.raises(SpecError, match=r'groups are of 16, .* "w4g32". Got'):
        Bits.parse(text)


@pytest.mark.parametrize("text", ["a8g32", "w4a8g32", "w4g"])
def test_groups_need_float_activations_and_a_number(text: str) -> None:
    with pytest.raises(SpecError, match=r'bits are written .*"w<bits>g<group>"'):
        Bits.parse(text)


def test_a_layer_refuses_groups_on_quantized_inputs() -> None:
    codes, bias = torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(SpecError, match="scales of groups"):
        QuantizedLayer(Geometry("linear"), codes, torch.ones(2, 2), bias, torch.ones(2), bits=4)

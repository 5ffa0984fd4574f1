"""A network that computes the same in other units is quantized to the same codes: nothing in a run has a size of its own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.errors import CaptureError
from calque.fitting.layer import solve_
from calque.fitting.problem import Grid, LayerProblem
from calque.grid.bits import Placement
from calque.network import capture
from calque.quantized.model import QuantizedModel
from calque.recipe import RECIPES, AdaQuant, ClosedForm, Recipe
from calque.settings import Method
from recipes import shortened
from slow import slow

INPUTS = networks.images(20, seed=0, channels=2, side=5)
POWERS = [(-40, 30), (30, -40), (-90, -90)]  # of two: of the inputs, of the outputs
SHORT = {name: shortened(recipe, steps=6) for name, recipe in RECIPES.items() if name != "accurate"}
# its tuning follows the softmax of the outputs, which is another one in another unit
SHORT["paper-2021"] = replace(SHORT["paper-2021"], tuning=None)


class Small(nn.Module):
    """A convolution with a batch norm, a residual add, a pool and a linear layer, whose outputs are no scores of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.conv(x) + x).relu()
        values: Tensor = self.head(x.mean((2, 3)))[:, :, None]
        return values


def small(inputs: int, outputs: int) -> nn.Module:
    """The network for inputs in units of 2^-inputs, its outputs in units of 2^-outputs."""
    network = networks.seeded(Small())
    with torch.no_grad():
        network.get_submodule("stem").get_parameter("weight").div_(2.0**inputs)
        for tensor in network.get_submodule("head").parameters():
            tensor.mul_(2.0**outputs)
    return network


def quantized(powers: tuple[int, int], bits: str, recipe: Recipe, placement: Placement) -> QuantizedModel:
    return calque.quantize(small(*powers), INPUTS * 2.0 ** powers[0], bits=bits, recipe=recipe, placement=placement)


def codes(model: QuantizedModel) -> dict[str, Tensor]:
    found = {f"{name}.{key}": getattr(layer, key) for name, layer in model.layers.items() for key in ("codes", "bias")}
    return found | {name: grid.zero_point for name, grid in model.quantizers.items()}


@pytest.mark.parametrize(("bits", "placement"), [slow("w8a8", "integer"), ("w4a4", "integer"), slow("w4a4", "inputs")])
@pytest.mark.parametrize("recipe", SHORT)
@pytest.mark.filterwarnings("ignore:fewer calibration rows")
def test_a_power_of_two_on_inputs_or_outputs_changes_no_code(recipe: str, bits: str, placement: Placement) -> None:
    plain = quantized((0, 0), bits, SHORT[recipe], placement)

    for inputs, outputs in POWERS:
        scaled = quantized((inputs, outputs), bits, SHORT[recipe], placement)

        assert all(torch.equal(value, codes(scaled)[name]) for name, value in codes(plain).items())
        assert torch.equal(scaled(INPUTS * 2.0**inputs), plain(INPUTS) * 2.0**outputs)


@pytest.mark.filterwarnings("ignore:fewer calibration rows")
def test_scores_of_classes_in_another_unit_leave_the_codes_of_weights() -> None:
    q, scaled = (
        calque.quantize(nn.Sequential(small(0, power), nn.Flatten()), INPUTS, bits="w4a4", recipe="fast")
        for power in (0, -40)
    )

    assert all(torch.equal(layer.codes, scaled.layers[name].codes) for name, layer in q.layers.items())


@pytest.mark.parametrize("recipe", ["nearest", "fast"])
@pytest.mark.filterwarnings("ignore:fewer calibration rows")
def test_choices_under_a_budget_do_not_depend_on_units(recipe: str) -> None:
    def plan(powers: tuple[int, int]) -> dict[str, object]:
        budget = calque.Budget(size=3450)
        found = calque.quantize(
            small(*powers), INPUTS * 2.0 ** powers[0], bits=("w8a8", "w4a4"), budget=budget, recipe=SHORT[recipe]
        )
        return {**found.plan} | {name: value.tolist() for name, value in codes(found).items()}

    assert plan((0, 0)) == plan((-40, 30))


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x).mean((2, 3)))
        return logits


@pytest.mark.parametrize("recipe", ["nearest", "light", "fast", "sequential"])
@pytest.mark.parametrize("unit", [1.0, 2.0**-40, 2.0**30])
@pytest.mark.filterwarnings("ignore:fewer calibration rows")
def test_a_channel_of_zeros_or_nearly_zeros_keeps_the_value_of_its_bias(recipe: str, unit: float) -> None:
    network = networks.seeded(Dead())
    conv = network.conv
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight[1], conv.bias[1] = 0.0, 5.0
        conv.weight[2] *= 1e-9
        conv.bias[2] = -4.5
        conv.weight[3], conv.bias[3] = 0.0, 0.0
        conv.weight /= unit

    q = calque.quantize(network, INPUTS * unit, bits="w8a8", recipe=SHORT[recipe])
    layer = q.layers["conv"]

    torch.testing.assert_close(layer.real_bias[1:], torch.tensor([5.0, -4.5, 0.0]), rtol=1e-4, atol=1e-9)
    assert layer.bias.abs().max() <= 2**30
    assert (layer.scale >= torch.finfo(torch.float32).tiny).all()


def test_a_network_of_zeros_is_quantized_to_zeros() -> None:
    network = small(0, 0)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.zero_()

    q = calque.quantize(network, INPUTS, bits="w8a8")

    assert not q(INPUTS).any()


def test_an_input_too_small_for_a_normal_scale_is_named() -> None:
    network = networks.seeded(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    inputs = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) * 1e-37

    q = calque.quantize(network, inputs, bits="w8a8")

    assert any("layer 0: its input spans" in note and "no normal float32 number" in note for note in q.report.notes)


class Random(nn.Module):
    """Returns something else each time, all of it small."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        noisy: Tensor = self.head(x) * torch.rand_like(x[:, :1]) * 1e-9
        return noisy


def test_a_network_that_is_random_in_small_units_is_refused() -> None:
    with pytest.raises(CaptureError, match="must be a function of its inputs alone"):
        capture(networks.seeded(Random()), {"x": torch.rand(4, 3)})


def layer_problem(unit: float) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1, 3, 6, generator=generator), torch.randn(1, 1, 3, generator=generator)
    patches = torch.randn(1, 60, 6, generator=generator)
    everything = torch.arange(60)
    return LayerProblem(
        patches * unit, (patches @ weight.mT + bias) * unit, weight, bias * unit, everything[:48], everything[48:], torch.relu
    )  # fmt: skip


@pytest.mark.parametrize("method", [AdaQuant(steps=10), ClosedForm(rounds=10)], ids=str)
def test_a_fit_in_any_unit_has_the_same_codes(method: Method) -> None:
    def fit(unit: float) -> tuple[Tensor, Tensor, float]:
        grid = Grid(torch.tensor(0.1 * unit), torch.tensor(30, dtype=torch.int32), 63)
        found = solve_(layer_problem(unit), grid, 4, method, torch.Generator().manual_seed(0), weight_range="output")
        return found.codes, found.bias / unit, found.after

    plain, small_unit = fit(1.0), fit(2.0**-80)

    assert torch.equal(plain[0], small_unit[0])
    assert torch.equal(plain[1], small_unit[1])
    assert plain[2] == small_unit[2]

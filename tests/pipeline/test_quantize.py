import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import calque
import networks
from calque.errors import CalibrationError, CalibrationWarning, SpecError
from calque.grid.bits import FLOAT, Bits, Placement, Plan
from calque.quantized.model import QuantizedModel
from calque.recipe import FAST, NEAREST, RATES, SEQUENTIAL, AdaQuant, Blocks
from networks import Net
from slow import slow

INPUTS = networks.images(60, seed=0)
QUICK = replace(SEQUENTIAL, fit=AdaQuant(steps=24))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return networks.seeded(networks.Residual())


@pytest.fixture(scope="module")
def rounded(net: nn.Module) -> QuantizedModel:
    """The network at 8 bits, which no test may change."""
    return calque.quantize(net, INPUTS, recipe="nearest")


def layers_of(q: QuantizedModel) -> dict[str, str]:
    return {name: str(q.plan[name]) for name in ("stem", "conv1", "conv2", "down", "head")}


def same_numbers(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(model: nn.Module, q: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        expected: Tensor = model(inputs)
        error: float = ((q(inputs) - expected).square().mean() / expected.var()).item()
        return error


# ---- bits, overrides, plans


@pytest.mark.parametrize(
    ("bits", "first_last", "ends", "middle"),
    [
        (None, "auto", "w8a8", "w8a8"),
        ("w4a4", "auto", "w8a8", "w4a4"),
        ("w4", "auto", "w8", "w4"),
        ("w4a4", None, "w4a4", "w4a4"),
        ("w4a4", "w6a5", "w6a5", "w4a4"),
        ("w4a4", "float", "float", "w4a4"),
    ],
)
def test_bits_and_first_last_decide_every_layer(
    net: nn.Module, bits: str | None, first_last: str | None, ends: str, middle: str
) -> None:
    q = calque.quantize(net, INPUTS, bits=bits, first_last=first_last, recipe="nearest")

    assert layers_of(q) == {"stem": ends, "conv1": middle, "conv2": middle, "down": middle, "head": ends}
    assert all(q.layers[name].bits == q.plan[name].weight for name in q.layers)


def test_codes_fit_the_bits_of_their_layer(net: nn.Module) -> None:
    q = calque.quantize(net, INPUTS, bits="w3a4", recipe=QUICK)

    for name in ("conv1", "conv2", "down"):
        codes = q.layers[name].codes
        assert -4 <= codes.min() < codes.max() <= 3


def test_an_override_reaches_its_layers_alone_and_none_keeps_one_float(net: nn.Module) -> None:
    q = calque.quantize(net, INPUTS, bits="w4a4", override={"conv?": "w6a5", "conv2": None}, recipe="nearest")

    assert layers_of(q) == {"stem": "w8a8", "conv1": "w6a5", "conv2": "float", "down": "w4a4", "head": "w8a8"}
    assert "conv2" not in q.layers
    assert q.quantizers["conv1.input"].bits == 5


def test_an_override_of_a_tensor_sets_its_bits(net: nn.Module) -> None:
    q = calque.quantize(
        net, INPUTS, bits="w8a8", override={"stem.output": "a5", "conv2.output": None}, recipe="nearest"
    )

    assert q.quantizers["stem.output"].bits == 5
    assert q.plan["stem.output"] == Bits(None, 5)
    assert "conv2.output" not in q.quantizers
    assert q.plan["conv2.output"] == FLOAT


def test_an_override_of_a_tensor_that_one_layer_reads_is_obeyed(net: nn.Module) -> None:
    q = calque.quantize(net, INPUTS, bits="w4a4", override={"conv1.output": "a6"}, recipe="nearest")

    assert q.plan["conv1.output"] == Bits(None, 6)
    assert q.quantizers["conv1.output"].bits == 6


def test_an_override_of_a_tensor_is_refused_where_layers_alone_have_grids(net: nn.Module) -> None:
    with pytest.raises(
        SpecError, match=r"grids of their own in the placement \"integer\" only. Got bits for stem.output"
    ):
        calque.quantize(net, INPUTS, override={"stem.output": "a6"}, recipe="nearest", placement="inputs")


def test_weights_alone_leave_all_activations_float(net: nn.Module) -> None:
    assert not calque.quantize(net, INPUTS, bits="w4", recipe="nearest").quantizers


def test_weights_alone_in_the_inputs_placement_leave_all_activations_float(net: nn.Module) -> None:
    q = calque.quantize(net, INPUTS, bits="w4", recipe=QUICK, placement="inputs")

    assert not q.quantizers
    assert all(layer.bias_scale is None for layer in q.layers.values())
    assert relative_error(net, q, INPUTS) < 0.1


def test_everything_float_is_the_network(net: nn.Module) -> None:
    q = calque.quantize(net, INPUTS, bits="float", placement="inputs")

    torch.testing.assert_close(q(INPUTS), net(INPUTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_the_plan_of_a_run_reproduces_it(net: nn.Module, placement: Placement) -> None:
    override = {"conv1": "w3a6", "down": None}
    first = calque.quantize(net, INPUTS, bits="w4a5", override=override, recipe=QUICK, placement=placement)

    again = calque.quantize(net, INPUTS, plan=Plan.parse(first.plan.to_toml()), recipe=QUICK, placement=placement)

    assert again.plan == first.plan
    assert same_numbers(again, first)


def test_an_override_changes_a_plan(net: nn.Module) -> None:
    plan = calque.quantize(net, INPUTS, bits="w4a4", recipe="nearest").plan

    q = calque.quantize(net, INPUTS, plan=plan, override={"down": "w2a3"}, recipe="nearest")

    assert layers_of(q) == {"stem": "w8a8", "conv1": "w4a4", "conv2": "w4a4", "down": "w2a3", "head": "w8a8"}


GOOD = Plan(dict.fromkeys(("stem", "conv1", "conv2", "down", "head"), Bits(4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "int8"}, "bits are written"),
        ({"bits": "w9a8"}, r"bits must be an int in \[2, 8\]"),
        ({"bits": "a8"}, 'bits must be "w<bits>a<bits>"'),
        ({"bits": ("w8a8", "w4a4")}, "candidates that a budget chooses from"),
        ({"bits": "w4a4", "budget": calque.Budget(size=0.2)}, "a budget chooses from several bits"),
        ({"bits": ("w4a4",), "budget": calque.Budget(size=0.2), "plan": GOOD}, "budget and plan exclude each other"),
        ({"bits": (), "budget": calque.Budget(size=0.2)}, "at least one candidate"),
        ({"workers": 0}, "workers must be an int from 1 to 4,096"),
        ({"loss": "l1"}, 'loss is "kl", "mse" or a function'),
        ({"bits": "w4a4", "plan": GOOD}, "bits and plan exclude each other"),
        (
            {"plan": Plan({"stem": Bits(4, 4)})},
            r"Missing: \['conv1', 'conv2', 'down', 'head'\]; unknown: \[\]",
        ),
        ({"plan": Plan({**GOOD, "tail": Bits(4, 4)})}, r"Missing: \[\]; unknown: \['tail'\]"),
        ({"plan": Plan({**GOOD, "head": Bits(None, 4)})}, "layer head: bits must be"),
        ({"plan": Plan({**GOOD, "stem.output": Bits(4, 4)})}, "tensor stem.output: bits must be"),
        ({"override": {"tail": "w4a4"}}, "'tail' matches no layer or tensor. The names are: stem, conv1"),
        ({"override": {"head": "four"}}, "bits are written"),
        ({"first_last": "a8"}, "first_last must be"),
        ({"recipe": "best"}, "recipe is one of"),
        ({"placement": "everywhere"}, 'placement is "integer" or "inputs". Got \'everywhere\''),
        ({"memory": "much"}, "a size is written as a number with a unit"),
    ],
)
def test_an_option_that_breaks_a_rule_is_refused(net: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        calque.quantize(net, INPUTS, **{"recipe": NEAREST, **options})  # type: ignore[arg-type]  # wrong on purpose


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(SpecError, match="no convolution, linear layer or embedding"):
        calque.quantize(nn.Sequential(nn.ReLU()), INPUTS)


def test_a_layer_and_a_tensor_of_the_same_name_both_stay_in_the_plan() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.c(x))
        z: Tensor = net.get_submodule("add")(y) + y
        return z.sigmoid()

    q = calque.quantize(
        Net(forward, c=nn.Conv2d(1, 4, 3), add=nn.Conv2d(4, 4, 1)), INPUTS, bits="w4a4", recipe="nearest"
    )

    assert {bits.weight for name, bits in q.plan.items() if name in q.layers} == {8}
    assert len(q.plan) == len(q.layers) + len(q.report.tensors)
    assert len(q.report.tensors) == 3  # both convolutions and the sum


# ---- results


@pytest.mark.parametrize(
    ("recipe", "placement"),
    [(NEAREST, "integer"), (QUICK, "inputs"), slow(NEAREST, "inputs"), slow(QUICK, "integer")],
    ids=lambda value: getattr(value, "name", value),
)
def test_eight_bits_are_close_to_float_and_more_bits_closer(
    net: nn.Module, placement: Placement, recipe: calque.Recipe
) -> None:
    errors = [
        relative_error(net, calque.quantize(net, INPUTS, bits=bits, recipe=recipe, placement=placement), INPUTS)
        for bits in ("w2a2", "w4a4", "w8a8")
    ]

    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 1e-3


def test_the_placements_quantize_what_they_say(net: nn.Module) -> None:
    grids = {p: calque.quantize(net, INPUTS, recipe="nearest", placement=p).quantizers for p in ("inputs", "integer")}

    assert list(grids["inputs"]) == [f"{name}.input" for name in ("stem", "conv1", "conv2", "down", "head")]
    assert len(grids["integer"]) > len(grids["inputs"])


def test_sequential_is_nearer_to_float_than_nearest_at_four_bits(
    trained: networks.Residual, calibration: Tensor, test_inputs: Tensor
) -> None:
    errors = {
        recipe: relative_error(
            trained, calque.quantize(trained, calibration, bits="w4a4", recipe=recipe, seed=0), test_inputs
        )
        for recipe in ("nearest", "sequential")
    }

    assert errors["sequential"] < 0.6 * errors["nearest"]


def test_the_same_seed_gives_the_same_bits_twice(net: nn.Module) -> None:
    one, two = (calque.quantize(net, INPUTS, bits="w4a4", recipe=QUICK, seed=5) for _ in range(2))

    assert same_numbers(one, two)
    assert one.report.seed == 5


def test_another_seed_gives_other_bits(net: nn.Module) -> None:
    one, other = (calque.quantize(net, INPUTS, bits="w4a4", recipe=QUICK, seed=seed) for seed in (5, 6))

    assert not same_numbers(one, other)


def test_a_run_neither_reads_nor_moves_the_global_random_state(net: nn.Module) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = calque.quantize(net, INPUTS, bits="w4a4", recipe=QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)

    assert same_numbers(one, calque.quantize(net, INPUTS, bits="w4a4", recipe=QUICK))


@pytest.mark.parametrize("training", [True, False])
def test_the_float_model_and_its_inputs_are_untouched(training: bool) -> None:
    net, inputs = networks.seeded(networks.Residual()).train(training), INPUTS.clone()
    state, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]

    q = calque.quantize(net, inputs, bits="w4a4", recipe=QUICK)

    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == flags
    assert torch.equal(inputs, INPUTS)
    assert any("train mode" in note for note in q.report.notes) == training
    assert relative_error(net.eval(), q, INPUTS) < 0.2


@pytest.mark.parametrize("memory", ["1MB", "1B"])
def test_a_small_memory_gives_identical_results(memory: str) -> None:
    net = Net(lambda net, x: net.b(F.relu(net.a(x))), a=nn.Conv2d(1, 8, 3), b=nn.Conv2d(8, 4, 3))
    inputs = networks.images(120, seed=0, side=24)

    small, large = (calque.quantize(net, inputs, bits="w4a4", recipe=QUICK, memory=m) for m in (memory, "2GB"))

    assert same_numbers(small, large)


def test_progress_counts_every_layer_in_every_phase(net: nn.Module) -> None:
    calls: list[tuple[str, int, int]] = []

    calque.quantize(net, INPUTS, recipe=QUICK, progress=lambda *call: calls.append(call))

    assert calls == [(phase, done, 5) for phase in ("fit", "statistics") for done in range(1, 6)]


def test_progress_reaches_its_total_where_a_layer_stays_float(net: nn.Module) -> None:
    calls: list[tuple[str, int, int]] = []

    calque.quantize(net, INPUTS, recipe=QUICK, override={"conv1": None}, progress=lambda *call: calls.append(call))

    assert calls[-1][1] == calls[-1][2]


# ---- forms of networks and calibration


def forms() -> Iterator[tuple[str, object]]:
    labels = torch.zeros(60)
    yield "loader of images and labels", DataLoader(TensorDataset(INPUTS, labels), batch_size=60)
    yield "list", [INPUTS]
    yield "dict", {"image": INPUTS}
    yield "list of dicts", [{"image": INPUTS}]


@pytest.mark.parametrize(("form", "calibration"), list(forms()), ids=[name for name, _ in forms()])
def test_every_form_of_calibration_gives_the_same_network(
    net: nn.Module, rounded: QuantizedModel, form: str, calibration: object
) -> None:
    assert same_numbers(calque.quantize(net, calibration, recipe="nearest"), rounded)


class TwoWays(nn.Module):
    """Two inputs, one of them keyword-only; a dict of outputs; one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 3, padding=1)
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, *, right: Tensor) -> dict[str, Tensor]:
        a, b = F.relu(self.embed(left)), F.relu(self.embed(right))
        joined = F.relu(self.mix(a) + b)
        return {"logits": self.head(joined.mean((2, 3))), "map": joined}


@pytest.mark.parametrize("recipe", [NEAREST, FAST, QUICK], ids=["nearest", "fast", "sequential"])
def test_several_inputs_and_outputs_and_a_shared_layer_are_quantized(recipe: calque.Recipe) -> None:
    net = networks.seeded(TwoWays())
    batch: Mapping[str, Tensor] = {"left": INPUTS, "right": INPUTS.flip(0)}

    q = calque.quantize(net, batch, bits="w6a8", recipe=recipe)

    assert list(q.layers) == ["embed", "embed#2", "mix", "head"]
    expected, received = net(**batch), q(INPUTS, right=INPUTS.flip(0))
    assert received.keys() == expected.keys()
    for name in expected:
        error = (received[name] - expected[name]).square().mean() / expected[name].var()
        assert error < 0.01, name


@pytest.mark.parametrize("recipe", [FAST, QUICK], ids=["fast", "sequential"])
def test_a_layer_called_twice_has_one_set_of_codes(recipe: calque.Recipe) -> None:
    net = Net(lambda net, x: net.c(F.relu(net.c(x))), c=nn.Conv2d(1, 1, 3, padding=1))

    q = calque.quantize(net, INPUTS, bits="w4a4", first_last=None, recipe=recipe)

    assert torch.equal(q.layers["c"].codes, q.layers["c#2"].codes)
    assert [layer.size for layer in q.report.layers] == [17, 12]  # 9 codes of 4 bits are 5 bytes


def test_image_sizes_that_differ_between_batches_stay_free() -> None:
    net = Net(
        lambda net, x: net.b(F.relu(net.a(x))),
        a=nn.Conv2d(1, 4, 3, padding=1),
        b=nn.Conv2d(4, 1, 3, padding=1),
    )

    q = calque.quantize(net, [networks.images(9, 0, side=8), networks.images(9, 1, side=10)], recipe="nearest")

    larger = networks.images(2, seed=2, side=17)
    assert q(larger).shape == larger.shape
    assert relative_error(net, q, larger) < 0.01


def test_a_named_axis_stays_free() -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Conv2d(1, 4, 3, padding=1))
    free = {"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}

    q = calque.quantize(net, INPUTS, recipe="nearest", dynamic=free)

    assert q(networks.images(2, seed=2, side=17)).shape == (2, 4, 17, 17)


# ---- weak or bad data


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nan", "must be finite. Batch 0 has NaN"),
        ("-inf", "Batch 0 has larger values in image, and the network returns NaN"),
        ("-1e30", "Batch 0 has larger values in image, and the network returns NaN or values as large"),
    ],
)
def test_inputs_that_are_not_finite_are_refused(net: nn.Module, value: str, message: str) -> None:
    spoiled = INPUTS.clone()
    spoiled[3, 0, :2, :2] = float(value)

    with pytest.raises(CalibrationError, match=message):
        calque.quantize(net, spoiled)


def test_no_inputs_are_refused(net: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="at least one input"):
        calque.quantize(net, INPUTS[:0])


def test_a_network_whose_values_explode_is_refused_with_the_layer() -> None:
    net = networks.small()
    net.state_dict()["3.weight"].fill_(1e38)

    with pytest.raises(CalibrationError, match="layer 3: the float network's output is NaN or infinite"):
        calque.quantize(net, INPUTS.abs() * 100)


@pytest.mark.parametrize("recipe", ["nearest", "light", "fast"])
def test_a_network_whose_squares_explode_is_refused_with_the_layer(recipe: str) -> None:
    net = networks.small()
    net.state_dict()["0.weight"].fill_(1e22)

    with pytest.raises(CalibrationError, match=r"layer 0: the float network's output reaches \de\+2\d"):
        calque.quantize(net, INPUTS, bits="w4a4", recipe=recipe)


def test_inputs_of_a_shape_that_the_network_refuses_are_refused(net: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="the model itself fails on the calibration inputs"):
        calque.quantize(net, networks.images(4, seed=0, channels=3))


def test_a_later_batch_of_a_shape_that_the_network_refuses_is_refused(net: nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"fails on calibration batch \d: .* 1 channels, but got 2 channels"):
        calque.quantize(net, [INPUTS, networks.images(4, seed=0, channels=2)])


def test_a_number_that_differs_between_batches_is_refused() -> None:
    batches = [{"x": INPUTS, "gain": 2.0}, {"x": INPUTS, "gain": 3.0}]

    with pytest.raises(CalibrationError, match=r"no tensors must be the same in every batch. .* 3.0; .* 2.0"):
        calque.quantize(networks.seeded(Scaled()), batches, recipe="nearest")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor, gain: float) -> Tensor:
        y: Tensor = self.fc(x.flatten(1))
        return y * gain


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_inputs_warn_and_give_a_finite_network(net: nn.Module, value: float) -> None:
    with pytest.warns(CalibrationWarning, match="the same value everywhere"):
        q = calque.quantize(net, torch.full_like(INPUTS, value), bits="w4a4", recipe=QUICK)

    assert torch.isfinite(q(INPUTS)).all()


@pytest.mark.parametrize("silent", ["weights", "channel"])
def test_a_silent_layer_gives_a_finite_network(silent: str) -> None:
    net = networks.seeded(networks.Residual())
    weight = net.state_dict()["conv2.weight"]
    weight[0 if silent == "channel" else slice(None)] = 0

    q = calque.quantize(net, INPUTS, bits="w4a4", recipe=QUICK)

    assert torch.isfinite(q(INPUTS)).all()
    assert relative_error(net, q, INPUTS) < 0.5
    assert torch.isfinite(q.integer()(INPUTS[:2])).all()


def test_one_input_is_enough_to_run(net: nn.Module) -> None:
    q = calque.quantize(net, INPUTS[:1], bits="w8a8", recipe="nearest")

    assert relative_error(net, q, INPUTS) < 0.5


def test_fewer_rows_than_unknowns_warn_with_the_layer_and_both_numbers() -> None:
    net = networks.small()  # its classifier has 144 inputs

    with pytest.warns(CalibrationWarning, match=r"fewer calibration rows than unknowns .* 3 \(60 rows for 144\)"):
        q = calque.quantize(net, INPUTS, recipe=QUICK)

    assert any("3 (60 rows for 144)" in note for note in q.report.notes)


class Unreached(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(64, 3), nn.Linear(64, features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x.flatten(1))
        return y


@pytest.mark.parametrize(
    "features",
    [5, 3],
)
def test_a_layer_that_is_never_reached_is_warned_about(features: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calque.quantize(networks.seeded(Unreached(features)), INPUTS, recipe="nearest")

    assert any("layer spare is never reached" in str(warning.message) for warning in caught)


def test_an_ordinary_run_warns_about_nothing(net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calque.quantize(net, INPUTS, bits="w4a4", recipe=QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "a"}, "seed must be an int from .* Got 'a'"),
        ({"seed": 1.5}, "seed must be an int from .* Got 1.5"),
        ({"seed": 10**30}, "seed must be an int from .* Got an int of about"),
        ({"workers": 10**6}, "workers must be an int from 1 to 4,096. Got 1000000"),
        ({"memory": 10**30}, "a size is written .* at most 1,000,000 GB. Got an int of about"),
        ({"memory": 400 * "9" + "GB"}, "a size is written"),
        ({"memory": "0MB"}, "a size is written"),
        ({"bits": ("w8a8", "w4a4"), "budget": 0.2}, "budget is a calque.Budget, such as .* Got 0.2"),
        ({"bits": ("w8a8", "w4a4"), "budget": {"size": 0.2}}, "budget is a calque.Budget"),
    ],
)
def test_an_option_of_another_kind_is_refused(net: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        calque.quantize(net, INPUTS, **options)  # type: ignore[arg-type]  # on purpose


def test_a_single_input_is_no_reason_for_another_librarys_warning(net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CalibrationWarning)
        calque.quantize(net, INPUTS[:1], bits="w4a4", recipe=QUICK)


def test_fits_that_gain_nothing_are_named(net: nn.Module) -> None:
    rates = replace(RATES, weight=1e6, weight_scale=1e6, activation_scale=1e6, bias=1e6)
    wild = replace(QUICK, fit=AdaQuant(24, rates))

    q = calque.quantize(net, INPUTS, bits="w4a4", recipe=wild)

    unmoved = [layer.name for layer in q.report.layers if layer.after == layer.before]
    notes = [note for note in q.report.notes if "no fit beat rounding to nearest" in note]
    assert len(notes) == bool(unmoved)
    assert all(name in notes[0] for name in unmoved)
    assert not [n for n in calque.quantize(net, INPUTS, bits="w4a4", recipe="light").report.notes if "no fit" in n]


@pytest.mark.filterwarnings("ignore::calque.errors.CalibrationWarning")
def test_blocks_that_are_not_there_are_noted() -> None:
    chain = networks.small()

    q = calque.quantize(chain, INPUTS, bits="w4a4", recipe=replace(QUICK, blocks=Blocks(steps=5)))

    assert any("no block" in note for note in q.report.notes)

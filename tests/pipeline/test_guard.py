"""Values of different scales in one tensor: no grid may wipe out the small ones, and healthy grids stay."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.calibration.batches import prepare
from calque.calibration.job import Job
from calque.errors import CalibrationError
from calque.grid.bits import Bits
from calque.network import Batch, Network, Signature, capture
from calque.pipeline.guard import Guarded, guard
from calque.pipeline.trial import survey
from calque.quantized.model import QuantizedModel
from networks import Net

INPUTS = networks.images(96, seed=3, channels=3)
TEST = networks.images(64, seed=4, channels=3)


def decibels(exact: Tensor, found: Tensor) -> float:
    noise = (exact - found).double().square().mean()
    return float(10 * torch.log10(exact.double().var() / noise))


def quantized(model: nn.Module, calibration: object = INPUTS, **options: object) -> QuantizedModel:
    return calque.quantize(model.eval(), calibration, recipe="nearest", **options)  # type: ignore[arg-type]


def kept(model: nn.Module, q: QuantizedModel, batch: tuple[Tensor, ...] = (TEST,)) -> float:
    with torch.no_grad():
        return decibels(model(*batch), q(*batch))


def said(q: QuantizedModel) -> str:
    return " ".join(q.report.notes)


def exact_in_a_file(q: QuantizedModel, batch: tuple[Tensor, ...], folder: Path) -> None:
    path = calque.export_onnx(q, folder / "q.onnx")
    assert calque.verify(path, q, batch).agreement_exact == 1.0


# ---- what joins values of different scales


def boxes_and_scores(n: Net, x: Tensor) -> Tensor:
    y = F.relu(n.stem(x))
    boxes, scores = n.boxes(y).flatten(2) * 160, n.scores(y).flatten(2).sigmoid()
    return torch.cat([torch.cat([boxes, scores], 1), torch.cat([boxes + 320, scores], 1)], 2)


def detector() -> Net:
    return Net(boxes_and_scores, stem=nn.Conv2d(3, 8, 3, 2), boxes=nn.Conv2d(8, 4, 1), scores=nn.Conv2d(8, 3, 1))


def test_scores_survive_beside_boxes_in_pixels(tmp_path: Path) -> None:
    model = detector()

    q = quantized(model)

    with torch.no_grad():
        assert decibels(model(TEST)[:, 4:], q(TEST)[:, 4:]) > 30
    exact_in_a_file(q, (TEST,), tmp_path)


def mixed_head(n: Net, x: Tensor) -> Tensor:
    return n.out(F.relu(n.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_one_convolution_for_boxes_and_scores_keeps_both() -> None:
    model = Net(
        lambda n, x: n.head(F.relu(n.stem(x))).flatten(2).transpose(1, 2),
        stem=nn.Conv2d(3, 8, 3),
        head=nn.Conv2d(8, 6, 1),
    )
    model.head.weight.data[:2] *= 1000

    q = quantized(model)

    with torch.no_grad():
        assert decibels(model(TEST)[..., 2:], q(TEST)[..., 2:]) > 25
    assert re.search(r"tensor head.output stays float: one grid from -[\d.e+]+ to [\d.e+]+ would wipe out", said(q))


class Joined(nn.Module):
    """Features of an image beside raw measurements in front of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.out = nn.Conv2d(3, 2, 3, 2), nn.Linear(22, 16), nn.Linear(16, 4)
        networks.seeded(self)
        self.mix.weight.data[:, 18:] /= 1000

    def forward(self, x: Tensor, raw: Tensor) -> Tensor:
        joined = torch.cat([self.stem(x).flatten(1), raw], 1)
        result: Tensor = self.out(F.relu(self.mix(joined)))
        return result


@pytest.mark.parametrize("placement", ["integer", "inputs"])
def test_features_survive_beside_raw_measurements(placement: str, tmp_path: Path) -> None:
    model, batch = Joined(), (INPUTS, 1000 * torch.randn(96, 4, generator=torch.Generator().manual_seed(0)))

    q = quantized(model, batch, placement=placement)

    assert kept(model, q, batch) > 30
    assert "layer mix: each channel of the input has a factor of its own" in said(q)
    calque.save(q, tmp_path / "q.safetensors")
    assert torch.equal(calque.load(tmp_path / "q.safetensors", model)(*batch), q(*batch))
    exact_in_a_file(q, batch, tmp_path)


def test_raw_columns_of_a_table_in_their_own_units_are_all_read() -> None:
    units = torch.tensor([1e-3, 1.0, 40.0, 2e4, 5e6])
    table = torch.rand(128, 5, generator=torch.Generator().manual_seed(0)) * units
    model = Net(lambda n, x: n.out(F.relu(n.first(x))), first=nn.Linear(5, 16), out=nn.Linear(16, 3))
    model.first.weight.data /= units

    q = quantized(model, table)

    assert kept(model, q, (table,)) > 30


def two_scales(n: Net, x: Tensor) -> Tensor:
    joined = torch.cat([F.relu(n.small(x)), 500 * F.relu(n.large(x))], 1)
    return n.out(F.relu(n.mix(joined)).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_convolution_reads_both_parts_of_a_concatenation(tmp_path: Path) -> None:
    parts = {
        "small": nn.Conv2d(3, 4, 3),
        "large": nn.Conv2d(3, 4, 3),
        "mix": nn.Conv2d(8, 8, 3),
        "out": nn.Linear(8, 4),
    }
    model = Net(two_scales, **parts)
    model.mix.weight.data[:, 4:] /= 500

    q = quantized(model)

    assert kept(model, q) > 25
    exact_in_a_file(q, (TEST,), tmp_path)


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat": lambda a, b: torch.cat([a, b], 1),
    "stack": lambda a, b: torch.stack([a, b], 1),
    "where": lambda a, b: torch.where(torch.arange(a.shape[1]) < 3, a, b),
    "cat and add": lambda a, b: torch.cat([a, b], 1) + torch.cat([a, b], 1).roll(1, 0),
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_every_join_keeps_the_small_part(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        y = F.relu(n.stem(x)).mean((2, 3))
        return n.out(join(n.small(y), 2000 * n.large(y)).flatten(1))  # type: ignore[no-any-return]

    width = 6 if join is JOINS["where"] else 12
    model = Net(forward, stem=nn.Conv2d(3, 8, 3), small=nn.Linear(8, 6), large=nn.Linear(8, 6), out=nn.Linear(width, 4))
    model.out.weight.data[:, 3 if width == 6 else 6 :] /= 2000

    assert kept(model, quantized(model)) > 25


# ---- masks and sentinels


class Attention(nn.Module):
    """Scores of one head, to which a function adds or applies a mask."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.masked = masked
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        networks.seeded(self)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        scores = 2 * self.query(x) @ self.key(x).transpose(1, 2)
        result: Tensor = self.out(self.masked(scores, hidden).softmax(-1) @ self.value(x))
        return result


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a product with -1e9": lambda scores, hidden: scores + hidden * -1e9,
    "half precision's -65504": lambda scores, hidden: scores + hidden * -65504.0,
    "the bias first": lambda scores, hidden: scores + (torch.ones(10) * 0.1 + hidden * -1e4),
    "filled, then added": lambda scores, hidden: torch.zeros_like(scores).masked_fill(hidden > 0, -1e4) + scores,
    "filled": lambda scores, hidden: scores.masked_fill(hidden > 0, torch.finfo(torch.float32).min) + 0.1 * scores,
    "minus a few hundreds": lambda scores, hidden: scores + hidden * -400.0,
    "infinite": lambda scores, hidden: scores + torch.zeros_like(scores).masked_fill(hidden > 0, float("-inf")),
}


@pytest.mark.parametrize("placement", ["integer", "inputs"])
@pytest.mark.parametrize("masked", MASKS.values(), ids=MASKS)
def test_a_mask_sets_no_grid(masked: Callable[[Tensor, Tensor], Tensor], placement: str) -> None:
    x = torch.randn(64, 10, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(64, 1, 10)
    hidden[::2, :, 6:] = 1
    model = Attention(masked)

    assert kept(model, quantized(model, (x, hidden), placement=placement), (x, hidden)) > 25


def test_a_mask_of_minus_infinity_is_a_legal_argument(tmp_path: Path) -> None:
    x = torch.randn(64, 10, 8, generator=torch.Generator().manual_seed(0))
    causal = torch.full((64, 10, 10), float("-inf")).triu(1)
    model = Attention(torch.add)

    q = quantized(model, (x, causal))

    assert kept(model, q, (x, causal)) > 25
    exact_in_a_file(q, (x, causal), tmp_path)


def test_infinite_data_is_refused_with_the_argument() -> None:
    spoiled = INPUTS.clone()
    spoiled[7] = float("inf")

    with pytest.raises(CalibrationError, match="Batch 0 has larger values in x, and the network returns NaN"):
        quantized(detector(), spoiled)


def test_logits_that_are_infinite_where_a_class_is_ruled_out_are_no_obstacle() -> None:
    allowed = torch.tensor([0.0, 0.0, float("-inf"), 0.0])
    model = Net(
        lambda n, x: n.out(F.relu(n.stem(x)).flatten(1)) + allowed, stem=nn.Conv2d(3, 4, 3, 2), out=nn.Linear(36, 4)
    )

    q = calque.quantize(model, INPUTS, bits="w4a4")

    with torch.no_grad():
        assert torch.equal(q(TEST) == float("-inf"), model(TEST) == float("-inf"))
        assert decibels(model(TEST)[:, :2], q(TEST)[:, :2]) > 10


def test_a_channel_that_never_fires_sets_no_grid() -> None:
    model = Net(
        lambda n, x: F.relu(n.out(F.relu(n.stem(x)))).amax((2, 3)) + n.out(F.relu(n.stem(x))).flatten(2).softmax(2).amax(2),
        stem=nn.Conv2d(3, 8, 3), out=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    model.out.bias.data[3] = -1e5

    q = quantized(model)

    with torch.no_grad():
        assert decibels(model(TEST)[:, :3], q(TEST)[:, :3]) > 25


def test_a_masked_maximum_sets_no_grid() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        y = n.stem(x)
        hidden = y.new_zeros(y.shape[-1], dtype=torch.bool)
        hidden[-2:] = True
        return n.out(F.adaptive_max_pool2d(y.masked_fill(hidden, -1e6), 1).flatten(1))  # type: ignore[no-any-return]

    model = Net(forward, stem=nn.Conv2d(3, 8, 3), out=nn.Linear(8, 4))

    assert kept(model, quantized(model)) > 25


# ---- what stays as it is


def captured(model: nn.Module) -> tuple[Network, list[Batch]]:
    batches = prepare(INPUTS, Signature.of(model), torch.device("cpu"))
    return capture(model, batches[0]), batches


def guarded(network: Network, batches: list[Batch]) -> Guarded:
    return guard(Job(network, batches), dict.fromkeys(network.layers, (Bits(8, 8),)), {}, {})


def test_a_healthy_network_keeps_every_grid(trained: networks.Residual, calibration: Tensor) -> None:
    network = capture(trained, {"image": calibration})

    found = guarded(network, [{"image": calibration}])

    assert (found.tensors, found.layers, found.notes) == (frozenset(), frozenset(), ())
    assert found.network is network


def test_a_small_channel_that_nobody_reads_keeps_the_grid() -> None:
    model = Net(mixed_head, stem=nn.Conv2d(3, 8, 3), out=nn.Linear(8, 4))
    model.stem.weight.data[2] /= 1e4
    model.stem.bias.data[2] /= 1e4

    assert "one grid" not in said(quantized(model))


def test_a_tensor_whose_bits_the_user_gave_keeps_its_grid() -> None:
    model = Net(
        lambda n, x: n.head(F.relu(n.stem(x))).flatten(2).transpose(1, 2),
        stem=nn.Conv2d(3, 8, 3),
        head=nn.Conv2d(8, 6, 1),
    )
    model.head.weight.data[:2] *= 1000

    q = quantized(model, override={"head.output": "a8"})

    assert q.plan["head.output"] == Bits(None, 8)
    assert "one grid" not in said(q)


class Spikes(nn.Module):
    """A linear layer whose one input channel has rare huge values, which no factor by channel helps."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(1, 8), nn.Linear(8, 3)
        networks.seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.mix(x)))
        return result


def spikes() -> Tensor:
    x = torch.randn(128, 1, generator=torch.Generator().manual_seed(0))
    x[::4] *= 2000
    return x


def test_activations_that_nothing_helps_stay_float() -> None:
    q = quantized(Spikes(), spikes())

    assert str(q.plan["mix"]) == "w8"
    assert "layer mix: the activations stay float; one grid from" in said(q)


@pytest.mark.parametrize("how", ["override", "plan"])
def test_a_layer_whose_bits_the_user_gave_keeps_them(how: str) -> None:
    plan = calque.Plan({"mix": Bits(8, 8), "out": Bits(8, 8)})

    q = quantized(Spikes(), spikes(), **({"plan": plan} if how == "plan" else {"override": {"mix": "w8a8"}}))

    assert str(q.plan["mix"]) == "w8a8"
    assert "its activations have the bits that were asked for" in said(q)


def test_factors_change_no_bit_of_the_float_network() -> None:
    model = Net(
        two_scales, small=nn.Conv2d(3, 4, 3), large=nn.Conv2d(3, 4, 3), mix=nn.Conv2d(8, 8, 3), out=nn.Linear(8, 4)
    )
    model.mix.weight.data[:, 4:] /= 500
    network, batches = captured(model)
    before = network.module(INPUTS)

    found = guarded(network, batches)

    assert found.network.scaled == (("mix",),)
    assert all(torch.equal(a, b) for a, b in zip(found.network.module(INPUTS), before, strict=True))


def test_under_a_budget_the_decisions_hold_for_every_candidate() -> None:
    model, batch = Joined(), (INPUTS, 1000 * torch.randn(96, 4, generator=torch.Generator().manual_seed(0)))

    q = calque.quantize(
        model, batch, bits=("w8a8", "w4a8"), budget=calque.Budget(size=4000), recipe="nearest", placement="integer"
    )

    assert kept(model, q, batch) > 10
    assert "layer mix: each channel" in said(q)


def test_a_survey_has_the_extremes_of_all_batches() -> None:
    network, batches = captured(detector())
    argument = next(network.nodes())

    assert survey(network, batches, {argument}) == {argument: (INPUTS.min(), INPUTS.max())}


class Kept(nn.Module):
    """Attention that adds -1e4 where an argument is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        networks.seeded(self)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) + (1 - keep)[:, None] * -1e4
        result: Tensor = self.out(scores.softmax(-1) @ self.value(x))
        return result


@pytest.mark.parametrize("masked", [1, 3])
@pytest.mark.parametrize("placement", ["integer", "inputs"])
def test_a_mask_that_few_calibration_rows_have_still_masks(masked: int, placement: str) -> None:
    model, x = Kept(), 2 * torch.randn(64, 10, 8, generator=torch.Generator().manual_seed(0))
    keep, other = torch.ones(64, 10), torch.ones(64, 10)
    keep[:masked, 6:] = 0
    other[:, 5:] = 0

    q = quantized(model, (x, keep), placement=placement)

    assert kept(model, q, (x, other)) > 25
    assert "left out" not in said(q)


@pytest.mark.filterwarnings("ignore:a calibration input has the same value")
def test_a_mask_that_no_calibration_row_has_still_masks() -> None:
    model, x = Kept(), 2 * torch.randn(64, 10, 8, generator=torch.Generator().manual_seed(0))
    other = torch.ones(64, 10)
    other[:, 5:] = 0

    assert kept(model, quantized(model, (x, torch.ones(64, 10))), (x, other)) > 25


def test_ranks_of_near_ties_blame_no_grid() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        y = F.relu(n.second(F.relu(n.stem(x))))
        values, order = n.score(y).flatten(1).topk(8, 1)
        boxes = n.boxes(F.relu(n.third(y))).flatten(2)
        found: Tensor = torch.gather(boxes, 2, order[:, None].expand(-1, 2, -1)) + values[:, None]
        return found

    parts = {"stem": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(8, 8, 1), "third": nn.Conv2d(8, 8, 1)}
    model = Net(forward, **parts, score=nn.Conv2d(8, 1, 1), boxes=nn.Conv2d(8, 2, 1))

    q = quantized(model)

    assert not [note for note in q.report.notes if "one grid" in note]


def test_a_product_both_of_whose_operands_are_lost_has_one_note() -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        left, right = n.left(x), n.right(x)
        spike = torch.tensor([1.0, 1e-5]).repeat_interleave(4)
        product: Tensor = (left * spike) @ (right / spike).transpose(1, 2) + left[..., 4:] @ right[..., 4:].transpose(
            1, 2
        )
        return product

    x = torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(0))
    q = quantized(Net(forward, left=nn.Linear(8, 8), right=nn.Linear(8, 8)), x, placement="inputs")

    notes = [note for note in q.report.notes if note.startswith("tensor matmul stays float")]
    assert len(notes) == 1

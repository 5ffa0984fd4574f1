"""Bits under a budget, end to end: what is chosen, that the budget really holds, and what is refused."""

import itertools
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque import Budget
from calque.errors import InfeasibleBudgetError, SpecError
from calque.grid.bits import Bits
from calque.network import capture
from calque.pipeline.search import _best, finalists
from calque.quantized.model import QuantizedModel
from calque.quantized.placement import place
from calque.quantized.prices import Prices
from calque.recipe import LIGHT, Recipe, Search, Sequential, Tuning
from calque.report import Finalist
from networks import Net
from slow import slow

QUICK = replace(LIGHT, name="quick", search=Search(priced_inputs=64, finalists=3))
LADDER = ("w8a8", "w4a4", "w2a4")
LAYERS = ("stem", "conv1", "conv2", "down", "head")


def measuring(finalists: int) -> Recipe:
    """The quick recipe with that many finalists."""
    return replace(QUICK, search=replace(QUICK.search, finalists=finalists))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return networks.trained()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return networks.stripes(64, seed=3)[0]


def bits_of(q: QuantizedModel) -> dict[str, str]:
    return {name: str(bits) for name, bits in q.plan.items() if name in q.layers or name in LAYERS}


def prices_of(q: QuantizedModel) -> Prices:
    assert q.prices is not None
    return q.prices


def packed_size(q: QuantizedModel) -> int:
    """Bytes of Residual's file: codes at their bits, rounded up to bytes, and 12 bytes per output channel."""
    return sum(-(-layer.codes.numel() * layer.bits // 8) + 12 * len(layer.codes) for layer in q.layers.values())


def operations(q: QuantizedModel) -> int:
    """Bit-operations of Residual on images of 8 x 8."""
    positions = {"stem": 64, "conv1": 64, "conv2": 64, "down": 16, "head": 1}
    found = 0
    for name, layer in q.layers.items():
        found += positions[name] * layer.codes.numel() * layer.bits * (q.plan[name].activation or 32)
    return found


def memory(q: QuantizedModel) -> int:
    """Peak bytes of Residual's activations, by hand.

    At 8 bits are what the block reads twice, the second operand and the result of its add; conv2 and head read alone.
    """
    a = {name: q.plan[name].activation or 32 for name in LAYERS}
    own = {name: q.plan[name].activation or 32 for name in q.plan if name not in LAYERS}
    kept = own.get("stem.output", 8)

    def copy(name: str, stored: int, values: int) -> int:
        return 0 if a[name] == stored else values * a[name]

    eight = 512 * 8  # 8 channels of 64 values
    added = next((bits for name, bits in own.items() if "output" not in name), 8)
    steps = [
        64 * a["stem"] + 512 * kept,
        512 * kept + copy("conv1", kept, 512) + 512 * own.get("conv1.output", a["conv2"]),
        512 * kept + 512 * own.get("conv1.output", a["conv2"]) + eight,
        512 * kept + eight + 512 * added,
    ]
    return max(steps) // 8


def test_the_hand_made_size_and_operations_are_the_reports(model: nn.Module, inputs: Tensor) -> None:
    q = calque.quantize(model, inputs, bits="w3a5", recipe="nearest")

    assert (packed_size(q), operations(q)) == (q.report.size, q.report.bit_operations)


# ---- budgets hold


@pytest.mark.parametrize("share", [slow(0.84), slow(0.93), "88%", 7400])
def test_a_budget_on_size_holds_for_the_file(
    model: nn.Module, inputs: Tensor, share: float | str, tmp_path: Path
) -> None:
    q = calque.quantize(model, inputs, bits=LADDER, budget=Budget(size=share), recipe=QUICK)

    whole = 4 * sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)
    whole += 4 * (8 + 8 + 8)  # the folded norms leave a bias to each of three convolutions
    limit = share if isinstance(share, int) else math.floor(whole * (0.88 if share == "88%" else float(share)))
    assert calque.export_onnx(q, tmp_path / "model.onnx").stat().st_size <= q.report.file_size <= limit
    assert q.report.file_limit == limit
    assert f"; the budget allows {limit:,}" in str(q.report)
    (chosen,) = [each for each in q.report.finalists if each.chosen]
    assert 0.96 * limit < chosen.size <= limit  # every layer at 8 bits takes 7,847
    assert q.report.size == packed_size(q)


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_a_budget_on_operations_holds(model: nn.Module, inputs: Tensor, share: float) -> None:
    q = calque.quantize(model, inputs, bits=LADDER, budget=Budget(bops=share), recipe=QUICK)

    macs = 64 * (72 + 576 + 576) + 16 * 864 + 48
    assert operations(q) <= share * macs * 32 * 32
    assert operations(q) == q.report.bit_operations


MEMORY = 3 * 512  # the add has three tensors at 8 bits alive


def test_a_budget_on_activation_memory_holds(model: nn.Module, inputs: Tensor) -> None:
    budget = Budget(activation_memory=MEMORY)

    q = calque.quantize(model, inputs, bits=("w8a8", "w8a4", "w8a2"), budget=budget, recipe=QUICK)

    assert memory(q) <= MEMORY


def test_less_activation_memory_than_the_add_takes_is_refused(model: nn.Module, inputs: Tensor) -> None:
    with pytest.raises(InfeasibleBudgetError, match="smallest feasible is 1,536"):
        calque.quantize(
            model, inputs, bits=("w8a8", "w8a4", "w8a2"), budget=Budget(activation_memory=MEMORY - 1), recipe=QUICK
        )


def test_a_tensor_kept_float_counts_as_float_under_a_memory_budget(model: nn.Module, inputs: Tensor) -> None:
    bits, override = ("w8a8", "w8a4"), {"stem.output": None}

    with pytest.raises(InfeasibleBudgetError, match="smallest feasible is 3,072"):  # 512 at 32 bits and two at 8
        calque.quantize(
            model, inputs, bits=bits, override=override, budget=Budget(activation_memory=3071), recipe=QUICK
        )
    q = calque.quantize(
        model, inputs, bits=bits, override=override, budget=Budget(activation_memory=3072), recipe=QUICK
    )

    assert "stem.output" not in q.quantizers


def latency_table(folder: Path, bits: tuple[str, ...]) -> tuple[Path, dict[tuple[str, str], float]]:
    table = {(name, text): 0.1 * (index + 1) * int(text[1]) for index, name in enumerate(LAYERS) for text in bits}
    path = folder / "table.csv"
    lines = [f"{name},{text},{value!r}" for (name, text), value in table.items()]
    path.write_text("\n".join(["layer,bits,milliseconds", *lines]))
    return path, table


@pytest.mark.parametrize("limit", [5.0, 8.0])
def test_a_budget_on_latency_holds(model: nn.Module, inputs: Tensor, tmp_path: Path, limit: float) -> None:
    path, table = latency_table(tmp_path, LADDER)

    q = calque.quantize(model, inputs, bits=LADDER, budget=Budget(latency=(path, limit)), recipe=QUICK)

    assert limit - 2.0 < sum(table[entry] for entry in bits_of(q).items()) <= limit + 1e-9


def test_several_budgets_hold_together(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    bits = ("w8a8", "w4a8", "w4a4", "w2a4")
    path, table = latency_table(tmp_path, bits)
    budget = Budget(size=7400, bops=0.03, activation_memory=1600, latency=(path, 7.0))

    q = calque.quantize(model, inputs, bits=bits, budget=budget, recipe=QUICK)

    macs = 64 * (72 + 576 + 576) + 16 * 864 + 48
    assert q.report.file_size <= 7400
    assert operations(q) <= 0.03 * macs * 32 * 32
    assert memory(q) <= 1600
    assert sum(table[entry] for entry in bits_of(q).items()) <= 7.0 + 1e-9


@pytest.mark.parametrize(
    ("budget", "unit"), [(Budget(size=0.05), "size"), (Budget(bops=1000), "bops"), slow(Budget(size=100), "size")]
)
def test_an_infeasible_budget_names_the_smallest_feasible(
    model: nn.Module, inputs: Tensor, budget: Budget, unit: str
) -> None:
    with pytest.raises(InfeasibleBudgetError, match=f"{unit} at most .* smallest feasible is") as raised:
        calque.quantize(model, inputs, bits=LADDER, budget=budget, recipe=QUICK)
    found = re.search(r"smallest feasible is ([\d,]+)", str(raised.value))
    assert found is not None
    smallest = int(found[1].replace(",", ""))

    limits = {"size": Budget(size=smallest), "bops": Budget(bops=smallest)}
    q = calque.quantize(model, inputs, bits=LADDER, budget=limits[unit], recipe=QUICK)

    (chosen,) = [each for each in q.report.finalists if each.chosen]
    assert {"size": chosen.size, "bops": operations(q)}[unit] == smallest
    assert q.report.file_size <= chosen.size
    tighter = {"size": Budget(size=smallest - 1), "bops": Budget(bops=smallest - 1)}
    with pytest.raises(InfeasibleBudgetError):
        calque.quantize(model, inputs, bits=LADDER, budget=tighter[unit], recipe=QUICK)


# ---- choices


def test_overrides_and_first_last_fix_layers_under_a_budget(model: nn.Module, inputs: Tensor) -> None:
    q = calque.quantize(
        model, inputs, bits=LADDER, budget=Budget(size=14_000), recipe=QUICK, first_last="w6a6",
        override={"conv1": "w5a5", "conv2": None, "stem.output": "a6"},
    )  # fmt: skip

    chosen = bits_of(q)
    assert (chosen["stem"], chosen["head"], chosen["conv1"], chosen["conv2"]) == ("w6a6", "w6a6", "w5a5", "float")
    assert chosen["down"] in LADDER
    assert q.quantizers["stem.output"].bits == 6
    assert all(finalist.plan["conv1"] == "w5a5" for finalist in q.report.finalists)
    assert prices_of(q).choices[prices_of(q).groups.index(("conv1",))] == ("w5a5",)


@pytest.mark.parametrize("first_last", ["auto", None])
def test_the_ends_are_free_under_a_budget(model: nn.Module, inputs: Tensor, first_last: str | None) -> None:
    q = calque.quantize(model, inputs, bits=LADDER, budget=Budget(size=0.82), recipe=QUICK, first_last=first_last)

    assert all(len(options) == 3 for options in prices_of(q).choices)


class Tied(nn.Module):
    """One convolution called twice between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        y: Tensor = self.head(F.relu(self.twice(F.relu(self.twice(x)))).mean((2, 3)))
        return y


def test_tied_layers_decide_together_and_their_price_is_the_sum(inputs: Tensor) -> None:
    q = calque.quantize(
        networks.seeded(Tied()), inputs, bits=LADDER, budget=Budget(size=4800), recipe=QUICK
    )  # fmt: skip

    assert prices_of(q).groups == (("stem",), ("twice", "twice#2"), ("head",))
    assert q.plan["twice"] == q.plan["twice#2"]
    assert torch.equal(q.layers["twice"].codes, q.layers["twice#2"].codes)
    eight, four, _ = prices_of(q).costs["size"][1]
    assert q.report.file_size <= 4800
    assert eight - four < 324 // 2  # the codes are there once; what decodes and clips is there twice
    assert prices_of(q).costs["bops"][1] == tuple(2 * 64 * 324 * w * a for w, a in ((8, 8), (4, 4), (2, 4)))


def test_tied_layers_with_different_choices_are_refused(inputs: Tensor) -> None:
    with pytest.raises(SpecError, match="layers twice, twice#2 share their weights"):
        calque.quantize(
            networks.seeded(Tied()), inputs, bits=LADDER, budget=Budget(size=5000), override={"twice": "w8a8"},
            recipe=QUICK,
        )  # fmt: skip


# ---- finalists


def test_the_chosen_finalist_has_the_least_measured_loss(model: nn.Module, inputs: Tensor) -> None:
    q = calque.quantize(model, inputs, bits=LADDER, budget=Budget(size=0.83), recipe=QUICK, loss="kl")

    found = q.report.finalists
    (chosen,) = [each for each in found if each.chosen]
    assert len(found) >= 3
    assert chosen.measured == min(each.measured for each in found)
    assert chosen.plan == bits_of(q)
    assert [each.predicted for each in found[:3]] == sorted(each.predicted for each in found[:3])
    for each in found:
        built = calque.quantize(
            model, inputs, plan=calque.Plan({n: Bits.parse(b) for n, b in each.plan.items()}), recipe=QUICK
        )
        assert built.report.file_size <= each.size
        assert each.measured == pytest.approx(kl(model, built, inputs) - prices_of(q).base_loss, rel=1e-4, abs=1e-7)


def kl(model: nn.Module, q: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        p, r = model(inputs).double().log_softmax(-1), q(inputs).double().log_softmax(-1)
        return float((p.exp() * (p - r)).sum(-1).mean().item())


def test_the_uniform_plan_that_keeps_the_budget_is_a_finalist(model: nn.Module, inputs: Tensor) -> None:
    q = calque.quantize(model, inputs, bits=("w8a8", "w4a8", "w4a4"), budget=Budget(size=6900), recipe=measuring(1))

    uniform = [each for each in q.report.finalists if len(set(each.plan.values())) == 1]
    assert [each.plan["stem"] for each in uniform] == ["w4a8"]  # w8a8 takes 7.1 kB, w4a4 has the larger price


def made_up(groups: int, seed: int) -> Prices:
    """Prices of many layers: the fewer bits, the more loss, in sizes of all orders."""
    generator = random.Random(seed)
    bits = ("w8a8", "w6a6", "w4a4")
    sizes = [generator.randint(100, 2000) for _ in range(groups)]
    falls = [generator.uniform(0.001, 0.02) for _ in range(groups)]
    return Prices(
        "kl", "w8a8", 0.0, tuple((f"layer{index}",) for index in range(groups)), (bits,) * groups,
        tuple((0.0, fall, 5 * fall) for fall in falls),
        {"size": tuple((8 * size, 6 * size, 4 * size) for size in sizes)}, {"size": 0},
        {"size": 32 * sum(sizes)}, (),
    )  # fmt: skip


@pytest.mark.parametrize("groups", [4, 10, 25, 40])
@pytest.mark.parametrize("share", [0.15, 0.2, 0.24])
def test_finalists_are_apart_keep_the_budget_and_have_a_uniform_plan(groups: int, share: float) -> None:
    prices = made_up(groups, seed=groups)

    found = finalists(prices, Budget(size=share), 3)

    limit = math.floor(share * 32 * sum(row[0] // 8 for row in prices.costs["size"]))
    plans = [solution.plan for solution in found]
    assert all(solution.costs["size"] <= limit for solution in found)
    uniform = "w6a6" if share >= 6 / 32 else "w4a4"
    assert dict.fromkeys(plans[0], uniform) in plans
    for one, other in itertools.combinations(plans[:3], 2):
        assert sum(one[name] != other[name] for name in one) >= groups // 10


@pytest.mark.parametrize("groups", [4, 10, 25, 40])
@pytest.mark.parametrize("loss", [0.05, 0.2, 0.6])
def test_finalists_of_the_dual_form_come_in_the_order_of_their_cost(groups: int, loss: float) -> None:
    prices = made_up(groups, seed=groups)

    found = finalists(prices, Budget(loss=loss, minimize="size"), 3)

    costs = [solution.costs["size"] for solution in found]
    assert costs == sorted(costs)
    assert all(solution.increase <= loss for solution in found)
    cheapest = next(
        bits for index, bits in ((2, "w4a4"), (1, "w6a6"), (0, "w8a8"))
        if sum(row[index] for row in prices.increases) <= loss
    )  # fmt: skip
    assert dict.fromkeys(found[0].plan, cheapest) in [solution.plan for solution in found]


def test_in_the_dual_form_the_cheapest_that_keeps_the_loss_is_chosen(model: nn.Module, inputs: Tensor) -> None:
    budget = Budget(loss=0.05, minimize="size")
    q = calque.quantize(model, inputs, bits=("w8a8", "w6a6", "w4a4"), budget=budget, recipe=measuring(4))

    kept = [each for each in q.report.finalists if each.measured <= 0.05]
    assert kept
    (chosen,) = [each for each in q.report.finalists if each.chosen]
    assert chosen.size == min(each.size for each in kept)
    assert not any("no finalist keeps" in note for note in q.report.notes)


def test_where_no_finalist_keeps_the_loss_the_best_is_taken_and_noted(model: nn.Module, inputs: Tensor) -> None:
    calls = itertools.count(1)

    def late(
        reference: object, output: object
    ) -> Tensor:  # prices are small; what is measured then falls from call to call
        call = next(calls)
        return torch.tensor(call * 1e-6 if call <= 1 + len(LAYERS) else 1 / call)

    budget = Budget(loss=0.001, minimize="size")
    q = calque.quantize(model, [inputs], bits=("w8a8", "w3a3"), budget=budget, recipe=QUICK, loss=late)

    found = q.report.finalists
    assert min(each.measured for each in found) > 0.001
    assert [each.chosen for each in found] == [False] * (len(found) - 1) + [True]
    assert any("no finalist keeps the loss budget of 0.001" in note for note in q.report.notes)


@pytest.mark.parametrize("budget", [Budget(size=0.5), Budget(loss=0.1, minimize="size")])
def test_a_finalist_whose_loss_is_not_a_number_is_never_chosen(budget: Budget) -> None:
    cases: list[Any] = [(None, Finalist({}, 100, 0.0, measured)) for measured in (math.nan, 0.3, 0.2, math.inf)]

    assert _best(cases, budget) is cases[2]


def test_the_prices_of_a_run_solve_other_budgets_without_measuring(model: nn.Module, inputs: Tensor) -> None:
    q = calque.quantize(model, inputs, bits=LADDER, budget=Budget(size=0.88), recipe=QUICK)
    again = Prices.from_json(prices_of(q).to_json())

    assert again == q.prices
    sizes = [finalists(again, Budget(size=share), 1)[0].costs["size"] for share in (0.81, 0.84, 0.88)]
    assert sizes == sorted(sizes)
    for report in q.report.layers:
        index = prices_of(q).groups.index((report.name,))
        assert report.price == prices_of(q).increases[index][prices_of(q).choices[index].index(report.bits)]


def test_outputs_that_are_not_rows_do_not_weigh_the_batches(inputs: Tensor) -> None:
    def forward(net: Net, image: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = net.b(F.relu(net.a(image.flatten(1))))
        return net.scale.square(), logits

    net = Net(forward, a=nn.Linear(64, 8), b=nn.Linear(8, 4), scale=torch.ones(3))

    def distance(reference: object, output: object) -> Tensor:
        assert isinstance(reference, tuple)
        assert isinstance(output, tuple)
        error: Tensor = (reference[1] - output[1]).square().mean()
        return error

    batches = [inputs[:50] * 3, inputs[50:]]  # of unlike losses and lengths
    q = calque.quantize(net, batches, bits=("w8a8", "w3a3"), budget=Budget(size="4kB"), recipe=QUICK, loss=distance)

    (chosen,) = [each for each in q.report.finalists if each.chosen]
    with torch.no_grad():
        everything = torch.cat(batches)
        expected = (net(everything)[1] - q(everything)[1]).square().mean().item()
    assert chosen.measured + prices_of(q).base_loss == pytest.approx(expected, rel=1e-4)


def test_a_recipe_with_tuning_tunes_the_chosen_finalist_alone(model: nn.Module, inputs: Tensor) -> None:
    tuned = replace(QUICK, tuning=Tuning(steps=8))
    calls: list[str] = []

    q = calque.quantize(
        model, inputs, bits=LADDER, budget=Budget(size=0.84), recipe=tuned,
        progress=lambda phase, done, total: calls.append(phase),
    )  # fmt: skip

    assert calls.count("biases") == 8
    assert q.report.tuned is not None
    assert q.report.tuned[1] <= q.report.tuned[0]


def test_two_heads_of_other_bits_leave_their_trunk_float_and_the_memory_budget_knows(inputs: Tensor) -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(net.trunk(x.flatten(1)))
        return net.left(x), net.right(x)

    net = Net(forward, trunk=nn.Linear(64, 256), left=nn.Linear(256, 3), right=nn.Linear(256, 5))
    network = capture(net, {"x": inputs[:4]}, {})
    override = {"left": "w8a8", "right": "w4a4"}

    q = calque.quantize(
        net, inputs, bits=("w8a8", "w4a4"), override=override, budget=Budget(activation_memory=2000), recipe=QUICK
    )

    edges = place(network, q.plan, "integer")
    assert not any(edge.kind in ("tensor", "sole") and edge.source.op != "placeholder" for edge in edges)
    with pytest.raises(InfeasibleBudgetError, match="activation memory"):  # 256 values in float, with their copies
        calque.quantize(
            net,
            inputs,
            bits=("w8a8", "w4a4"),
            override=override,
            budget=Budget(activation_memory=4 * 256),
            recipe=QUICK,
        )


def test_prices_do_not_depend_on_the_migration_of_channel_scales(model: nn.Module, inputs: Tensor) -> None:
    """The candidates are fitted to unscaled channels, so the network that they are priced in has none that are scaled."""
    moved, plain = (
        calque.quantize(model, inputs, bits=LADDER, budget=Budget(size=0.84), recipe=replace(QUICK, flavour=flavour))
        for flavour in (Sequential(channel_scales=1.0), Sequential())
    )

    assert prices_of(moved).increases == prices_of(plain).increases

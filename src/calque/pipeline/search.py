"""Bits chosen under a budget: candidates fitted, priced and allocated; the best few allocations measured as whole networks."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from calque.allocation.budget import Budget
from calque.allocation.costs import Costs, costs
from calque.allocation.plans import Solution, solve
from calque.allocation.sensitivity import measure_prices, thin
from calque.calibration.job import Job
from calque.calibration.losses import Loss
from calque.errors import InfeasibleBudgetError, SpecError
from calque.fitting.layer import integer_layer
from calque.fitting.parallel import Choices, fit_choices
from calque.fitting.problem import Fit
from calque.grid.bits import FLOAT, Bits
from calque.network import Network
from calque.pipeline.build import Built, build, measured_loss
from calque.pipeline.end_to_end import trained_end_to_end
from calque.pipeline.stages import Stages
from calque.quantized.assembled import Assembled
from calque.quantized.modules import Quantizer
from calque.quantized.prices import Prices
from calque.recipe import Recipe
from calque.report import Finalist

log = logging.getLogger(__name__)

DISTINCT = 10  # finalists differ in at least one of so many layers


def check_budget(job: Job, choices: Choices, tensors: Mapping[str, Bits], budget: Budget) -> None:
    """Whether any allocation keeps the budget, whatever the prices will be; before the long work.

    Raises:
        InfeasibleBudgetError, SpecError, OSError: see `search`.
    """
    free: dict[str, dict[Bits, float]] = {name: {} for name in choices}
    table = _costs(job, choices, tensors)
    solve(_prices(job.network, choices, free, table, loss="none", base=(_base_bits(choices), 0.0)), budget)


def measure(job: Job, choices: Choices, recipe: Recipe, loss: tuple[str, Loss], tensors: Mapping[str, Bits]) -> Prices:
    """The prices and costs of every choice of every layer.

    Args:
        choices: by layer; one choice where nothing is to be decided.
        recipe: its search says how candidates are fitted and priced, its stages the base network.
        tensors: bits of tensors that are not the default.

    Raises:
        SpecError: a loss that is not finite at the base precision.
    """
    network, base_bits = job.network, _base_bits(choices)
    base = _base(job, base_bits, choices, Stages.of(recipe).base())
    priced: Choices = {
        name: tuple(bits for bits in options if bits not in (base_bits, FLOAT)) for name, options in choices.items()
    }
    fits = fit_choices(job, priced, recipe.search.fit, recipe.ranges)
    stand_ins = {
        name: [_stand_in(network, name, bits, fits[name, bits]) for bits in options]
        for name, options in priced.items()
        if options
    }
    batches = thin(job.batches, recipe.search.priced_inputs)
    base_loss, rises = measure_prices(
        network.module, base.graph_module, stand_ins, batches, loss[1],
        checkpoint=job.checkpoint.within("prices"), on_layer=job.counter("prices", len(stand_ins) * len(batches)),
    )  # fmt: skip
    if not math.isfinite(base_loss):
        raise SpecError(f"the loss is {base_loss} for the network at {base_bits}. Pass a loss that is finite.")
    known = {
        name: {bits: rise for bits, rise in zip(priced[name], rises.get(name, []), strict=True)} for name in choices
    }
    table = _costs(job, choices, tensors)
    return _prices(network, choices, known, table, loss=loss[0], base=(base_bits, base_loss))


def _costs(job: Job, choices: Choices, tensors: Mapping[str, Bits]) -> Costs:
    fixed = {name: (bits,) for name, bits in tensors.items()}
    return costs(job.network, {**choices, **fixed}, job.placement, job.largest)


def _base_bits(choices: Choices) -> Bits:
    activations = any(bits.activation is not None for options in choices.values() for bits in options)
    return Bits(8, 8 if activations else None)


def _base(job: Job, bits: Bits, choices: Choices, stages: Stages) -> Assembled:
    """The network with every layer at the base precision; layers that must stay float do."""
    entries = {
        name: FLOAT if set(options) == {FLOAT} else Bits(bits.weight, None) if job.network.is_table(name) else bits
        for name, options in choices.items()
    }
    return build(job, entries, stages).model


def _stand_in(network: Network, name: str, bits: Bits, fit: Fit) -> nn.Module:
    weighted = network.weighted(name)
    assert bits.weight is not None
    layer, _ = integer_layer(
        weighted.geometry, weighted.weight, fit, None if fit.grid is None else fit.grid.scale, bits.weight
    )
    if fit.grid is None or bits.activation is None:
        return layer
    return nn.Sequential(Quantizer(fit.grid.scale, fit.grid.zero_point, bits=bits.activation), layer)


def _prices(
    network: Network,
    choices: Choices,
    known: Mapping[str, Mapping[Bits, float]],
    table: Costs,
    *,
    loss: str,
    base: tuple[Bits, float],
) -> Prices:
    groups = _groups(network, choices)
    number = {name: index for index, names in enumerate(groups) for name in names}
    options = [choices[names[0]] for names in groups]
    steps = []
    for fixed, by_layer in table.steps:
        merged: dict[int, tuple[int, ...]] = {}
        for name, values in by_layer.items():
            before = merged.get(number[name], (0,) * len(values))
            merged[number[name]] = tuple(a + b for a, b in zip(before, values, strict=True))
        steps.append((fixed, merged))

    def summed(by_layer: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(map(sum, zip(*(by_layer[name] for name in names), strict=True))) for names in groups)

    return Prices(
        loss=loss,
        base=str(base[0]),
        base_loss=base[1],
        groups=groups,
        choices=tuple(tuple(map(str, each)) for each in options),
        increases=tuple(
            tuple(sum(known[name].get(bits, 0.0) for name in names) for bits in each)
            for names, each in zip(groups, options, strict=True)
        ),
        costs={"size": summed(table.size), "bops": summed(table.bops)},
        fixed={"size": table.fixed_size, "bops": 0},
        floats={"size": table.float_size, "bops": table.float_bops, "activation_memory": table.float_memory},
        steps=tuple(steps),
    )


def _groups(network: Network, choices: Choices) -> tuple[tuple[str, ...], ...]:
    """Layers that share their weights decide together.

    Raises:
        SpecError: such layers with different choices.
    """
    members: dict[str, list[str]] = {}
    for name in network.layers:
        members.setdefault(network.shared.get(name, name), []).append(name)
    for names in members.values():
        if any(tuple(choices[name]) != tuple(choices[names[0]]) for name in names):
            raise SpecError(f"layers {', '.join(names)} share their weights, so override all of them alike.")
    return tuple(map(tuple, members.values()))


def finalists(prices: Prices, budget: Budget, count: int) -> list[Solution]:
    """The best allocations under the budget, and the best one with the same bits everywhere, without repetitions.

    In the dual form they come in the order of their cost.

    Raises:
        InfeasibleBudgetError: no allocation keeps the budget.
    """
    distance = max(1, len(prices.groups) // DISTINCT)
    found = solve(prices, budget, count=count, distance=distance)
    uniform = []
    for bits in dict.fromkeys(bits for options in prices.choices if len(options) > 1 for bits in options):
        narrowed = _only(prices, bits)
        try:
            uniform.extend([] if narrowed is None else solve(narrowed, budget))
        except InfeasibleBudgetError:
            continue

    def goal(solution: Solution) -> float:
        return solution.increase if budget.minimize is None else solution.costs[budget.minimize]

    best = min(uniform, key=goal, default=None)
    if best is not None and all(dict(best.plan) != dict(other.plan) for other in found):
        found.append(best)
    return found if budget.minimize is None else sorted(found, key=goal)


def _only(prices: Prices, bits: str) -> Prices | None:
    """The prices with `bits` as the only choice of every layer that has one; None where a layer lacks these bits."""
    kept = [[0] if len(options) == 1 else _alike(options, bits) for options in prices.choices]
    if not all(kept):
        return None

    def pick(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(row[i] for i in chosen) for row, chosen in zip(rows, kept, strict=True))

    return replace(
        prices,
        choices=tuple(tuple(row[i] for i in chosen) for row, chosen in zip(prices.choices, kept, strict=True)),
        increases=pick(prices.increases),
        costs={
            name: tuple(tuple(row[i] for i in chosen) for row, chosen in zip(rows, kept, strict=True))
            for name, rows in prices.costs.items()
        },
        steps=tuple(
            (fixed, {group: tuple(row[i] for i in kept[group]) for group, row in by_group.items()})
            for fixed, by_group in prices.steps
        ),
    )


def _alike(options: Sequence[str], bits: str) -> list[int]:
    """Where among the options these bits are; for a table, whose options have no activations, the same weights."""
    found = [i for i, text in enumerate(options) if text == bits]
    weights_alone = all(Bits.parse(text).activation is None for text in options)
    return found or [
        i for i, text in enumerate(options) if weights_alone and Bits.parse(text).weight == Bits.parse(bits).weight
    ]


@dataclass(frozen=True)
class Found:
    """What a search under a budget left.

    Attributes:
        built: the best finalist.
        finalists: all that were measured, the chosen one marked.
        prices: from which other budgets can be solved without measuring again.
        limit: bytes that the file may take, where the budget limits them.
        phases: seconds.
    """

    built: Built
    finalists: tuple[Finalist, ...]
    prices: Prices
    phases: Mapping[str, float]
    notes: tuple[str, ...]
    limit: int | None = None


def search(
    job: Job,
    choices: Choices,
    tensors: Mapping[str, Bits],
    budget: Budget,
    recipe: Recipe,
    loss: tuple[str, Loss],
    references: Sequence[Sequence[Tensor]],
) -> Found:
    """The best network under the budget.

    Args:
        tensors: bits of tensors that are not the default.
        references: the float network's output leaves on each batch.

    Raises:
        InfeasibleBudgetError: no allocation keeps the budget.
    """
    started = time.perf_counter()
    prices = measure(job, choices, recipe, loss, tensors)
    log.info("prices measured: %s of the base network %s is %.3e", prices.loss, prices.base, prices.base_loss)
    priced = time.perf_counter()
    cases: list[tuple[Built, Finalist]] = []
    for solution in finalists(prices, budget, recipe.search.finalists):
        entries = {name: Bits.parse(text) for name, text in solution.plan.items()} | dict(tensors)
        built = build(job, entries, Stages.of(recipe), references)
        measured = measured_loss(job, built.model, loss[1], references) - prices.base_loss
        cases.append((built, Finalist(dict(solution.plan), solution.costs["size"], solution.increase, measured)))
        size, predicted = solution.costs["size"], solution.increase
        log.info("finalist of %d bytes on disk: rise %.3e predicted, %.3e measured", size, predicted, measured)
    built, best = _best(cases, budget)
    marked = tuple(replace(finalist, chosen=finalist is best) for _, finalist in cases)
    notes: tuple[str, ...] = ()
    if all(price <= 0 for row in prices.increases for price in row):
        notes = ("no choice of bits raises the loss: it does not tell them apart, and the cheapest were taken.",)
    if budget.loss is not None and best.measured > budget.loss:
        notes += (f"no finalist keeps the loss budget of {budget.loss:g}: the best rises by {best.measured:.3g}.",)
    spent = sum(sum(case.phases.values()) for case, _ in cases) - sum(built.phases.values())
    built = trained_end_to_end(job, built, recipe, loss[1], references)
    phases = {"prices": priced - started, "other finalists": spent}
    return Found(built, marked, prices, phases, notes, budget.limits(prices.floats).get("size"))


def _best(cases: list[tuple[Built, Finalist]], budget: Budget) -> tuple[Built, Finalist]:
    """The finalist with the least loss; in the dual form the first in order of cost that keeps the loss budget."""
    if budget.loss is not None:
        kept = [case for case in cases if case[1].measured <= budget.loss]
        if kept:
            return kept[0]
    return min(cases, key=lambda case: math.inf if math.isnan(case[1].measured) else case[1].measured)

"""Every decision of a run as data."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from calque.errors import SpecError
from calque.grid.bits import naming, read_text, toml_string
from calque.grid.ranges import ActivationRange, WeightRange
from calque.run.fields import choice, number, parse_toml, require, shown, whole
from calque.settings import LEAST_RATE, MOST_RATE, MOST_STEPS, Distillation, Solver, StepSizes, Tuning

TensorRange = Literal["minmax", "mean_minmax", "percentile", "least_squares"]
Flavour = Literal["sequential", "parallel"]
Patches = Literal["sampled", "all"]
Statistics = Literal["none", "float", "trained", "guarded"]

# Chosen on calibration images of resnet20 and mobilenet_v1: docs/experiments.md.
STEP_SIZES = StepSizes(weight=0.01, weight_scale=3e-3, bias=1e-3, activation_scale=3e-3, zero_point=1e-2)
# The released code of Hubara et al. 2021 (docs/method.md); its input range and zero point share a rate.
PAPER_STEP_SIZES = StepSizes(1e-5, 1e-3, 1e-3, activation_scale=1e-1, zero_point=1e-1, unit="absolute")
# Far above what any run needs, and below what a slip of the finger makes of it.
COUNTS = {
    "steps": (0, MOST_STEPS), "search_steps": (0, MOST_STEPS), "block_steps": (0, MOST_STEPS), "priced_inputs": (1, 1_000_000),
    "finalists": (1, 1000),
}  # fmt: skip
MOST_TOLERANCE = 100
LONGEST_NAME = 100
NO_DISTILLATION = Distillation(minutes=0, steps=0, rows=16, mixup=0.5)
NO_TUNING = Tuning("adam", steps=0, rows=32, rate=3e-3, parameters="scales", loss="run")
PAPER_TUNING = Tuning("sgd", steps=800, rows=50, rate=0.1, parameters="biases", loss="kl")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is quantized, and under a budget how its bits are chosen.

    Attributes:
        name: goes into the report.
        activation_range: estimator of the input grids of layers.
        tensor_range: estimator of grids that no layer owns (residual adds, pools, ...).
        weight_range: estimator of the weights' scales.
        flavour: of the fit at the chosen bits; "sequential": each layer sees the output of the quantized layers before it;
            "parallel": its float input, each layer independent of the others and fitted by any number of workers.
        patches: what a fit sees of each input: sampled output positions or all of them.
        steps: of AdaQuant per layer; 0 leaves the weights rounded to nearest, with the bias corrected.
        search_steps: under a budget, steps of parallel AdaQuant at each candidate before it is priced; 0 prices the rounded
            weights with corrected biases.
        priced_inputs: calibration inputs at most on which prices are measured.
        finalists: allocations that are built and measured as whole networks; the best is the result.
        block_steps: of AdaQuant on whole blocks, after their layers; 0 for none.
        statistics: target of the re-estimated channel statistics (para-normalization): the float network's on the same
            inputs, or the trained batch norm's as in the paper; "guarded": the float network's with the square roots of the
            gains, kept where the outputs on calibration inputs are closer for it (KL of classes, else squared error);
            "none" leaves them.
        solver: of the layers; "closed_form" (second moments, GPTQ, coordinate descent) needs sampled patches, and its steps are
            rounds of coordinate descent; it searches its own weight scales and has no rates.
        tolerance: of the range estimators "output" and "least_squares": the widest range is taken whose error is at most this
            share above the least.
        migration: exponent of the channel scales that move over a ReLU or ReLU6 into the weights on both sides; 0 for none, also
            in front of linear layers, where the exponents are chosen by error (calque.fitting.channel_scales.smoothing). It
            needs the flavour "sequential", sampled patches, statistics that are not the trained ones, and no block_steps.
        rates: step sizes of AdaQuant and of distillation.
        distillation: of the float network's outputs into all parameters, end to end; 0 minutes and 0 steps for none.
        tuning: of the biases, end to end; 0 steps for none.

    Raises:
        SpecError: a field out of its range. Counts, rates and minutes have upper bounds, far above what any run needs.

    >>> SEQUENTIAL == Recipe.parse(SEQUENTIAL.to_toml())
    True
    """

    name: str
    activation_range: ActivationRange
    tensor_range: TensorRange
    weight_range: WeightRange
    flavour: Flavour
    patches: Patches
    steps: int
    search_steps: int
    priced_inputs: int
    finalists: int
    block_steps: int
    statistics: Statistics
    solver: Solver = "adaquant"
    tolerance: float = 0.3
    migration: float = 0.0
    rates: StepSizes = STEP_SIZES
    distillation: Distillation = NO_DISTILLATION
    tuning: Tuning = NO_TUNING

    def __post_init__(self) -> None:
        require(
            type(self.name) is str and 0 < len(self.name) <= LONGEST_NAME,
            "name",
            "text of 1 to 100 characters",
            self.name,
        )
        choices = {
            "activation_range": ActivationRange, "tensor_range": TensorRange, "weight_range": WeightRange,
            "flavour": Flavour, "patches": Patches, "statistics": Statistics, "solver": Solver,
        }  # fmt: skip
        for field, kind in choices.items():
            choice(*get_args(kind))(field, getattr(self, field))
        for field, limits in COUNTS.items():
            whole(*limits)(field, getattr(self, field))
        number(0, MOST_TOLERANCE)("tolerance", self.tolerance)
        number(0, 1)("migration", self.migration)
        if self.solver == "closed_form" and self.patches != "sampled":
            raise SpecError('the solver "closed_form" needs patches = "sampled".')
        others = (
            self.flavour != "sequential"
            or self.patches != "sampled"
            or self.statistics == "trained"
            or self.block_steps
        )
        if self.migration and others:
            raise SpecError(
                'migration needs flavour = "sequential", patches = "sampled", statistics not "trained", and block_steps = 0.'
            )
        for name, kind in TABLES.items():
            require(type(getattr(self, name)) is kind, name, f"a {kind.__name__}", getattr(self, name))
        _check_rates(self.rates)
        if self.distillation and self.rates.unit != "relative":
            raise SpecError('distillation needs rates whose unit is "relative".')

    def to_toml(self) -> str:
        """The recipe as TOML."""
        plain = {key: value for key, value in asdict(self).items() if key not in TABLES}
        lines = _toml_lines(plain)
        for name in TABLES:
            lines += ["", f"[{name}]", *_toml_lines(asdict(getattr(self, name)))]
        return "\n".join([*lines, ""])

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """The recipe that the TOML `text` holds; every field must be there.

        Raises:
            SpecError: not TOML, an unknown or missing field, or a value out of its range.
        """
        table = parse_toml(text, "a recipe")
        parts: dict[str, Any] = {}
        for name, kind in TABLES.items():
            part = table.pop(name, {})
            if not isinstance(part, dict):
                raise SpecError(f"{name} must be a table [{name}]. Got {shown(part)}.")
            _require_fields(part, {field.name for field in fields(kind)}, f"the table [{name}]")
            parts[name] = kind(**part)
        _require_fields(table, {field.name for field in fields(cls)} - set(TABLES), "a recipe")
        return cls(**table, **parts)


TABLES: dict[str, Any] = {"rates": StepSizes, "distillation": Distillation, "tuning": Tuning}


def _check_rates(rates: StepSizes) -> None:
    for name, rate in asdict(rates).items():
        if name == "unit":
            choice("relative", "absolute")("rates.unit", rate)
        else:
            number(LEAST_RATE, MOST_RATE)(f"rates.{name}", rate)


def _toml_lines(table: Mapping[str, Any]) -> list[str]:
    written = {True: "true", False: "false"}
    return [
        f"{key} = {toml_string(value)}"
        if isinstance(value, str)
        else f"{key} = {written[value] if isinstance(value, bool) else value}"
        for key, value in table.items()
    ]


def _require_fields(table: Mapping[str, Any], names: set[str], what: str) -> None:
    if set(table) != names:
        unknown, missing = sorted(set(table) - names), sorted(names - set(table))
        raise SpecError(
            f"{what} has exactly the fields {', '.join(sorted(names))}. Unknown: {unknown}; missing: {missing}."
        )


NEAREST = Recipe(
    "nearest", "output", "least_squares", "least_squares", flavour="sequential", patches="sampled", steps=0, search_steps=0,
    priced_inputs=128, finalists=3, block_steps=0, statistics="none",
)  # fmt: skip
LIGHT = replace(NEAREST, name="light", weight_range="output", statistics="float")
FAST = replace(
    LIGHT, name="fast", solver="closed_form", steps=3, search_steps=1, tolerance=0.05, migration=0.5, statistics="guarded",
    finalists=2,
)  # fmt: skip
ACCURATE = replace(FAST, name="accurate", distillation=replace(NO_DISTILLATION, minutes=4))
SEQUENTIAL = replace(LIGHT, name="sequential", steps=250)
ADVANCED = replace(SEQUENTIAL, name="advanced", search_steps=100, tuning=replace(NO_TUNING, steps=50))
PAPER = replace(
    SEQUENTIAL, name="paper-2021", activation_range="mean_minmax", tensor_range="mean_minmax", weight_range="minmax",
    patches="all", steps=1000, search_steps=1000, statistics="trained", rates=PAPER_STEP_SIZES, tuning=PAPER_TUNING,
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in (NEAREST, LIGHT, FAST, ACCURATE, SEQUENTIAL, ADVANCED, PAPER)}


def find_recipe(recipe: "str | Recipe | None") -> Recipe:
    """The recipe itself, the shipped one of that name, the one in that TOML file, or the default (None): fast.

    Raises:
        SpecError: no shipped recipe and no file of that name.
    """
    if recipe is None:
        return FAST
    if isinstance(recipe, Recipe):
        return recipe
    if recipe in RECIPES:
        return RECIPES[recipe]
    if os.path.isfile(recipe):
        with naming(recipe):
            return Recipe.parse(read_text(recipe))
    raise SpecError(f"recipe is one of {', '.join(RECIPES)}, or a TOML file. Got {shown(recipe)}.")

"""Every decision of a run as data."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from calque.errors import SpecError
from calque.ranges import ActivationRange, WeightRange
from calque.solvers.adaquant import StepSizes
from calque.spec import toml_string

TensorRange = Literal["minmax", "mean_minmax", "percentile", "least_squares"]

# Chosen on calibration images of resnet20 and mobilenet_v1: docs/experiments.md.
STEP_SIZES = StepSizes(weight=0.01, weight_scale=3e-3, bias=1e-3, activation_scale=3e-3, zero_point=1e-2)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is quantized at given bits.

    Attributes:
        name: goes into the report.
        activation_range: estimator of the input grids of layers.
        tensor_range: estimator of grids that no layer owns (residual adds, pools, ...).
        weight_range: estimator of the weights' scales.
        steps: of AdaQuant per layer; 0 leaves the weights rounded to nearest, with the bias corrected.
        normalize: whether the channel statistics are re-estimated at the end (para-normalization).
        rates: AdaQuant's relative step sizes.

    >>> SEQUENTIAL == Recipe.parse(SEQUENTIAL.to_toml())
    True
    """

    name: str
    activation_range: ActivationRange
    tensor_range: TensorRange
    weight_range: WeightRange
    steps: int
    normalize: bool
    rates: StepSizes = STEP_SIZES

    def __post_init__(self) -> None:
        choices = {
            "activation_range": ActivationRange,
            "tensor_range": TensorRange,
            "weight_range": WeightRange,
        }
        for field, kind in choices.items():
            if getattr(self, field) not in get_args(kind):
                raise SpecError(f"{field} is one of {', '.join(get_args(kind))}. Got {getattr(self, field)!r}.")
        if type(self.steps) is not int or self.steps < 0:
            raise SpecError(f"steps must be an int >= 0. Got {self.steps!r}.")
        if type(self.normalize) is not bool:
            raise SpecError(f"normalize must be true or false. Got {self.normalize!r}.")
        if any(not (isinstance(rate, (int, float)) and rate > 0) for rate in asdict(self.rates).values()):
            raise SpecError(f"rates must be positive. Got {self.rates}.")

    def to_toml(self) -> str:
        """The recipe as TOML."""
        plain = {key: value for key, value in asdict(self).items() if key != "rates"}
        rates = asdict(self.rates)
        return "\n".join([*_toml_lines(plain), "", "[rates]", *_toml_lines(rates), ""])

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """The recipe that the TOML `text` holds; every field must be there.

        Raises:
            SpecError: not TOML, an unknown or missing field, or a value out of its range.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"a recipe is a TOML file. This one does not parse: {error}.") from error
        rates = table.pop("rates", {})
        if not isinstance(rates, dict):
            raise SpecError(f"rates must be a table [rates]. Got {rates!r}.")
        _require_fields(table, {field.name for field in fields(cls)} - {"rates"}, "a recipe")
        _require_fields(rates, {field.name for field in fields(StepSizes)}, "the table [rates]")
        return cls(**table, rates=StepSizes(**rates))


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


NEAREST = Recipe("nearest", "output", "least_squares", "least_squares", steps=0, normalize=False)
SEQUENTIAL = replace(NEAREST, name="sequential", weight_range="output", steps=250, normalize=True)
RECIPES = {recipe.name: recipe for recipe in (NEAREST, SEQUENTIAL)}


def find_recipe(recipe: "str | Recipe | None") -> Recipe:
    """The recipe itself, the shipped one of that name, the one in that TOML file, or the default (None).

    Raises:
        SpecError: no shipped recipe and no file of that name.
    """
    if recipe is None:
        return SEQUENTIAL
    if isinstance(recipe, Recipe):
        return recipe
    if recipe in RECIPES:
        return RECIPES[recipe]
    if os.path.isfile(recipe):
        return Recipe.parse(Path(recipe).read_text(encoding="utf-8"))
    raise SpecError(f"recipe is one of {', '.join(RECIPES)}, or a TOML file. Got {recipe!r}.")

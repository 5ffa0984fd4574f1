"""Every decision of a run as data, and the shipped recipes."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from calque.errors import SpecError
from calque.grid.bits import SHIPPED, naming, read_text
from calque.run.fields import parse_toml, require, shown
from calque.run.pieces import check_fields, from_table, to_toml
from calque.settings import (
    RATES,
    AbsoluteRates,
    AdaQuant,
    Blocks,
    ClosedForm,
    Distillation,
    Flavour,
    Method,
    Nearest,
    Normalization,
    Parallel,
    Ranges,
    RelativeRates,
    Search,
    Sequential,
    Tuning,
)

__all__ = [
    "ACCURATE",
    "ADVANCED",
    "FAST",
    "LIGHT",
    "NEAREST",
    "PAPER",
    "RATES",
    "RECIPES",
    "SEQUENTIAL",
    "AbsoluteRates",
    "AdaQuant",
    "Blocks",
    "ClosedForm",
    "Distillation",
    "Nearest",
    "Normalization",
    "Parallel",
    "Ranges",
    "Recipe",
    "RelativeRates",
    "Search",
    "Sequential",
    "Tuning",
    "find_recipe",
    "recipe_text",
]

LONGEST_NAME = 100
# What a table of a recipe's TOML calls its class, where several may stand there.
KINDS: dict[type, str] = {
    Nearest: "nearest",
    ClosedForm: "closed_form",
    AdaQuant: "adaquant",
    Sequential: "sequential",
    Parallel: "parallel",
    RelativeRates: "relative",
    AbsoluteRates: "absolute",
}
# Fields of the form before this one, in which a recipe was one flat table.
FLAT = frozenset({
    "activation_range", "tensor_range", "weight_range", "patches", "steps", "search_steps", "priced_inputs", "finalists",
    "block_steps", "statistics", "solver", "tolerance", "migration", "rates",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is quantized, and under a budget how its bits are chosen; a stage that is None is left out.

    Attributes:
        name: goes into the report.
        fit: of each layer to its float output: `Nearest`, `ClosedForm` or `AdaQuant`.
        flavour: what layers see: `Sequential` the quantized network, `Parallel` the float one.
        ranges: estimators of all grids.
        blocks: AdaQuant on whole blocks, after their layers.
        normalization: statistics of channels put back, after the blocks.
        distillation: of the float network's outputs into all parameters; under a budget, of the chosen finalist alone.
        tuning: of the biases, at the end; under a budget, of the chosen finalist alone.
        search: how bits are chosen under a budget.

    Raises:
        SpecError: a field out of its range; channel scales together with a stage that reads unscaled channels.

    >>> FAST == Recipe.parse(FAST.to_toml())
    True
    >>> Recipe("mine", ClosedForm(rounds=1), normalization=Normalization("guarded")).flavour
    Sequential(channel_scales=0.0)
    """

    name: str
    fit: Method
    flavour: Flavour = field(default_factory=Sequential)
    ranges: Ranges = field(default_factory=Ranges)
    blocks: Blocks | None = None
    normalization: Normalization | None = None
    distillation: Distillation | None = None
    tuning: Tuning | None = None
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        check_fields(self, name=_name)
        scaled = isinstance(self.flavour, Sequential) and self.flavour.channel_scales > 0
        whole_inputs = isinstance(self.fit, AdaQuant) and self.fit.patches == "all"
        trained = self.normalization is not None and self.normalization.target == "trained"
        if scaled and (whole_inputs or trained or self.blocks is not None):
            raise SpecError(
                'channel_scales need a fit with patches = "sampled", a normalization whose target is not "trained", and no '
                "blocks, all of which read the float network's own channels. Set channel_scales to 0, or change these."
            )

    def to_toml(self) -> str:
        """The recipe as TOML: a table for each piece."""
        return to_toml(self, KINDS)

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """The recipe that the TOML `text` holds; every field must be there, but for tables of stages that are left out.

        Raises:
            SpecError: not TOML, an unknown or missing field, or a value out of its range.
        """
        table = parse_toml(text, "a recipe")
        if FLAT & set(table):
            raise SpecError(
                "this recipe is one flat table, as calque wrote it before; now each stage has a table of its own. Print a "
                "shipped one by `calque recipe NAME > mine.toml`, and move your changes into it."
            )
        return from_table(cls, table, KINDS)


def _name(where: str, value: object) -> None:
    fits = type(value) is str and 0 < len(value) <= LONGEST_NAME
    require(fits, where, f"text of 1 to {LONGEST_NAME} characters", value)


def _shipped(name: str) -> str:
    """The text of a shipped recipe's file, whose head says what it is for."""
    return (Path(__file__).parent / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


RECIPES = {name: Recipe.parse(_shipped(name)) for name in SHIPPED}
NEAREST, LIGHT, FAST, ACCURATE, SEQUENTIAL, ADVANCED, PAPER = (RECIPES[name] for name in SHIPPED)


def recipe_text(recipe: str) -> str:
    """The TOML of the shipped recipe of that name, with the comments of its file, or of the one in that TOML file.

    Raises:
        SpecError: no shipped recipe and no file of that name.
    """
    return _shipped(recipe) if recipe in SHIPPED else find_recipe(recipe).to_toml()


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
    missing = ", which is no file" if str(recipe).endswith(".toml") else ""
    raise SpecError(f"recipe is one of {', '.join(RECIPES)}, or a TOML file. Got {shown(recipe)}{missing}.")

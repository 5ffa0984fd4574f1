"""Recipes as data: each piece checks itself, comes back from its TOML, and every field of it is read."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import calque
import networks
from calque.errors import SpecError
from calque.quantized.model import QuantizedModel
from calque.recipe import (
    ACCURATE,
    ADVANCED,
    FAST,
    NEAREST,
    PAPER,
    RATES,
    RECIPES,
    SEQUENTIAL,
    AbsoluteRates,
    AdaQuant,
    Blocks,
    ClosedForm,
    Distillation,
    Nearest,
    Normalization,
    Parallel,
    Ranges,
    Recipe,
    RelativeRates,
    Search,
    Sequential,
    Tuning,
    find_recipe,
    recipe_text,
)

RATE, STEPS = st.floats(1e-8, 1e3), st.integers(1, 10**6)
RELATIVE = st.builds(RelativeRates, RATE, RATE, RATE, RATE, RATE)
ABSOLUTE = st.builds(AbsoluteRates, RATE, RATE, RATE, RATE, RATE)
METHOD = st.one_of(
    st.just(Nearest()),
    st.builds(ClosedForm, STEPS),
    st.builds(AdaQuant, STEPS, st.one_of(RELATIVE, ABSOLUTE), st.sampled_from(["sampled", "all"])),
)
RANGES = st.builds(
    Ranges,
    activation=st.sampled_from(["minmax", "mean_minmax", "percentile", "least_squares", "output"]),
    tensor=st.sampled_from(["minmax", "mean_minmax", "percentile", "least_squares"]),
    weight=st.sampled_from(["minmax", "least_squares", "output"]),
    tolerance=st.floats(0, 100),
)
DISTILLATION = st.builds(
    Distillation,
    minutes=st.just(0),
    steps=STEPS,
    rows=st.integers(1, 100),
    mixup=st.floats(0, 1),
    loss=st.sampled_from(["outputs", "run", "kl", "mse"]),
    rates=RELATIVE,
)
TIMED = st.builds(Distillation, minutes=st.floats(1e-3, 1e3))
TUNING = st.builds(
    Tuning,
    optimizer=st.sampled_from(["adam", "sgd"]),
    steps=STEPS,
    rows=st.integers(1, 100),
    rate=RATE,
    parameters=st.sampled_from(["biases", "scales"]),
    loss=st.sampled_from(["run", "kl", "mse"]),
)
RECIPE = st.builds(
    Recipe,
    name=st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True),
    fit=METHOD,
    flavour=st.sampled_from([Sequential(), Parallel()]),
    ranges=RANGES,
    blocks=st.one_of(st.none(), st.builds(Blocks, STEPS, RELATIVE)),
    normalization=st.one_of(st.none(), st.builds(Normalization, st.sampled_from(["float", "guarded", "trained"]))),
    distillation=st.one_of(st.none(), DISTILLATION, TIMED),
    tuning=st.one_of(st.none(), TUNING),
    search=st.builds(Search, METHOD, st.integers(1, 10**6), st.integers(1, 100)),
)
SCALED = st.builds(
    Recipe,
    name=st.just("scaled"),
    fit=st.one_of(st.just(Nearest()), st.builds(ClosedForm, STEPS)),
    flavour=st.builds(Sequential, st.floats(0, 1)),
)


@given(st.one_of(RECIPE, SCALED))
@settings(deadline=None, max_examples=50)
def test_a_recipe_comes_back_from_its_toml(recipe: Recipe) -> None:
    assert Recipe.parse(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_a_recipe_with_an_odd_name_comes_back_from_its_toml(name: str) -> None:
    recipe = replace(NEAREST, name=name)

    assert Recipe.parse(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_found_by_name_and_come_back_from_their_toml(name: str) -> None:
    assert find_recipe(name).name == name
    assert Recipe.parse(find_recipe(name).to_toml()) == find_recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_of_a_shipped_recipe_says_what_it_is_for_and_has_what_is_written(name: str) -> None:
    head, _, body = recipe_text(name).partition("\n\n")

    assert [line.split(":")[0] for line in head.splitlines()] == ["# For", "# Time", "# Result", "# Figures"]
    assert body == find_recipe(name).to_toml()


def test_accurate_is_fast_and_then_distilled() -> None:
    assert replace(ACCURATE, name="fast", distillation=None) == FAST


def test_a_recipe_stands_for_itself_and_nothing_for_fast() -> None:
    assert find_recipe(NEAREST) is NEAREST
    assert find_recipe(None) is FAST


def test_a_recipe_is_found_in_its_file(tmp_path: Path) -> None:
    recipe = replace(SEQUENTIAL, name="mine", fit=AdaQuant(steps=7))
    (tmp_path / "mine.toml").write_text(recipe.to_toml())

    assert find_recipe(str(tmp_path / "mine.toml")) == recipe


def test_an_unknown_recipe_is_refused_with_the_names() -> None:
    with pytest.raises(
        SpecError,
        match=r"recipe is one of nearest, .*, paper-2021, or a TOML file. Got 'best'",
    ):
        find_recipe("best")


def test_a_relative_rate_is_no_absolute_one() -> None:
    numbers = (0.1, 0.2, 0.3, 0.4, 0.5)

    assert len({RelativeRates(*numbers), AbsoluteRates(*numbers), RelativeRates(*numbers)}) == 2


@pytest.mark.parametrize(
    ("piece", "change", "message"),
    [
        (NEAREST, {"name": ""}, "Recipe.name must be text of 1 to 100 characters. Got ''"),
        (NEAREST, {"name": 3}, "Recipe.name must be text of 1 to 100 characters. Got 3"),
        (NEAREST, {"name": "x" * 101}, "Recipe.name must be text of 1 to 100 characters"),
        (NEAREST, {"fit": "nearest"}, "Recipe.fit must be of Nearest or ClosedForm or AdaQuant. Got 'nearest'"),
        (NEAREST, {"fit": None}, "Recipe.fit must be of Nearest or ClosedForm or AdaQuant. Got None"),
        (NEAREST, {"flavour": "parallel"}, "Recipe.flavour must be of Sequential or Parallel. Got 'parallel'"),
        (NEAREST, {"ranges": None}, "Recipe.ranges must be of Ranges. Got None"),
        (NEAREST, {"tuning": 3}, "Recipe.tuning must be of Tuning or None. Got 3"),
        (NEAREST, {"search": Nearest()}, "Recipe.search must be of Search. Got Nearest()"),
        (Ranges(), {"activation": "best"}, "Ranges.activation is one of minmax, .*, output. Got 'best'"),
        (Ranges(), {"tensor": "output"}, "Ranges.tensor is one of .* Got 'output'"),
        (Ranges(), {"weight": "percentile"}, "Ranges.weight is one of .* Got 'percentile'"),
        (Ranges(), {"tolerance": -0.1}, "Ranges.tolerance must be a finite number from 0 to 100. Got -0.1"),
        (Ranges(), {"tolerance": 101}, "Ranges.tolerance must be a finite number from 0 to 100. Got 101"),
        (Ranges(), {"tolerance": "x"}, "Ranges.tolerance must be a finite number from 0 to 100. Got 'x'"),
        (RATES, {"bias": 0.0}, "RelativeRates.bias must be a finite number from 1e-12 to 1,000,000. Got 0.0"),
        (RATES, {"weight": float("nan")}, "RelativeRates.weight must be a finite number"),
        (RATES, {"weight": float("inf")}, "RelativeRates.weight must be a finite number"),
        (RATES, {"weight": True}, "RelativeRates.weight must be a finite number"),
        (RATES, {"weight": 1e9}, "RelativeRates.weight must be .* to 1,000,000. Got 1000000000.0"),
        (ClosedForm(), {"rounds": 0}, "ClosedForm.rounds must be an int from 1 to 1,000,000. Got 0"),
        (AdaQuant(), {"steps": 0}, "AdaQuant.steps must be an int from 1 to 1,000,000. Got 0"),
        (AdaQuant(), {"steps": 2.5}, "AdaQuant.steps must be an int from 1 to 1,000,000. Got 2.5"),
        (AdaQuant(), {"steps": 10**30}, r"AdaQuant.steps must be .* Got an int of about 10\^30"),
        (AdaQuant(), {"patches": "some"}, "AdaQuant.patches is one of sampled, all"),
        (AdaQuant(), {"rates": 0.1}, "AdaQuant.rates must be of RelativeRates or AbsoluteRates. Got 0.1"),
        (Sequential(), {"channel_scales": 1.5}, "Sequential.channel_scales must be .* from 0 to 1. Got 1.5"),
        (Blocks(1), {"steps": 0}, "Blocks.steps must be an int from 1 to 1,000,000. Got 0"),
        (Blocks(1), {"rates": PAPER.fit.rates}, "Blocks.rates must be of RelativeRates. Got AbsoluteRates"),  # type: ignore[union-attr]
        (Normalization(), {"target": "none"}, "Normalization.target is one of float, guarded, trained. Got 'none'"),
        (Distillation(steps=1), {"rates": AbsoluteRates(1, 1, 1, 1, 1)}, "Distillation.rates must be of RelativeRates"),
        (Distillation(steps=1), {"steps": 0}, "bounded by minutes or by steps. Got 0 minutes and 0 steps"),
        (Distillation(steps=1), {"minutes": 2}, "bounded by minutes or by steps. Got 2 minutes and 1 steps"),
        (Tuning(), {"steps": 0}, "Tuning.steps must be an int from 1 to 1,000,000. Got 0"),
        (Search(), {"finalists": 0}, "Search.finalists must be an int from 1 to 1,000. Got 0"),
        (Search(), {"finalists": 1001}, "Search.finalists must be an int from 1 to 1,000. Got 1001"),
        (Search(), {"priced_inputs": 0}, "Search.priced_inputs must be an int from 1 to 1,000,000. Got 0"),
        (Search(), {"priced_inputs": 10**5000}, r"Search.priced_inputs must be .* Got an int of about 10\^5000"),
        (Search(), {"fit": Parallel()}, "Search.fit must be of Nearest or ClosedForm or AdaQuant"),
    ],
)
def test_a_field_out_of_its_range_is_refused(piece: Any, change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("()", r"\(\)")):
        replace(piece, **change)


@pytest.mark.parametrize(
    "stage",
    [
        {"fit": AdaQuant(patches="all")},
        {"normalization": Normalization("trained")},
        {"blocks": Blocks(steps=8)},
    ],
    ids=str,
)
def test_channel_scales_are_refused_beside_a_stage_that_reads_unscaled_channels(stage: dict[str, Any]) -> None:
    scaled = replace(SEQUENTIAL, flavour=Sequential(channel_scales=0.5))

    assert replace(SEQUENTIAL, **stage) != SEQUENTIAL
    with pytest.raises(SpecError, match=r"channel_scales need a fit with patches = \"sampled\""):
        replace(scaled, **stage)


TOML = SEQUENTIAL.to_toml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "a recipe is a TOML file. This one does not parse"),
        (TOML.replace("steps", "stepps"), r"the table \[fit\] has .*Unknown: stepps\. Missing: steps"),
        (TOML.replace("bias", "biass"), r"the table \[fit.rates\] has .*Unknown: biass\. Missing: bias"),
        (TOML.replace("[ranges]", "[range]"), r"the file has .*Unknown: range\. Missing: ranges"),
        (TOML.replace("[search.fit]", "[search.fits]"), r"the table \[search\] has .*Missing: fit"),
        (TOML.replace("steps = 250", 'steps = "many"'), r"the table \[fit\]: AdaQuant.steps must be .* Got 'many'"),
        (TOML.replace('"adaquant"', '"magic"'), "fit.kind is one of nearest, closed_form, adaquant. Got 'magic'"),
        (
            TOML.replace('kind = "adaquant"', ""),
            r"the table \[fit\] needs the field kind, one of nearest, .*, adaquant",
        ),
        (TOML.replace('"relative"', "[]"), r"fit.rates.kind is one of relative, absolute. Got a list of 0"),
        (TOML.replace("steps = 250", "steps = 1" + 6000 * "0"), "does not parse"),
        (TOML + "deep = " + 5000 * "[" + 5000 * "]", "nested more than 64 levels"),
        (TOML + "deep = " + 100 * "[" + 100 * "]", "nested more than 64 levels"),
        (TOML.replace("weight = 0.01", 'weight = "x"'), r"\[fit.rates\]: RelativeRates.weight must be"),
        ("search = 3\n" + TOML.split("[search]")[0], r"search must be a table \[search\]. Got 3"),
        (
            TOML.replace("channel_scales = 0.0", "channel_scales = 0.5").replace('"sampled"', '"all"'),
            "the file: channel_scales need",
        ),
        (FAST.to_toml() + "\n[distillation]\nsteps = 3\n", r"the table \[distillation\] has the fields minutes, "),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe.parse(text)


FLAT = """name = "mine"
activation_range = "output"
steps = 250
solver = "adaquant"
statistics = "float"

[rates]
weight = 0.01
"""


@pytest.mark.parametrize("text", [FLAT, "[rates]\nweight = 0.01\n", TOML.replace("\n", "\nsteps = 3\n", 1)])
def test_a_flat_recipe_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(
        SpecError, match=r"one flat table, .* by `calque recipe NAME > mine.toml`, and move your changes"
    ):
        Recipe.parse(text)


# Every field of a recipe and of its pieces, changed alone; "fit.patches" is the field `patches` of the piece `fit`.
SEARCHED = ("search.fit", "search.priced_inputs", "search.finalists")  # what a budget reads
FIT = AdaQuant(steps=16)
BASE = Recipe("base", FIT, normalization=Normalization("float"), search=Search(AdaQuant(steps=8)))
ROUNDED = replace(BASE, fit=ClosedForm(rounds=3))
BLOCKS = replace(BASE, blocks=Blocks(steps=16))
DISTILLED = replace(BASE, distillation=Distillation(steps=40, rows=32, mixup=0))
TUNED = replace(NEAREST, tuning=Tuning("adam", 16, 16, 1e-2, "biases"))


def with_rates(rates: RelativeRates | AbsoluteRates) -> Recipe:
    return replace(BASE, fit=replace(FIT, rates=rates))


CHANGES: dict[str, tuple[Recipe, Recipe]] = {
    "name": (BASE, replace(BASE, name="other")),
    "fit": (BASE, replace(BASE, fit=Nearest())),
    "fit.steps": (BASE, replace(BASE, fit=AdaQuant(steps=8))),
    "fit.patches": (BASE, replace(BASE, fit=replace(FIT, patches="all"))),
    "fit.rates": (BASE, with_rates(AbsoluteRates(1e-2, 1e-3, 1e-3, 1e-1, 1e-1))),
    "fit.rates.weight": (BASE, with_rates(replace(RATES, weight=0.05))),
    "fit.rates.weight_scale": (BASE, with_rates(replace(RATES, weight_scale=0.05))),
    "fit.rates.bias": (BASE, with_rates(replace(RATES, bias=0.05))),
    "fit.rates.activation_scale": (BASE, with_rates(replace(RATES, activation_scale=0.05))),
    "fit.rates.zero_point": (BASE, with_rates(replace(RATES, zero_point=1.0))),
    "fit.rounds": (ROUNDED, replace(ROUNDED, fit=ClosedForm(rounds=1))),
    "flavour": (BASE, replace(BASE, flavour=Parallel())),
    "flavour.channel_scales": (BASE, replace(BASE, flavour=Sequential(channel_scales=0.5))),
    "ranges": (BASE, replace(BASE, ranges=Ranges("minmax", "minmax", "minmax"))),
    "ranges.activation": (BASE, replace(BASE, ranges=Ranges(activation="minmax"))),
    "ranges.tensor": (BASE, replace(BASE, ranges=Ranges(tensor="mean_minmax"))),
    "ranges.weight": (BASE, replace(BASE, ranges=Ranges(weight="minmax"))),
    "ranges.tolerance": (BASE, replace(BASE, ranges=Ranges(tolerance=0.0))),
    "blocks": (BASE, BLOCKS),
    "blocks.steps": (BLOCKS, replace(BASE, blocks=Blocks(steps=24))),
    "blocks.rates": (BLOCKS, replace(BASE, blocks=Blocks(16, replace(RATES, bias=0.05)))),
    "normalization": (BASE, replace(BASE, normalization=None)),
    "normalization.target": (BASE, replace(BASE, normalization=Normalization("trained"))),
    "distillation": (BASE, DISTILLED),
    "tuning": (TUNED, replace(TUNED, tuning=None)),
    "tuning.optimizer": (TUNED, replace(TUNED, tuning=Tuning("sgd", 16, 16, 1.0, "biases"))),
    "tuning.steps": (TUNED, replace(TUNED, tuning=Tuning("adam", 8, 16, 1e-2, "biases"))),
    "tuning.rows": (TUNED, replace(TUNED, tuning=Tuning("adam", 16, 8, 1e-2, "biases"))),
    "tuning.rate": (TUNED, replace(TUNED, tuning=Tuning("adam", 16, 16, 3e-3, "biases"))),
    "tuning.parameters": (TUNED, replace(TUNED, tuning=Tuning("adam", 16, 16, 1e-2, "scales"))),
    "tuning.loss": (TUNED, replace(TUNED, tuning=Tuning("adam", 16, 16, 1e-2, "biases", "kl"))),
    "search": (BASE, replace(BASE, search=Search(AdaQuant(steps=8), 7, 1))),
    "search.fit": (BASE, replace(BASE, search=Search(Nearest()))),
    "search.priced_inputs": (BASE, replace(BASE, search=Search(AdaQuant(steps=8), priced_inputs=7))),
    "search.finalists": (BASE, replace(BASE, search=Search(AdaQuant(steps=8), finalists=1))),
}
ELSEWHERE = {"distillation": "tests/correction/test_distillation.py"}  # where a piece's own fields are changed


@pytest.fixture(scope="module")
def known() -> dict[str, QuantizedModel]:
    """Networks by the TOML of their recipe: several fields are compared with the same one."""
    return {}


def quantized(recipe: Recipe, known: dict[str, QuantizedModel]) -> QuantizedModel:
    if recipe.to_toml() not in known:
        net = networks.seeded(networks.Residual())
        known[recipe.to_toml()] = calque.quantize(
            net, networks.images(60, seed=0), bits="w3a3", first_last=None, recipe=recipe
        )
    return known[recipe.to_toml()]


def differ(one: QuantizedModel, other: QuantizedModel) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return not all(torch.equal(a, b) for a, b in states)


PLAIN = [field for field in CHANGES if not field.startswith(("name", "search", "tuning"))]


@pytest.mark.parametrize("field", PLAIN)
def test_each_field_changes_something(field: str, known: dict[str, QuantizedModel]) -> None:
    one, other = CHANGES[field]

    assert differ(quantized(one, known), quantized(other, known))


def test_the_name_goes_into_the_report(known: dict[str, QuantizedModel]) -> None:
    one, other = (quantized(recipe, known) for recipe in CHANGES["name"])

    assert (one.report.recipe, other.report.recipe) == ("base", "other")
    assert not differ(one, other)


@pytest.fixture(scope="module")
def tuned_base(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    q = calque.quantize(trained, calibration, bits="w2a4", recipe=TUNED)
    assert q.report.tuned is not None
    assert q.report.tuned[1] < q.report.tuned[0]  # it has something to gain
    return q


@pytest.mark.parametrize("field", [field for field in CHANGES if field.startswith("tuning")])
def test_each_field_of_the_tuning_changes_a_network_that_has_something_to_gain(
    field: str, tuned_base: QuantizedModel, trained: networks.Residual, calibration: Tensor
) -> None:
    assert differ(tuned_base, calque.quantize(trained, calibration, bits="w2a4", recipe=CHANGES[field][1]))


def searched(recipe: Recipe) -> QuantizedModel:
    net = networks.seeded(networks.Residual())
    budget = calque.Budget(size=0.82)
    return calque.quantize(
        net, networks.images(60, seed=0), bits=("w8a8", "w4a4", "w2a4"), budget=budget, recipe=recipe
    )


@pytest.fixture(scope="module")
def searched_base() -> QuantizedModel:
    return searched(BASE)


@pytest.mark.parametrize("field", SEARCHED)
def test_each_field_of_the_search_changes_its_prices_or_its_finalists(
    field: str, searched_base: QuantizedModel
) -> None:
    other = searched(CHANGES[field][1])

    if field == "search.finalists":
        assert len(other.report.finalists) < len(searched_base.report.finalists)
        return
    assert other.prices is not None
    assert searched_base.prices is not None
    assert other.prices.increases != searched_base.prices.increases


PIECES: Mapping[str, tuple[type, ...]] = {
    "fit": (Nearest, ClosedForm, AdaQuant),
    "flavour": (Sequential, Parallel),
    "ranges": (Ranges,),
    "blocks": (Blocks,),
    "normalization": (Normalization,),
    "tuning": (Tuning,),
    "search": (Search,),
}


def test_every_field_has_a_test() -> None:
    expected = {field.name for field in fields(Recipe)}
    for stage, kinds in PIECES.items():
        expected |= {f"{stage}.{field.name}" for kind in kinds for field in fields(kind)}
    expected |= {f"fit.rates.{field.name}" for field in fields(RATES)}

    assert set(CHANGES) == expected
    stages = {name for name in expected if "." not in name and is_dataclass(getattr(ACCURATE, name))}
    assert stages <= {*PIECES, *ELSEWHERE}
    assert is_dataclass(ADVANCED.tuning)

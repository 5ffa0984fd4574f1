from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import calque
import networks
from calque.errors import SpecError
from calque.quantized.model import QuantizedModel
from calque.recipe import ADVANCED, FAST, NEAREST, NO_TUNING, RECIPES, SEQUENTIAL, Recipe, find_recipe
from calque.settings import Distillation, StepSizes, Tuning

RATES = st.floats(1e-8, 1e3)
TUNING = st.builds(
    Tuning,
    optimizer=st.sampled_from(["adam", "sgd"]),
    steps=st.integers(0, 1000),
    rows=st.integers(1, 100),
    rate=RATES,
    parameters=st.sampled_from(["biases", "scales"]),
    loss=st.sampled_from(["run", "kl", "mse"]),
)
DISTILLATION = st.builds(
    Distillation,
    minutes=st.floats(0, 100),
    steps=st.integers(0, 1000),
    rows=st.integers(1, 100),
    mixup=st.floats(0, 1),
    loss=st.sampled_from(["outputs", "run", "kl", "mse"]),
)
RECIPE = st.builds(
    Recipe,
    name=st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True),
    activation_range=st.sampled_from(["minmax", "mean_minmax", "percentile", "least_squares", "output"]),
    tensor_range=st.sampled_from(["minmax", "mean_minmax", "percentile", "least_squares"]),
    weight_range=st.sampled_from(["minmax", "least_squares", "output"]),
    flavour=st.sampled_from(["sequential", "parallel"]),
    patches=st.sampled_from(["sampled", "all"]),
    steps=st.integers(0, 10**6),
    search_steps=st.integers(0, 10**6),
    priced_inputs=st.integers(1, 10**6),
    finalists=st.integers(1, 100),
    block_steps=st.integers(0, 10**6),
    statistics=st.sampled_from(["none", "float", "trained"]),
    rates=st.builds(StepSizes, RATES, RATES, RATES, RATES, RATES, st.sampled_from(["relative", "absolute"])),
    tuning=TUNING,
)
DISTILLED = st.builds(
    replace, RECIPE, distillation=DISTILLATION, rates=st.builds(StepSizes, RATES, RATES, RATES, RATES, RATES)
)


@given(st.one_of(RECIPE, DISTILLED))
@settings(deadline=None, max_examples=50)
def test_a_recipe_comes_back_from_its_toml(recipe: Recipe) -> None:
    assert Recipe.parse(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_a_recipe_with_an_odd_name_comes_back_from_its_toml(name: str) -> None:
    recipe = replace(NEAREST, name=name)

    assert Recipe.parse(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_are_found_by_name(name: str) -> None:
    assert find_recipe(name).name == name


def test_a_recipe_stands_for_itself_and_nothing_for_fast() -> None:
    assert find_recipe(NEAREST) is NEAREST
    assert find_recipe(None) is FAST


def test_a_recipe_is_found_in_its_file(tmp_path: Path) -> None:
    recipe = replace(SEQUENTIAL, name="mine", steps=7)
    (tmp_path / "mine.toml").write_text(recipe.to_toml())

    assert find_recipe(str(tmp_path / "mine.toml")) == recipe


def test_an_unknown_recipe_is_refused_with_the_names() -> None:
    with pytest.raises(
        SpecError,
        match=r"recipe is one of nearest, .*, paper-2021, or a TOML file. Got 'best'",
    ):
        find_recipe("best")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_range": "best"}, "activation_range is one of minmax, .*, output. Got 'best'"),
        ({"tensor_range": "output"}, "tensor_range is one of .* Got 'output'"),
        ({"weight_range": "percentile"}, "weight_range is one of .* Got 'percentile'"),
        ({"steps": -1}, "steps must be an int from 0 to 1,000,000. Got -1"),
        ({"steps": 2.5}, "steps must be an int from 0 to 1,000,000. Got 2.5"),
        (
            {"rates": replace(SEQUENTIAL.rates, bias=0.0)},
            "rates.bias must be a finite number from 1e-12 to 1,000,000. Got 0.0",
        ),
        ({"rates": replace(SEQUENTIAL.rates, weight=float("nan"))}, "rates.weight must be a finite number"),
        ({"rates": replace(SEQUENTIAL.rates, weight=float("inf"))}, "rates.weight must be a finite number"),
        ({"rates": replace(SEQUENTIAL.rates, weight=True)}, "rates.weight must be a finite number"),
        ({"name": ""}, "name must be text of 1 to 100 characters. Got ''"),
        ({"name": 3}, "name must be text of 1 to 100 characters. Got 3"),
        ({"statistics": "no"}, "statistics is one of none, float, trained, guarded. Got 'no'"),
        ({"flavour": "both"}, "flavour is one of sequential, parallel"),
        ({"patches": "some"}, "patches is one of sampled, all"),
        ({"finalists": 0}, "finalists must be an int from 1 to 1,000. Got 0"),
        ({"priced_inputs": 0}, "priced_inputs must be an int from 1 to 1,000,000. Got 0"),
        ({"search_steps": -1}, "search_steps must be an int from 0 to 1,000,000. Got -1"),
        ({"block_steps": -1}, "block_steps must be an int from 0 to 1,000,000. Got -1"),
        ({"solver": "magic"}, "solver is one of adaquant, closed_form. Got 'magic'"),
        ({"solver": "closed_form", "patches": "all"}, 'needs patches = "sampled"'),
        ({"tolerance": -0.1}, "tolerance must be a finite number from 0 to 100. Got -0.1"),
        ({"migration": 1.5}, "migration must be a finite number from 0 to 1. Got 1.5"),
        ({"migration": 0.5, "flavour": "parallel"}, "migration needs"),
        ({"migration": 0.5, "patches": "all"}, "migration needs"),
        ({"migration": 0.5, "statistics": "trained"}, "migration needs"),
        ({"migration": 0.5, "block_steps": 8}, "migration needs"),
        (
            {"distillation": Distillation(0, 1, 1, 0), "rates": replace(SEQUENTIAL.rates, unit="absolute")},
            "distillation needs rates whose unit",
        ),
        ({"steps": 10**30}, r"steps must be an int from 0 to 1,000,000. Got an int of about 10\^30"),
        ({"search_steps": 10**5000}, r"search_steps must be .* Got an int of about 10\^5000"),
        ({"block_steps": 1_000_001}, "block_steps must be .* to 1,000,000. Got 1000001"),
        ({"priced_inputs": 10**9}, "priced_inputs must be an int from 1 to 1,000,000. Got 1000000000"),
        ({"finalists": 1001}, "finalists must be an int from 1 to 1,000. Got 1001"),
        ({"tolerance": 101}, "tolerance must be a finite number from 0 to 100. Got 101"),
        ({"rates": replace(SEQUENTIAL.rates, weight=1e9)}, "rates.weight must be .* to 1,000,000. Got 1000000000.0"),
        ({"name": "x" * 101}, "name must be text of 1 to 100 characters"),
        ({"tolerance": "x"}, "tolerance must be a finite number from 0 to 100. Got 'x'"),
        ({"rates": replace(SEQUENTIAL.rates, unit="metres")}, "rates.unit is one of relative, absolute. Got 'metres'"),  # type: ignore[arg-type]
    ],
)
def test_a_field_out_of_its_range_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(SEQUENTIAL, **change)  # type: ignore[arg-type]  # wrong on purpose


TOML = NEAREST.to_toml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "a recipe is a TOML file. This one does not parse"),
        (TOML.replace("steps", "stepps"), r"Unknown: \['stepps'\]; missing: \['steps'\]"),
        (
            TOML.replace("bias", "biass"),
            r"the table \[rates\] has exactly .*Unknown: \['biass'\]; missing: \['bias'\]",
        ),
        (TOML.split("[rates]")[0], r"the table \[rates\] has exactly"),
        (TOML.replace("steps = 0", 'steps = "many"'), "steps must be an int from 0 to 1,000,000. Got 'many'"),
        (TOML.replace("\nsteps = 0", "\nsteps = 1" + 6000 * "0", 1), "does not parse"),
        (TOML + "deep = " + 5000 * "[" + 5000 * "]", "nested more than 64 levels"),
        (TOML + "deep = " + 100 * "[" + 100 * "]", "nested more than 64 levels"),
        (TOML.replace("weight = 0.01", 'weight = "x"'), "rates.weight must be"),
        ("rates = 3\n" + TOML.split("[rates]")[0], "rates"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe.parse(text)


SEARCHED = ("search_steps", "priced_inputs", "finalists")  # fields that a budget reads
BASE = replace(ADVANCED, steps=16, search_steps=8, tuning=NO_TUNING)
TUNED = replace(NEAREST, tuning=Tuning("adam", 16, 16, 1e-2, "biases"))


def with_rate(name: str, rate: float) -> Recipe:
    return replace(BASE, rates=replace(BASE.rates, **{name: rate}))  # type: ignore[arg-type]  # never the unit


CHANGES: dict[str, Recipe] = {
    "name": replace(BASE, name="other"),
    "activation_range": replace(BASE, activation_range="minmax"),
    "tensor_range": replace(BASE, tensor_range="mean_minmax"),
    "weight_range": replace(BASE, weight_range="minmax"),
    "flavour": replace(BASE, flavour="parallel"),
    "patches": replace(BASE, patches="all"),
    "steps": replace(BASE, steps=8),
    "search_steps": replace(BASE, search_steps=0),
    "priced_inputs": replace(BASE, priced_inputs=7),
    "finalists": replace(BASE, finalists=1),
    "block_steps": replace(BASE, block_steps=16),
    "statistics": replace(BASE, statistics="none"),
    "solver": replace(BASE, solver="closed_form"),
    "tolerance": replace(BASE, tolerance=0.0),
    "migration": replace(BASE, migration=0.5),
    "statistics.trained": replace(BASE, statistics="trained"),
    **{f"rates.{name}": with_rate(name, 0.05) for name in ("weight", "weight_scale", "bias", "activation_scale")},
    "rates.zero_point": with_rate("zero_point", 1.0),
    "rates.unit": replace(BASE, rates=replace(BASE.rates, unit="absolute")),
    "distillation": replace(BASE, distillation=Distillation(minutes=0, steps=40, rows=32, mixup=0)),
    "tuning.optimizer": replace(TUNED, tuning=replace(TUNED.tuning, optimizer="sgd", rate=1.0)),
    "tuning.steps": replace(TUNED, tuning=replace(TUNED.tuning, steps=0)),
    "tuning.rows": replace(TUNED, tuning=replace(TUNED.tuning, rows=8)),
    "tuning.rate": replace(TUNED, tuning=replace(TUNED.tuning, rate=3e-3)),
    "tuning.parameters": replace(TUNED, tuning=replace(TUNED.tuning, parameters="scales")),
    "tuning.loss": replace(TUNED, tuning=replace(TUNED.tuning, loss="kl")),
}


def quantized(recipe: Recipe) -> QuantizedModel:
    net = networks.seeded(networks.Residual())
    return calque.quantize(net, networks.images(60, seed=0), bits="w3a3", first_last=None, recipe=recipe)


@pytest.fixture(scope="module")
def base() -> QuantizedModel:
    return quantized(BASE)


@pytest.mark.parametrize("field", [field for field in CHANGES if field not in SEARCHED and "tuning" not in field])
def test_each_field_changes_something(field: str, base: QuantizedModel) -> None:
    other = quantized(CHANGES[field])

    if field == "name":
        assert (base.report.recipe, other.report.recipe) == ("advanced", "other")
        return
    states = zip(base.state_dict().values(), other.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in states)


@pytest.fixture(scope="module")
def tuned_base(trained: networks.Residual, calibration: Tensor) -> QuantizedModel:
    q = calque.quantize(trained, calibration, bits="w2a4", recipe=TUNED)
    assert q.report.tuned is not None
    assert q.report.tuned[1] < q.report.tuned[0]  # it has something to gain
    return q


@pytest.mark.parametrize("field", [field for field in CHANGES if field.startswith("tuning.")])
def test_each_field_of_the_tuning_changes_a_network_that_has_something_to_gain(
    field: str, tuned_base: QuantizedModel, trained: networks.Residual, calibration: Tensor
) -> None:
    other = calque.quantize(trained, calibration, bits="w2a4", recipe=CHANGES[field])

    states = zip(tuned_base.state_dict().values(), other.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in states)


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
    other = searched(CHANGES[field])

    if field == "finalists":
        assert len(other.report.finalists) < len(searched_base.report.finalists)
        return
    assert other.prices is not None
    assert searched_base.prices is not None
    assert other.prices.increases != searched_base.prices.increases


def test_every_field_has_a_test() -> None:
    assert {name.partition(".")[0] for name in CHANGES} == {field.name for field in fields(Recipe)}
    for table in ("rates", "tuning"):
        known = {name.partition(".")[2] for name in CHANGES if name.startswith(f"{table}.")}
        assert known == {field.name for field in fields(type(getattr(BASE, table)))}

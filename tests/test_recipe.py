from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calque
import networks
from calque.errors import SpecError
from calque.model import QuantizedModel
from calque.recipe import NEAREST, RECIPES, SEQUENTIAL, Recipe, find_recipe
from calque.solvers.adaquant import StepSizes

RATES = st.floats(1e-8, 1e3)
RECIPE = st.builds(
    Recipe,
    name=st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True),
    activation_range=st.sampled_from(["minmax", "mean_minmax", "percentile", "least_squares", "output"]),
    tensor_range=st.sampled_from(["minmax", "mean_minmax", "percentile", "least_squares"]),
    weight_range=st.sampled_from(["minmax", "least_squares", "output"]),
    steps=st.integers(0, 10**6),
    normalize=st.booleans(),
    rates=st.builds(StepSizes, RATES, RATES, RATES, RATES, RATES),
)


@given(RECIPE)
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


def test_a_recipe_stands_for_itself_and_nothing_for_sequential() -> None:
    assert find_recipe(NEAREST) is NEAREST
    assert find_recipe(None) is SEQUENTIAL


def test_a_recipe_is_found_in_its_file(tmp_path: Path) -> None:
    recipe = replace(SEQUENTIAL, name="mine", steps=7)
    (tmp_path / "mine.toml").write_text(recipe.to_toml())

    assert find_recipe(str(tmp_path / "mine.toml")) == recipe


def test_an_unknown_recipe_is_refused_with_the_names() -> None:
    with pytest.raises(SpecError, match=r"recipe is one of nearest, sequential, or a TOML file. Got 'best'"):
        find_recipe("best")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_range": "best"}, "activation_range is one of minmax, .*, output. Got 'best'"),
        ({"tensor_range": "output"}, "tensor_range is one of .* Got 'output'"),
        ({"weight_range": "percentile"}, "weight_range is one of .* Got 'percentile'"),
        ({"steps": -1}, "steps must be an int >= 0. Got -1"),
        ({"steps": 2.5}, "steps must be an int >= 0. Got 2.5"),
        ({"rates": replace(SEQUENTIAL.rates, bias=0.0)}, "rates must be positive"),
        ({"rates": replace(SEQUENTIAL.rates, weight=float("nan"))}, "rates must be positive"),
        ({"normalize": "no"}, "normalize"),
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
        (TOML.replace("steps = 0", 'steps = "many"'), "steps must be an int >= 0. Got 'many'"),
        (TOML.replace("weight = 0.01", 'weight = "x"'), "rates must be"),
        ("rates = 3\n" + TOML.split("[rates]")[0], "rates"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe.parse(text)


BASE = replace(SEQUENTIAL, steps=16)
CHANGES: dict[str, Recipe] = {
    "name": replace(BASE, name="other"),
    "activation_range": replace(BASE, activation_range="minmax"),
    "tensor_range": replace(BASE, tensor_range="mean_minmax"),
    "weight_range": replace(BASE, weight_range="minmax"),
    "steps": replace(BASE, steps=8),
    "normalize": replace(BASE, normalize=False),
    **{f"rates.{f.name}": replace(BASE, rates=replace(BASE.rates, **{f.name: 0.05})) for f in fields(StepSizes)},
    "rates.zero_point": replace(BASE, rates=replace(BASE.rates, zero_point=1.0)),
}


def quantized(recipe: Recipe) -> QuantizedModel:
    net = networks.seeded(networks.Residual())
    return calque.quantize(net, networks.images(60, seed=0), bits="w3a3", first_last=None, recipe=recipe)


@pytest.fixture(scope="module")
def base() -> QuantizedModel:
    return quantized(BASE)


@pytest.mark.parametrize("field", CHANGES)
def test_each_field_changes_something(field: str, base: QuantizedModel) -> None:
    other = quantized(CHANGES[field])

    if field == "name":
        assert (base.report.recipe, other.report.recipe) == ("sequential", "other")
        return
    states = zip(base.state_dict().values(), other.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in states)


def test_every_field_has_a_test() -> None:
    assert {name.partition(".")[0] for name in CHANGES} == {field.name for field in fields(Recipe)}

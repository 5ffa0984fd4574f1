"""Rows that alone decide a range are named and left out; healthy data lose none."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.errors import CalibrationWarning
from calque.pipeline.outliers import FEWEST, few, many
from calque.quantized.model import QuantizedModel
from calque.recipe import RECIPES
from recipes import shortened


def noise(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


HEALTHY: dict[str, Callable[[int, int], Tensor]] = {
    "images that reach white": lambda count, _: torch.ones(count),
    "images of any brightness": lambda count, seed: 0.2 + noise(count, seed),
    "normal": lambda count, seed: torch.randn(count, generator=torch.Generator().manual_seed(seed)).abs(),
    "Pareto, finite variance": lambda count, seed: (1 - noise(count, seed)) ** (-1 / 3),
    "Pareto, no mean": lambda count, seed: (1 - noise(count, seed)) ** -1.0,
    "depths of rooms and streets": lambda count, seed: (
        torch.where(noise(count, seed) < 0.2, 60.0, 5.0) * (1 + noise(count, seed + 1))
    ),
    "massive in every row": lambda count, seed: 500 + 50 * noise(count, seed),
    "sparse: most rows are zero": lambda count, seed: (noise(count, seed) < 0.1) * 3.0,
    "one row that is not zero": lambda count, _: torch.eye(count)[0] * 7.0,
    "zeros": lambda count, _: torch.zeros(count),
}


@pytest.mark.parametrize("kind", HEALTHY)
@pytest.mark.parametrize("count", [4, 8, 16, 32, 256, 1024])
def test_healthy_rows_are_never_outliers(kind: str, count: int) -> None:
    for seed in range(40):
        extremes = HEALTHY[kind](count, seed)

        assert few(extremes, "x") is None
        assert many(extremes, "x") is None


@pytest.mark.parametrize(("count", "rows"), [(FEWEST, 1), (32, 1), (64, 2), (256, 1), (256, 2), (256, 3), (1024, 10)])
def test_few_rows_far_beyond_the_others_are_found_by_their_numbers(count: int, rows: int) -> None:
    extremes = 1 + noise(count, 0)
    bad = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:rows]
    extremes[bad] *= torch.logspace(2, 4, rows)  # each by another factor

    found = few(extremes, "x")

    assert found is not None
    assert found.rows == tuple(sorted(bad.tolist()))
    assert found.others == pytest.approx(
        max(value for index, value in enumerate(extremes.tolist()) if index not in bad)
    )


def test_rows_that_are_not_finite_or_zero_tell_nothing() -> None:
    extremes = torch.ones(40)
    extremes[3], extremes[4], extremes[5], extremes[:3] = 300.0, torch.inf, torch.nan, 0.0

    found = few(extremes, "x")

    assert found is not None
    assert found.rows == (3,)


def test_a_batch_in_another_unit_is_found_where_it_stands_together() -> None:
    extremes = 1 + noise(256, 0)
    together, scattered = extremes.clone(), extremes.clone()
    together[50:100] *= 25.0
    scattered[::6] *= 25.0

    found = many(together, "x")

    assert few(together, "x") is None
    assert found is not None
    assert found.rows == tuple(range(50, 100))
    assert many(scattered, "x") is None
    assert many(torch.where(scattered > 2, 5 * scattered, scattered), "x") is not None


IMAGES = networks.images(96, seed=0).abs()


def quantized(inputs: object, **options: Any) -> tuple[QuantizedModel, list[str]]:
    chosen = {"bits": "w8a8", "recipe": "nearest", **options}
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        q = calque.quantize(networks.seeded(networks.Residual()), inputs, **chosen)
    return q, [
        str(each.message) for each in raised if each.category is CalibrationWarning and "row" in str(each.message)
    ]


def spoiled(*rows: int) -> Tensor:
    inputs = IMAGES.clone()
    inputs[list(rows)] *= 255
    return inputs


@pytest.mark.parametrize("recipe", ["nearest", "light", "fast", "paper-2021"])
def test_a_row_that_is_not_scaled_changes_nothing_but_a_note(recipe: str) -> None:
    short = replace(shortened(RECIPES[recipe], steps=3), tuning=None)
    others = torch.cat([IMAGES[:60], IMAGES[61:]])

    q, said = quantized(networks.pieces(spoiled(60), [40, 50, 6]), recipe=short)
    without, silence = quantized(networks.pieces(others, [40, 49, 6]), recipe=short)

    assert len(said) == 1
    assert said[0] in q.report.notes
    assert "row 60 (counted from 0)" in said[0]
    assert "the argument image" in said[0]
    assert not [text for text in silence if "counted" in text]
    assert torch.equal(q(IMAGES), without(IMAGES))
    assert q.report.calibration_rows == 95


def test_two_rows_and_one_pixel_are_left_out_under_a_budget_as_well() -> None:
    inputs = spoiled(7, 80)
    inputs[30, 0, 2, 2] = 1000.0
    options = {"bits": ("w8a8", "w4a4"), "budget": calque.Budget(size=0.8), "recipe": "fast"}

    q, said = quantized(inputs, **options)
    kept = [index for index in range(96) if index not in (7, 30, 80)]
    without, _ = quantized(IMAGES[kept], **options)

    assert "rows 7, 30, 80" in said[0]
    assert q.plan == without.plan
    assert all(layer.low == other.low for layer, other in zip(q.report.layers, without.report.layers, strict=True))


def test_a_batch_in_another_unit_is_named_and_kept() -> None:
    q, said = quantized([IMAGES[:60], IMAGES[60:] * 255])

    assert any("they are kept" in text and "the argument image" in text for text in said)
    assert q.report.calibration_rows == 96


def test_a_batch_of_one_bad_row_disappears() -> None:
    q, said = quantized(networks.pieces(spoiled(40), [40, 1, 55]))

    assert len(said) == 1
    assert q.report.calibration_rows == 95


class Normalized(nn.Module):
    """Divides each row by its largest value: a row of nearly nothing becomes an outlier inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x / (x[:, :1].abs() + 1e-4)
        result: Tensor = self.second(self.first(x).relu())
        return result


def test_a_row_that_stands_out_inside_the_network_alone_is_left_out_and_the_tensor_named() -> None:
    inputs = 0.5 + torch.rand(64, 6, generator=torch.Generator().manual_seed(0))
    inputs[9, 0] = 0.0
    network = networks.seeded(Normalized())

    with pytest.warns(CalibrationWarning, match="row 9 .*the input of layer first"):
        q = calque.quantize(network, inputs, bits="w8a8", recipe="nearest")

    assert q.report.calibration_rows == 63
    assert q.report.layers[0].high is not None
    assert q.report.layers[0].high < 10

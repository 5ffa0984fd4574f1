"""A trained network of ../shared on its own data; skipped where that is absent."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque

SHARED = Path(__file__).parents[2] / "shared"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (SHARED / "zoo").is_dir(), reason=f"needs {SHARED}: trained networks and their data"),
]


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, Tensor, Tensor]:
    """resnet20 on CIFAR-10: the network, 256 calibration images and the whole test set (1000 images)."""
    sys.path.insert(0, str(SHARED))
    try:
        from zoo import load
    finally:
        sys.path.remove(str(SHARED))
    task: Any = load("resnet20_cifar10")
    return task.model, task.calibration[:256], task.test


@torch.no_grad()
def divergence(model: nn.Module, q: nn.Module, inputs: Tensor) -> float:
    """Mean KL (float || quantized)."""
    reference, output = model(inputs).log_softmax(1), q(inputs).log_softmax(1)
    return F.kl_div(output, reference, log_target=True, reduction="batchmean").item()


def test_eight_bits_rounded_to_nearest_are_next_to_float(resnet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, calibration, inputs = resnet

    q = calque.quantize(model, calibration, bits="w8a8", recipe="nearest")

    assert divergence(model, q, inputs) < 0.005  # a quarter of the images that the benchmark calibrates with


def test_at_four_bits_sequential_is_much_nearer_to_float_than_nearest(
    resnet: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, calibration, inputs = resnet

    nearest, sequential = (
        calque.quantize(model, calibration, bits="w4a4", recipe=r) for r in ("nearest", "sequential")
    )

    assert divergence(model, sequential, inputs) < 0.7 * divergence(model, nearest, inputs)


def test_a_budget_is_kept_by_a_better_network_than_the_uniform_one_below_it(
    resnet: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, calibration, inputs = resnet

    budgeted = calque.quantize(
        model, calibration, bits=("w8a8", "w4a8", "w3a8", "w2a8"), budget=calque.Budget(size=0.13), recipe="light"
    )
    uniform = calque.quantize(model, calibration, bits="w3a8", first_last=None, recipe="light")

    assert budgeted.report.size <= 0.13 * budgeted.report.float_size
    assert uniform.report.size <= budgeted.report.size
    assert divergence(model, budgeted, inputs) < 0.8 * divergence(model, uniform, inputs)

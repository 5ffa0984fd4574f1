"""Pools, resizes and paddings in an exported file, at the traced sizes and at others, on one row and on several."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.errors import ExportError
from calque.shipping import lowering
from calque.shipping.runtimes import OnnxRuntime
from calque.shipping.spatial import adaptive_average, adaptive_maximum, clipped_average, weighted_average
from slow import slow

Operator = Callable[[Tensor], Tensor]

POOLS: dict[str, Operator] = {
    "over the edge": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "over the edge, padding counted": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "over the edge, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "behind an uneven padding": lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2),
    "another divisor": lambda x: F.avg_pool2d(x, (3, 2), 2, 1, divisor_override=5),
    "another divisor, over the edge": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, divisor_override=5),
    "power average, over the edge": lambda x: F.lp_pool2d(x, 2, 3, 2, ceil_mode=True),
    "three dimensions": lambda x: F.avg_pool3d(x.unsqueeze(2), (1, 3, 3), (1, 2, 2), ceil_mode=True).squeeze(2),
    "largest, over the edge": lambda x: F.max_pool2d(x, 3, 2, 1, 2, ceil_mode=True),
    "values of a pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
}
ADAPTIVE: dict[str, Operator] = {
    "to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "to two": lambda x: F.adaptive_avg_pool2d(x, 2),
    "to five": lambda x: F.adaptive_avg_pool2d(x, 5),
    "one axis": lambda x: F.adaptive_avg_pool2d(x, (2, None)),
    "area": lambda x: F.interpolate(x, size=5, mode="area"),
    "along a row": lambda x: F.adaptive_avg_pool1d(x.mean(2), 3).unsqueeze(2),
    "largest of one": lambda x: F.adaptive_max_pool2d(x, 1),
    "largest of two": lambda x: F.adaptive_max_pool2d(x, 2),
    "largest of five": lambda x: F.adaptive_max_pool2d(x, 5),
}
RESIZES: dict[str, Operator] = {
    "nearest": lambda x: F.interpolate(x, scale_factor=1.5),
    "nearest to a size": lambda x: F.interpolate(x, size=7, mode="nearest-exact"),
    "linear": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "linear, factor anew": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
    "linear, corners": lambda x: F.interpolate(x, size=7, mode="bilinear", align_corners=True),
    "linear, smaller": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
    "linear, smaller to a size": lambda x: F.interpolate(x, size=7, mode="bilinear", antialias=True),
    "cubic": lambda x: F.interpolate(x, size=7, mode="bicubic", align_corners=True),
    "cubic, smaller": lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True),
    "back to the input": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear"),
    "reflection": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "repetition": lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"),
    "a circle": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"),
}


class Branches(nn.Module):
    """One convolution, behind it each operator with a convolution of its own."""

    def __init__(self, operators: dict[str, Operator]) -> None:
        super().__init__()
        self.operators = operators
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(4, 2, 1) for _ in operators])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.stem(x))
        pairs = zip(self.operators.items(), self.heads, strict=True)
        return {name: head(operator(y)) for (name, operator), head in pairs}


def differences(path: Path, q: nn.Module, images: Tensor) -> list[str]:
    """The outputs of the file that are not the network's, the optimizer on and off."""
    with torch.no_grad():
        expected: dict[str, Tensor] = q(images)
    found = []
    for optimize in (True, False):
        received = OnnxRuntime(onnx.load(path), optimize=optimize).run([images])
        for (name, own), other in zip(expected.items(), received, strict=True):
            if own.shape != other.shape or (own - other).square().sum() > 1e-4 * own.square().sum():
                found.append(f"{name} {tuple(images.shape)} optimize={optimize}")
    return found


@pytest.mark.parametrize(
    ("operators", "sizes"),
    [
        (POOLS, (12,)),
        slow(RESIZES, (8, 12, 14)),
        slow(POOLS, (8, 12, 14)),
        slow(ADAPTIVE, (12,)),
        slow(ADAPTIVE, (8, 12, 14)),
        (RESIZES, (12,)),
    ],
    ids=[
        "pools",
        "resizes of free sizes",
        "pools of free sizes",
        "adaptive pools",
        "adaptive of free sizes",
        "resizes",
    ],
)
def test_the_file_computes_what_the_network_computes_at_every_size(
    tmp_path: Path, operators: dict[str, Operator], sizes: tuple[int, ...]
) -> None:
    net = networks.seeded(Branches(operators))
    q = calque.quantize(net, [networks.images(12, seed=side, side=side) for side in sizes], recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    cases = [(1, 12), (5, 12)] if len(sizes) == 1 else [(1, 8), (3, 17), (2, 24)]
    apart = [each for rows, side in cases for each in differences(path, q, networks.images(rows, seed=1, side=side))]
    assert not apart


def test_a_wrong_translation_is_refused_and_its_operator_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = networks.seeded(Branches({"to two": ADAPTIVE["to two"]}))
    q = calque.quantize(net, [networks.images(12, seed=side, side=side) for side in (8, 12)], recipe="nearest")
    monkeypatch.setattr(lowering, "write_exactly", lambda graph, place: None)  # as torch.onnx translates it

    with pytest.raises(
        ExportError, match=r"first at the operator aten\.adaptive_avg_pool2d\.default \(behind layer stem\)"
    ):
        calque.export_onnx(q, tmp_path / "model.onnx")

    assert not list(tmp_path.iterdir())


def test_a_file_that_onnx_runtime_cannot_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = networks.seeded(Branches({"cubic": RESIZES["cubic"]}))
    q = calque.quantize(net, networks.images(12, seed=0, side=12), recipe="nearest")
    monkeypatch.setattr(lowering, "write_exactly", lambda graph, place: None)

    with pytest.raises(
        ExportError,
        match=r"upsample_bicubic2d\.vec \(behind layer stem\) fails on inputs \(3, 1, 12, 12\): ONNX Runtime",
    ):
        calque.export_onnx(q, tmp_path / "model.onnx")


def test_indices_of_an_adaptive_pool_without_a_twin_are_refused_by_name(tmp_path: Path) -> None:
    def indexed(x: Tensor) -> Tensor:
        values, indices = F.adaptive_max_pool2d(x, 5, return_indices=True)
        return values * indices.float()

    net = networks.seeded(Branches({"indexed": indexed}))
    q = calque.quantize(net, networks.images(12, seed=0, side=12), recipe="nearest")

    with pytest.raises(ExportError, match=r"adaptive_max_pool2d\.default \(behind layer stem\) .* with its indices"):
        calque.export_onnx(q, tmp_path / "model.onnx")


@pytest.mark.parametrize("side", range(4, 12))
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 1), (2, 3, 1), (3, 2, 1), (3, 4, 1), (4, 3, 2), (3, 1, 0)]
)
def test_pools_that_are_written_otherwise_have_the_windows_of_pytorch(
    side: int, kernel: int, stride: int, padding: int
) -> None:
    x = networks.images(2, seed=side, side=side)
    pairs, strides, paddings = [kernel] * 2, [stride] * 2, [padding] * 2

    for ceil in (False, True):
        torch.testing.assert_close(
            weighted_average(x, pairs, strides, paddings, ceil, 7),
            F.avg_pool2d(x, kernel, stride, padding, ceil, divisor_override=7),
        )
    torch.testing.assert_close(
        clipped_average(x, pairs, strides, paddings), F.avg_pool2d(x, kernel, stride, padding, ceil_mode=True)
    )
    for places in ((1, 3), (5, side), (7, 2)):
        torch.testing.assert_close(adaptive_average(x, places), F.adaptive_avg_pool2d(x, places))
        assert torch.equal(adaptive_maximum(x, places)[0], F.adaptive_max_pool2d(x, places))

"""The predicted size of an exported file against the file."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.grid.bits import Bits
from calque.report import Report
from slow import slow

TOLERANCE, ROUGH = 1.08, 1000  # of a prediction over the file: a share, and bytes of what small files are made of


class Words(nn.Module):
    """A table, a position that is learned, a mask, attention, and a head that shares no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(32, 16), nn.Parameter(torch.zeros(10, 16))
        self.mix, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 32)
        self.norm = nn.LayerNorm(16)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words) + self.place
        query, key, value = self.mix(self.norm(x)).chunk(3, -1)
        y = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], is_causal=True)[:, 0]
        result: Tensor = self.head(x + self.out(y))
        return result


class Twice(nn.Module):
    """A convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        result: Tensor = self.head(F.max_pool2d(y, 2).mean((2, 3)))
        return result


class Tokens(nn.Module):
    """Linear layers on (N, positions, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x[:, 0])))
        return result


def words() -> Tensor:
    return torch.randint(32, (48, 10), generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "residual": (networks.Residual, lambda: networks.images(48, seed=0)),
    "words": (Words, words),
    "twice": (Twice, lambda: networks.images(48, seed=0)),
    "tokens": (Tokens, lambda: networks.images(48, seed=0)),
}


WIDTHS = ("w8a8", "w4a4", "w3a8", "w2a4", "w7a8", "w8", "w4", "w3")
FIRST = {*zip(itertools.cycle(MODELS), WIDTHS, strict=False)}  # each network and each kind of bits


@pytest.mark.parametrize(
    ("model", "bits"), [case if case in FIRST else slow(*case) for case in itertools.product(MODELS, WIDTHS)]
)
def test_the_file_is_no_larger_than_predicted_and_hardly_smaller(tmp_path: Path, model: str, bits: str) -> None:
    build, inputs = MODELS[model]
    q = calque.quantize(networks.seeded(build()), inputs(), bits=bits, recipe="nearest")

    actual = calque.export_onnx(q, tmp_path / "model.onnx").stat().st_size

    assert actual <= q.report.file_size <= TOLERANCE * actual + ROUGH


@pytest.mark.parametrize("bits", ["w4g32", "w3g32", "w8g32"])
def test_groups_are_counted_as_they_are_stored(tmp_path: Path, bits: str) -> None:
    q = calque.quantize(
        networks.seeded(Tokens()), networks.images(48, seed=0), recipe="nearest", override={"down": bits}
    )

    actual = calque.export_onnx(q, tmp_path / "model.onnx").stat().st_size

    assert q.plan["down"] == Bits.parse(bits)
    assert actual <= q.report.file_size <= TOLERANCE * actual + ROUGH


def test_float_layers_and_moved_statistics_are_within_the_prediction(
    tmp_path: Path, trained: nn.Module, calibration: Tensor
) -> None:
    q = calque.quantize(trained, calibration, bits="w4a4", recipe="fast", override={"conv1": None})

    actual = calque.export_onnx(q, tmp_path / "model.onnx").stat().st_size

    assert actual <= q.report.file_size <= TOLERANCE * actual + ROUGH


def test_the_report_says_the_bytes_on_disk_and_old_reports_do_not(trained: nn.Module, calibration: Tensor) -> None:
    report = calque.quantize(trained, calibration, bits="w4a4", recipe="nearest").report

    assert f"about {report.file_size:,} bytes on disk" in str(report)
    assert Report.from_json(report.to_json()) == report
    table = json.loads(report.to_json())
    del table["file_size"]
    old = Report.from_json(json.dumps(table))
    assert old.file_size is None
    assert "on disk" not in str(old)

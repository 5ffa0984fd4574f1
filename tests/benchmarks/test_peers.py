"""The pure parts of `python -m benchmarks.peers`: cases, resumption, the table, and the network that every tool is given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.common.rows import is_asked, read_rows
from benchmarks.peers.cases import FIELDS, PACKAGES, SETTINGS, TOOLS, cases
from benchmarks.peers.front import PANELS, draw_front
from benchmarks.peers.network import Bits, Marker, marked, plan, prepare, weight_bytes
from benchmarks.peers.table import draw, label_points, table
from matplotlib import pyplot as plt
from matplotlib.text import Text
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.nn.functional.relu(x + self.middle(x)).mean((2, 3)))  # type: ignore[no-any-return]


def row(seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "network": "resnet20_cifar10", "bits": "w4a4", "tool": "brevitas", "method": "gptq", "seed": seed, "commit": "abc",
        "kl": 0.1, "score": 90.0, "score_float": 91.0, "agreement": 0.9, "seconds": 9.0, "passes": 4.0, "float_pass": 2.0,
        "peak": 10**6, "placement": "common", "settings": "", "calibration": 8, "test": 4, "versions": {"brevitas": "1"},
    } | changes  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = Residual()
    network.norm.running_mean = torch.randn(4)
    return network.eval()


def test_cases_are_distinct_and_name_known_networks_and_tools() -> None:
    found = cases()
    assert len(set(found)) == len(found)
    assert {key[0] for key in found} == set(SETTINGS)
    assert {key[2] for key in found} == set(TOOLS) == {"calque", *PACKAGES}


def test_only_the_parts_asked_for_are_measured() -> None:
    key = ("resnet20_cifar10", "w4a4", "mct", "ptq", 0)
    assert is_asked(key, (None, None, ["mct"], None, [0]))
    assert not is_asked(key, (None, None, ["mct"], None, [1]))


def test_of_two_rows_of_one_case_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path, FIELDS) == {}
    path.write_text("".join(json.dumps(row(0, kl=kl)) + "\n" for kl in (0.3, 0.2)), encoding="utf-8")
    assert [found["kl"] for found in read_rows(path, FIELDS).values()] == [0.2]


def test_a_table_means_over_seeds_and_states_failures() -> None:
    text = table([row(0, kl=0.1), row(1, kl=0.3), row(0, tool="mct", failed="no such operator") | {"kl": 9.0}])
    assert "| brevitas | gptq | common | 0 1 | 0.2000 (0.100 to 0.300) |" in text
    failed = {
        key: value for key, value in row(0, tool="mct").items() if key in ("network", "bits", "tool", "method", "seed")
    }
    text = table([row(0), failed | {"commit": "abc", "failed": "no such operator"}])
    assert "- mct gptq, seed 0: no such operator" in text


def test_the_front_picture_has_a_mark_for_each_method_of_its_panels(tmp_path: Path) -> None:
    network, bits = next(iter(PANELS))
    rows = [row(0, network=network, bits=bits), row(0, network=network, bits=bits, tool="calque", method="fast")]
    draw_front(rows, tmp_path / "front.svg")
    text = (tmp_path / "front.svg").read_text()
    assert all(title in text for title in ("calque", "Model Compression Toolkit", *PANELS.values()))
    draw_front([row(0, network="another")], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_plot_is_drawn_from_the_rows(tmp_path: Path) -> None:
    draw([row(0), row(0, network="mobilenet_v1_0.25_224_imagenet")], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_labels_of_points_at_one_place_do_not_overlap() -> None:
    figure, axis = plt.subplots()
    label_points(
        axis, [("aimet", method, 0.5, 0.5) for method in ("seqmse", "nearest", "adaround-1000", "adaround-2500")]
    )
    boxes = [Text.get_window_extent(label) for label in axis.texts]
    plt.close(figure)
    assert len(boxes) == 4
    assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))


def test_the_prepared_network_computes_the_same(model: nn.Module) -> None:
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(prepare(model)(x), model(x))


def test_markers_stand_at_operands_and_results_of_adds(model: nn.Module) -> None:
    prepared = prepare(model)
    assert marked(prepared) == ["relu_", "middle", "relu_1_"]
    assert sum(isinstance(module, Marker) for module in prepared.modules()) == 3


def test_the_ends_have_eight_bits(model: nn.Module) -> None:
    assert plan(prepare(model), "w4a8") == {"stem": Bits(8, 8), "middle": Bits(4, 8), "head": Bits(8, 8)}


def test_bytes_of_weights_are_packed_codes_alone(model: nn.Module) -> None:
    # stem 4 x 3 x 9 and head 5 x 4 at 8 bits, middle 4 x 4 x 9 at 3 bits
    assert weight_bytes(prepare(model), "w3a4") == 108 + 20 + 144 * 3 // 8

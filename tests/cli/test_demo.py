"""The demonstration, at one setting; `make test` runs the whole of it, so what is said of its figures is slow."""

from pathlib import Path

import pytest
import torch

from calque.cli.demo import DemoRow, DigitNet, digits, run_demo, train
from calque.shipping.saved import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def phases() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def row(folder: Path, phases: list[tuple[str, int, int]]) -> DemoRow:
    before = torch.random.get_rng_state()
    rows = run_demo(folder, ("w4a4",), progress=lambda *step: phases.append(step))
    assert torch.equal(torch.random.get_rng_state(), before), "the demo must leave the global seed alone"
    return rows[0]


@pytest.mark.slow
def test_the_float_network_reads_digits_and_four_bits_keep_it(row: DemoRow) -> None:
    assert row.float_accuracy > 0.97  # 99.7 % when this was written
    assert row.fast > row.float_accuracy - 0.015  # 9 of 597 images
    assert row.fast >= row.nearest - 0.005


@pytest.mark.slow
def test_the_file_is_the_network(row: DemoRow) -> None:
    assert row.agreement_exact >= 0.999
    assert row.agreement >= 0.99
    assert abs(row.exported - row.fast) <= 0.01


@pytest.mark.slow
def test_the_sizes_are_those_of_four_bits(row: DemoRow, folder: Path) -> None:
    assert row.float_size / 8 < row.size < row.float_size / 6  # 12 bytes a channel and 8-bit ends on top
    assert row.file_bytes == (folder / "w4a4.onnx").stat().st_size


@pytest.mark.slow
def test_the_kept_files_load(row: DemoRow, folder: Path) -> None:
    q = load(folder / "w4a4.safetensors", DigitNet())

    known = digits(torch.Generator().manual_seed(0))
    with torch.no_grad():
        accuracy = (q(known.test_images).argmax(1) == known.test_labels).double().mean().item()
    assert accuracy == row.fast
    assert sorted(path.name for path in folder.iterdir()) == [
        "float.safetensors",
        "w4a4.onnx",
        "w4a4.safetensors",
    ]


@pytest.mark.slow
def test_progress_names_each_phase_and_its_steps(row: DemoRow, phases: list[tuple[str, int, int]]) -> None:
    assert ("train", 1, 8) in phases
    assert ("w4a4 fit", 9, 9) in phases


def test_the_images_are_split_without_overlap_and_the_seed_decides_the_order() -> None:
    first, same, other = (digits(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))

    assert len(first.images) + len(first.test_images) == 1797
    assert first.images.min() == 0
    assert first.images.max() == 1
    assert torch.equal(first.images, same.images)
    assert not torch.equal(first.images, other.images)


def test_the_same_seed_trains_the_same_network() -> None:
    known = digits(torch.Generator().manual_seed(0))

    first, second = (
        train(known.images[:100], known.labels[:100], torch.Generator().manual_seed(3), lambda *_: None).state_dict()
        for _ in range(2)
    )

    assert all(torch.equal(first[key], second[key]) for key in first)

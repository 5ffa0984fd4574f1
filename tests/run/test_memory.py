"""What grows with the number of inputs is counted or spilled, and no value outlives its use."""

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import networks
from calque.calibration.batches import largest_output, real_tokens
from calque.calibration.channel_statistics import ChannelStatistics
from calque.fitting.problem import layer_problem
from calque.grid.ranges import TensorSample, extremes
from calque.network import Geometry
from calque.quantized.in_pieces import InPieces
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.run.spill import Kept, Store

MEGABYTE = 10**6
SCRIPT = """
import sys, torch, calque
from pathlib import Path

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

torch.manual_seed(0)
convolutions = [torch.nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 32), (32, 32), (32, 3))]
net = torch.nn.Sequential(*(part for each in convolutions for part in (each, torch.nn.ReLU())))
images = torch.randn(int(sys.argv[1]), 3, 16, 16)
net(images[:8])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
calque.quantize(net, images, bits="w4a4", memory="300MB", progress=False)
print(status("VmHWM") - before)
"""

READING = """
import os, sys, torch
from calque.run.spill import Store

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with Store(int(sys.argv[1])) as store:
    kept = [store.put(torch.full((4_000_000,), float(index))) for index in range(4)]
    before, most, small = resident(), 0, []
    for index in range(40):
        value = store.get(kept[index % 4])
        twice = value * 2
        small.append(twice[::4000].clone())  # lies behind the large ones, and outlives them
        most = max(most, resident() - before)
        del value, twice
print(most)
"""


@pytest.mark.slow  # another process quantizes 1,500 images
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_peak_keeps_to_the_budget_with_many_inputs() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "1500"], capture_output=True, text=True, check=True)

    assert int(done.stdout) < 330 * MEGABYTE


def fleeting(count: int) -> Iterator[Tensor]:
    """Tensors (2, 4, 3, 3); each must be gone when the next is asked for."""
    last: weakref.ref[Tensor] | None = None
    for index in range(count):
        assert last is None or last() is None, f"value {index - 1} is still there."
        value = networks.images(2, seed=index, channels=4, side=3)
        last = weakref.ref(value)
        yield value
        del value


def problem_of(values: Iterator[Tensor]) -> None:
    pairs = map(lambda *both: both, values, fleeting(5))
    weight, bias = torch.ones(4, 4, 1, 1), torch.zeros(4)
    layer_problem(Geometry("convolution"), weight, bias, torch.relu, pairs, inputs=10, generator=torch.Generator())


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to give memory back")
@pytest.mark.parametrize("memory", [1, 10 * MEGABYTE])
def test_places_of_values_that_are_gone_do_not_add_up(memory: int) -> None:
    done = subprocess.run([sys.executable, "-c", READING, str(memory)], capture_output=True, text=True, check=True)

    assert int(done.stdout) < memory + 60 * MEGABYTE  # two values at a time, and a margin of as much


READERS: dict[str, Callable[[Iterator[Tensor]], object]] = {
    "statistics": lambda values: ChannelStatistics.of(values, Geometry("convolution")),
    "sample": lambda values: TensorSample.of(values, count=9, inputs=10, generator=torch.Generator()),
    "extremes": extremes,
    "largest": lambda values: largest_output(values, [2] * 5, "conv"),
    "tokens": lambda values: extremes(real_tokens(values, [None] * 5)),
    "problem": problem_of,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_value_is_let_go_before_the_next_is_asked_for(read: Callable[[Iterator[Tensor]], object]) -> None:
    read(fleeting(5))


def test_views_of_one_tensor_are_counted_once_and_as_long_as_one_is_kept() -> None:
    value = torch.zeros(4, 1000)
    with Store(MEGABYTE) as store:
        whole, part = store.put(value), store.put(value[:1])
        assert store.resident == value.nbytes

        store.drop(whole)
        assert store.resident == value.nbytes

        store.drop(part)
        assert store.resident == 0


def test_a_view_of_what_is_lent_counts_as_nothing() -> None:
    value = torch.zeros(4, 1000)
    with Store(0) as store:
        store.lend(value)

        kept = store.put(value.mT)

        assert isinstance(kept, Tensor)
        assert store.resident == 0


def test_tensors_in_a_tuple_are_counted_and_spilled() -> None:
    values = networks.images(2, seed=0, side=30).unbind()
    with Store(1000) as store:
        kept = store.put(tuple(value.clone() for value in values))
        assert store.resident == 0
        assert all(torch.equal(one, other) for one, other in zip(store.get(kept), values, strict=True))

    with Store(MEGABYTE) as store:
        kept = store.put(tuple(value.clone() for value in values))
        assert store.resident == sum(value.nbytes for value in values)

        store.drop(kept)
        assert store.resident == 0


def test_many_small_values_keep_to_the_memory() -> None:
    with Store(10_000) as store:
        for _ in range(100):
            store.put(torch.zeros(500))

        assert store.resident <= 10_000


def test_a_value_comes_back_from_disk_in_the_order_that_it_had() -> None:
    value = networks.images(2, seed=0, channels=3, side=30).permute(0, 3, 1, 2)
    with Store(0) as store:
        found = store.get(store.put(value))

    assert found.stride() == value.stride()
    assert torch.equal(found, value)


def test_kept_values_are_read_again_each_time() -> None:
    values = [torch.arange(1000.0), torch.arange(2000.0), "text"]
    with Store(0) as store:
        kept = Kept(store, values)

        assert len(kept) == 3
        assert kept[2] == "text"
        for _ in range(2):
            assert all(torch.equal(one, other) for one, other in zip(list(kept)[:2], values[:2], strict=True))  # type: ignore[arg-type]  # tensors


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_a_layer_in_pieces_gives_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Quantizer(torch.tensor(0.02), torch.tensor(7), bits=4)
    geometry = Geometry("linear") if kind == "linear" else Geometry("convolution", padding=(1, 1, 1, 1))
    shape = (5, 8) if kind == "linear" else (5, 8, 3, 3)
    scale = torch.full((5,), 0.03)
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    layer = QuantizedLayer(geometry, codes, scale, torch.arange(5, dtype=torch.int32), 0.02 * scale, bits=4)
    x = networks.images(7, seed=0, channels=8, side=8)
    whole = layer(grid(x))

    monkeypatch.setattr("calque.quantized.in_pieces.TOGETHER", 2 * x[0].numel())

    assert torch.equal(InPieces(layer, grid)(x), whole)

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import calque.calibration.batches
import networks
from calque.calibration.batches import ROWS, prepare
from calque.calibration.execution import Execution
from calque.errors import CalibrationError, CalibrationWarning, SpecError
from calque.network import Batch, Signature, capture
from calque.network.batching import varying_axes
from calque.network.signature import rows
from calque.run.spill import Store, parse_bytes
from networks import Net

IMAGES = networks.images(120, seed=0)
SIGNATURE = Signature(("image",), ("image",), ())
CPU = torch.device("cpu")


def generated() -> Iterator[Tensor]:
    yield from networks.pieces(IMAGES, 30)


FORMS: dict[str, Callable[[], object]] = {
    "tensor": lambda: IMAGES,
    "tuple": lambda: (IMAGES,),
    "dict": lambda: {"image": IMAGES},
    "list of tensors": lambda: list(networks.pieces(IMAGES, 30)),
    "list of tuples with labels": lambda: [(part, torch.zeros(len(part))) for part in networks.pieces(IMAGES, 7)],
    "list of dicts": lambda: [{"image": part} for part in networks.pieces(IMAGES, 30)],
    "generator": generated,
    "loader of tuples": lambda: DataLoader(TensorDataset(IMAGES, torch.arange(120)), batch_size=32),
    "loader of tensors": lambda: DataLoader(IMAGES, batch_size=64),  # type: ignore[arg-type]  # a tensor is a data set
    "with an empty batch": lambda: [IMAGES[:0], IMAGES],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_calibration_gives_the_same_inputs(form: str) -> None:
    batches = prepare(FORMS[form](), SIGNATURE, CPU)

    assert all(list(batch) == ["image"] and 1 <= rows(batch) <= ROWS for batch in batches)
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), IMAGES)  # type: ignore[misc]


def with_value(value: float) -> Tensor:
    spoiled = IMAGES.clone()
    spoiled[70, 0, 1, 1] = value
    return spoiled


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (3.0, "calibration is a tensor, .* Got float"),
        ([], "needs at least one input. Got none"),
        (IMAGES[:0], "needs at least one input. Got none"),
        ([3.0], "a calibration batch is a tensor, .* Got float"),
        ({"picture": IMAGES}, r"forward needs the argument\(s\) image. Got: picture"),
        ({}, r"forward needs the argument\(s\) image"),
        ([torch.tensor(1.0)], "needs at least one tensor with a batch axis"),
        (with_value(float("nan")), "must be finite. Batch 1 has NaN"),
        ([IMAGES, IMAGES[:, 0]], "the same rank and dtype. Batch 3: .*; batch 0"),
        (
            [IMAGES, IMAGES.double()],
            r"same rank and dtype. Batch 3: torch\.float64 .*; batch 0: torch\.float32",
        ),
    ],
)
def test_bad_calibration_is_refused_with_the_rule_and_what_was_received(calibration: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        prepare(calibration, SIGNATURE, CPU)


def test_batches_of_unlike_form_are_refused() -> None:
    signature = Signature(("image", "mask"), ("image",), ())

    with pytest.raises(CalibrationError, match="calibration batch 1 has the form"):
        prepare([{"image": IMAGES[:2]}, {"image": IMAGES[:2], "mask": IMAGES[:2]}], signature, CPU)


def test_a_constant_input_is_warned_about() -> None:
    with pytest.warns(CalibrationWarning, match="the same value everywhere: .* Pass real inputs"):
        prepare(torch.full((60, 1, 2, 2), 3.0), SIGNATURE, CPU)


def test_axes_whose_sizes_differ_between_batches_are_found() -> None:
    batches: list[Batch] = [{"x": torch.zeros(2, 3, 8, 8), "n": 1}, {"x": torch.zeros(2, 3, 8, 9), "n": 1}]

    assert {name: set(axes) for name, axes in varying_axes(batches).items()} == {"x": {3}}
    assert varying_axes(batches[:1]) == {}


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("300MB", 3 * 10**8), ("1.5kB", 1500), (" 10 B ", 10), (7, 7)]
)
def test_sizes_are_read_with_their_units(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "2",
        "2 TB",
        "GB",
        "-1MB",
        -3,
        0,
        "1.2.3MB",
    ],
)
def test_a_size_without_number_or_unit_is_refused(text: str | int) -> None:
    with pytest.raises(SpecError, match="a size is written as a number with a unit"):
        parse_bytes(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_a_store_gives_back_what_it_was_given_from_disk(dtype: torch.dtype) -> None:
    value = (networks.images(1, seed=0, side=300) * 10).to(dtype).transpose(2, 3)

    with Store(0) as store:
        kept = store.put(value)

        assert kept is not value
        assert torch.equal(store.get(kept), value)
        assert store.get(kept).dtype == dtype


def test_a_store_keeps_to_its_memory() -> None:
    value = torch.zeros(300_000)
    with Store(int(2.5 * value.nbytes)) as store:
        kept = [store.put(value.clone()) for _ in range(4)]
        assert [isinstance(each, Tensor) for each in kept] == [True, True, False, False]
        assert store.resident == 2 * value.nbytes

        store.drop(kept[0])
        store.drop(kept[2])

        assert store.resident == value.nbytes
        assert isinstance(store.put(value), Tensor)


def test_a_store_keeps_what_is_no_tensor() -> None:
    with Store(0) as store:
        kept = store.put((1, "two"))

        assert store.get(kept) == (1, "two")


def shortcut(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.a(x))
    z: Tensor = net.c(net.b(y)) + y
    return z


@pytest.mark.parametrize("memory", [10**9, 0])
def test_executing_operator_by_operator_is_the_network(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = networks.images(60, seed=1, channels=4, side=20)
    model = Net(shortcut, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1))
    module = capture(model, {"x": x}).module
    batches: list[Batch] = [{"x": part} for part in networks.pieces(x, 25)]

    with Store(memory) as store:
        execution = Execution(module, batches, store)
        for node in module.graph.nodes:
            execution.step(node)
            if node.op == "output":
                outputs = list(execution.values(node))
            execution.release(node)

    assert torch.allclose(torch.cat([output[0] for output in outputs]), model(x), atol=1e-5)


def test_an_execution_frees_what_nothing_reads_any_more() -> None:
    x = networks.images(30, seed=1, channels=4, side=20)
    model = Net(shortcut, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1))
    module = capture(model, {"x": x}).module

    with Store(10**9) as store:
        execution = Execution(module, [{"x": x}], store)
        alive = {}
        for node in module.graph.nodes:
            if node.op != "output":
                execution.step(node)
                execution.release(node)
                alive[str(node.target)] = store.resident / x.nbytes

    assert alive["a"] == 1
    assert alive["b"] == 2  # the relu's result waits for the shortcut
    assert alive["c"] == 2
    assert alive["aten.add.Tensor"] == 1


def test_rows_are_executed_a_few_at_a_time() -> None:
    assert max(rows(batch) for batch in prepare(IMAGES, SIGNATURE, CPU)) == calque.calibration.batches.ROWS

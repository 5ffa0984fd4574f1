"""Where the rows of a network's inputs are, and networks whose inputs have none."""

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import networks
from calque.calibration.batches import prepare
from calque.errors import CalibrationError
from calque.network import Signature
from calque.network.batching import find_layout
from calque.network.signature import Layout, laid_out, leaf_names, rows, select, split
from networks import Net
from slow import slow

IMAGES = networks.images(60, seed=0)
CPU = torch.device("cpu")


class Tracker(nn.Module):
    """Finds a template in images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, template: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self.conv(x)), F.relu(self.conv(template)))


class Nodes(nn.Module):
    """Two steps along the edges of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        result: Tensor = self.last(edges @ F.relu(self.first(edges @ x)))
        return result


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, images: list[Tensor], gain: Tensor) -> Tensor:
        result: Tensor = self.conv(images[0]) + self.conv(images[1]) * gain
        return result


def graph(nodes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(nodes, 6, generator=generator), torch.rand(nodes, nodes, generator=generator) / nodes


def centered(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.a(x))
    return net.b(y - y.mean(0, keepdim=True))  # type: ignore[no-any-return]


def of_eight(net: Net, x: Tensor) -> Tensor:
    return net.b(F.relu(net.a(x)).view(8, -1))  # type: ignore[no-any-return]


def layout(model: nn.Module, *items: tuple[object, ...]) -> Layout | None:
    signature = Signature.of(model)
    return find_layout(model, [signature.batch(item) for item in items])


TEMPLATE = networks.images(1, seed=3, side=4)


def test_a_first_argument_without_a_batch_axis_is_given_whole_to_every_row() -> None:
    assert layout(networks.seeded(Tracker()), (TEMPLATE, IMAGES)) == Layout(frozenset({"template"}))


def test_an_argument_that_never_changes_is_whole_where_single_rows_leave_it_open() -> None:
    items = [(TEMPLATE, IMAGES[at : at + 1]) for at in range(3)]

    assert layout(networks.seeded(Tracker()), *items) == Layout(frozenset({"template"}))


def test_all_inputs_of_one_length_have_rows_and_scalars_none() -> None:
    item: tuple[object, ...] = ([IMAGES, IMAGES + 1], torch.tensor(2.0))

    assert layout(networks.seeded(Pair()), item) == Layout()
    assert leaf_names(Signature.of(Pair()).batch(item)) == ["images[0]", "images[1]", "gain"]


def test_rows_that_depend_on_each_other_stay_together() -> None:
    net = Net(centered, a=nn.Conv2d(1, 4, 3), b=nn.Conv2d(4, 2, 1))

    assert layout(net, (IMAGES,)) == Layout(apart=False)


def test_a_graph_has_no_rows() -> None:
    assert layout(networks.seeded(Nodes()), graph(20, seed=0)) == Layout(
        frozenset({"x", "edges"}), apart=False, nowhere=True
    )


def test_nothing_is_found_where_every_input_is_empty() -> None:
    assert layout(networks.seeded(Pair()), ([IMAGES[:0], IMAGES[:0]], torch.tensor(2.0))) is None


def test_a_layout_without_rows_has_none_apart() -> None:
    with pytest.raises(ValueError, match="none can be apart"):
        Layout(nowhere=True)


def test_a_batch_is_cut_along_its_rows_alone() -> None:
    batch = laid_out({"template": IMAGES[:7], "x": IMAGES[:7]}, Layout(frozenset({"template"})))

    pieces = split(batch, 3)

    assert [rows(piece) for piece in pieces] == [3, 3, 1]
    assert all(len(piece["template"]) == 7 for piece in pieces)  # type: ignore[arg-type]
    assert rows(select(batch, torch.tensor([4, 4]))) == 2


def test_what_stays_together_is_one_row_and_never_cut() -> None:
    batch = laid_out({"x": IMAGES}, Layout(apart=False))

    assert rows(batch) == 1
    assert [piece["x"] is IMAGES for piece in (*split(batch, 3), select(batch, torch.tensor([0])))] == [True, True]


def test_calibration_inputs_are_cut_where_the_layout_says() -> None:
    signature = Signature(("template", "x"), ("template", "x"), ())
    batches = prepare((TEMPLATE, IMAGES), signature, CPU, find=lambda _: Layout(frozenset({"template"})))

    assert [(len(batch["template"]), rows(batch)) for batch in batches] == [(1, 50), (1, 10)]  # type: ignore[arg-type]


def error(expected: Tensor, received: Tensor) -> float:
    return ((expected - received).square().sum() / expected.square().sum()).item()


@pytest.mark.parametrize("recipe", ["nearest", "light"])
def test_a_network_with_a_whole_argument_is_quantized_saved_and_exported(tmp_path: Path, recipe: str) -> None:
    net = networks.seeded(Tracker())
    q = calque.quantize(net, (TEMPLATE, IMAGES), recipe=recipe)
    path = calque.export_onnx(q, tmp_path / "model.onnx")
    calque.save(q, tmp_path / "q.safetensors")

    assert error(net(TEMPLATE, IMAGES), q(TEMPLATE, IMAGES)) < 0.01
    assert calque.verify(path, q, (TEMPLATE, IMAGES[:7])).inputs == 7
    first, second = (value.type.tensor_type.shape.dim[0] for value in onnx.load(path).graph.input)
    assert (first.dim_value, second.dim_param) == (1, "batch")
    assert "taken to have no batch axis: template. Every row gets all of it." in q.report.notes
    again = calque.load(tmp_path / "q.safetensors", net)
    assert torch.equal(again(TEMPLATE, IMAGES[:3]), q(TEMPLATE, IMAGES[:3]))
    assert again.signature.layout == q.signature.layout


@pytest.mark.parametrize(
    ("nodes", "fixed", "recipe"),
    [
        ((60, 60, 60), True, "nearest"),
        ((20, 30, 25), False, "light"),
        slow((60, 60, 60), True, "light"),
        slow((20, 30, 25), False, "nearest"),
    ],
)
def test_graphs_are_executed_whole_and_the_file_takes_other_sizes_where_calibration_had_several(
    tmp_path: Path, nodes: tuple[int, ...], fixed: bool, recipe: str
) -> None:
    net = networks.seeded(Nodes())
    q = calque.quantize(net, [graph(count, seed) for seed, count in enumerate(nodes)], recipe=recipe)
    path = calque.export_onnx(q, tmp_path / "model.onnx")
    other = graph(60 if fixed else 41, seed=9)

    assert error(net(*other), q(*other)) < 0.01
    assert calque.verify(path, q, other).inputs == 1
    assert any("have no batch axis" in note for note in q.report.notes)
    if fixed:
        with pytest.raises(ValueError, match=r"axis 0 of x was captured as 60\. Got 41"):
            q(*graph(41, seed=9))


@pytest.mark.parametrize("recipe", ["nearest", "light"])
def test_a_network_of_a_fixed_batch_keeps_it(tmp_path: Path, recipe: str) -> None:
    net = Net(of_eight, a=nn.Conv2d(1, 4, 3), b=nn.Linear(4 * (networks.SIDE - 2) ** 2, 3))
    q = calque.quantize(net, networks.pieces(IMAGES[:48], 8), recipe=recipe)
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    assert error(net(IMAGES[:8]), q(IMAGES[:8])) < 0.01
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 8
    calque.verify(path, q, IMAGES[:8])


def test_rows_that_depend_on_each_other_are_executed_whole_and_the_file_takes_any_number(tmp_path: Path) -> None:
    net = Net(centered, a=nn.Conv2d(1, 4, 3), b=nn.Conv2d(4, 2, 1))
    q = calque.quantize(net, IMAGES, recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    calque.verify(path, q, IMAGES[:7])
    assert any("depend on the other rows" in note for note in q.report.notes)


def test_a_model_that_fails_on_the_inputs_themselves_is_told_so() -> None:
    net = Net(of_eight, a=nn.Conv2d(1, 4, 3), b=nn.Linear(4 * (networks.SIDE - 2) ** 2, 3))

    with pytest.raises(CalibrationError, match="the model itself fails on the calibration inputs"):
        calque.quantize(net, IMAGES[:12], recipe="nearest")

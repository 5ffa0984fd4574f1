"""What `verify` lets pass: right files, whatever their outputs are; and what it refuses, and how it says so."""

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import calque
import networks
from calque.errors import SpecError, VerificationError
from calque.quantized.model import QuantizedModel
from calque.quantized.partly import PartlyQuantized
from calque.shipping.agreement import agreements, spread_of
from calque.shipping.runtimes import OnnxRuntime
from calque.shipping.verification import LIMIT_DB, Agreement, OutputAgreement
from calque.shipping.verify import _with_outputs, load_proto
from networks import Net

INPUTS = networks.images(200, seed=0)
Forward = Callable[[Net, Tensor], object]
Array = np.ndarray[Any, Any]
Edit = Callable[[Array], Array]

PARTS: dict[str, Callable[[], nn.Module]] = {
    "stem": lambda: nn.Conv2d(1, 8, 3, padding=1),
    "map": lambda: nn.Conv2d(8, 4, 1),
    "scores": lambda: nn.Linear(8, 4),
    "boxes": lambda: nn.Linear(8, 4),
    "score": lambda: nn.Linear(8, 1),
}


def features(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.stem(x))


def pooled(net: Net, x: Tensor) -> Tensor:
    return features(net, x).mean((2, 3))


def pixels(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.map(features(net, x))
    return y


def boxes_beside_scores(net: Net, x: Tensor) -> Tensor:
    y = features(net, x).flatten(2).transpose(1, 2)
    return torch.cat([net.boxes(y) * 100, torch.sigmoid(net.score(y))], -1)


FORWARDS: dict[str, tuple[tuple[str, ...], Forward]] = {
    "two heads": (("scores", "boxes"), lambda n, x: {"a": n.scores(pooled(n, x)), "b": n.boxes(pooled(n, x))}),
    "sigmoid": (("scores",), lambda n, x: torch.sigmoid(n.scores(pooled(n, x)))),
    "scores": (("scores",), lambda n, x: n.scores(pooled(n, x))),
    "softmax": (("scores",), lambda n, x: n.scores(pooled(n, x)).softmax(1)),
    "regression": (("score",), lambda n, x: n.score(pooled(n, x))),
    "boxes beside scores": (("boxes", "score"), boxes_beside_scores),
    "map": (("map",), pixels),
    "classes": (("map",), lambda n, x: pixels(n, x).argmax(1)),
    "classes and scores": (("map",), lambda n, x: (lambda y: (y.argmax(1), y))(pixels(n, x))),
    "mean": (("map",), lambda n, x: {"mean": pixels(n, x).mean(), "map": features(n, x)}),
    "mask": (("map",), lambda n, x: pixels(n, x) > 0),
    "count": (("map",), lambda n, x: (pixels(n, x) > 0).sum((1, 2, 3))),
    "batch last": (("map",), lambda n, x: pixels(n, x).flatten(1).transpose(0, 1)),
    "no batch": (("scores",), lambda n, x: (lambda y: y.transpose(0, 1) @ y)(n.scores(pooled(n, x)))),
    "best three": (("map",), lambda n, x: tuple(pixels(n, x).flatten(1).topk(3, 1))),
    "constant and none": (("scores",), lambda n, x: (n.scores(pooled(n, x)), torch.ones(3), None)),
}


def quantized(name: str, **options: object) -> QuantizedModel:
    parts, forward = FORWARDS[name]
    net = Net(forward, **{part: PARTS[part]() for part in ("stem", *parts)})
    return calque.quantize(net, INPUTS, **{"bits": "w8a8", "recipe": "nearest", **options})  # type: ignore[arg-type]


@functools.cache
def made(name: str) -> tuple[QuantizedModel, bytes]:
    """The network at 8 bits, which no test may change, and its file."""
    q = quantized(name)
    with tempfile.TemporaryDirectory() as folder:
        return q, calque.export_onnx(q, Path(folder) / "model.onnx").read_bytes()


def written(name: str, folder: Path) -> tuple[QuantizedModel, Path]:
    """The network at 8 bits and its file in the folder."""
    q, content = made(name)
    path = folder / "model.onnx"
    path.write_bytes(content)
    return q, path


def edited(path: Path, tensor: str, edit: Edit) -> Path:
    """The file with a constant changed, its metadata as they were."""
    proto = onnx.load(path)
    stored = next(each for each in proto.graph.initializer if each.name == tensor)
    values = numpy_helper.to_array(stored)
    stored.CopyFrom(numpy_helper.from_array(edit(values).astype(values.dtype), tensor))
    onnx.save(proto, path.with_name("edited.onnx"))
    return path.with_name("edited.onnx")


@pytest.mark.parametrize("name", FORWARDS)
def test_a_right_file_passes_whatever_its_outputs_are(tmp_path: Path, name: str) -> None:
    q, path = written(name, tmp_path)

    found = calque.verify(path, q, INPUTS)

    assert [each.name for each in found.optimized.outputs] == [each.name for each in onnx.load(path).graph.output]
    assert found.optimized.exact >= 0.99
    assert found.optimized.decibels > 60
    assert found.notes == tuple(note for note in found.notes if "saturates" in note)


def double(values: Array) -> Array:
    return 2 * values


def plus_200(values: Array) -> Array:
    return values + 200


@pytest.mark.parametrize(
    ("name", "tensor", "edit", "position"),
    [
        ("two heads", "boxes/scale", double, 1),
        ("two heads", "scores/bias/codes", plus_200, 0),
        ("two heads", "stem/bias/codes", plus_200, 0),
        ("sigmoid", "scores/scale", double, 0),
        ("sigmoid", "scores/bias/codes", plus_200, 0),
        ("softmax", "scores/scale", double, 0),
        ("regression", "score/scale", double, 0),
        ("regression", "score/bias/codes", plus_200, 0),
        ("boxes beside scores", "score/scale", double, 0),
        ("map", "map/scale", double, 0),
        ("classes", "map/scale", double, 0),
        ("classes and scores", "map/scale", double, 0),
        ("mean", "map/scale", double, 0),
        ("mask", "map/bias/codes", lambda values: values + 3000, 0),
        ("count", "map/bias/codes", lambda values: values + 3000, 0),
        ("batch last", "map/scale", double, 0),
        ("no batch", "scores/scale", double, 0),
    ],
)
def test_a_wrong_output_is_refused_by_its_name(
    tmp_path: Path, name: str, tensor: str, edit: Edit, position: int
) -> None:
    q, path = written(name, tmp_path)
    path = edited(path, tensor, edit)
    output = onnx.load(path).graph.output[position].name

    with pytest.raises(VerificationError, match=rf"output {output} in ONNX Runtime is not that of") as caught:
        calque.verify(path, q, INPUTS)

    assert isinstance(caught.value.verification, calque.Verification)


def test_an_error_has_the_figures_that_a_check_without_a_bound_returns(tmp_path: Path) -> None:
    q, path = written("sigmoid", tmp_path)
    path = edited(path, "scores/scale", double)

    with pytest.raises(VerificationError) as caught:
        calque.verify(path, q, INPUTS)

    found = caught.value.verification
    assert isinstance(found, calque.Verification)
    assert calque.verify(path, q, INPUTS, bound=0).optimized == found.optimized


def test_a_change_behind_every_tensor_and_one_in_front_of_some_are_told_apart(tmp_path: Path) -> None:
    q, path = written("two heads", tmp_path)

    with pytest.raises(VerificationError, match="No tensor in front of it has other codes"):
        calque.verify(edited(path, "boxes/scale", double), q, INPUTS)
    with pytest.raises(VerificationError, match=r"\d% of the codes of stem.output differ, the first tensor that does"):
        calque.verify(edited(path, "stem/scale", double), q, INPUTS)


def test_the_file_of_another_run_is_refused_before_it_runs_and_noted_without_a_bound(tmp_path: Path) -> None:
    q, other = made("sigmoid")[0], calque.quantize(Net(FORWARDS["sigmoid"][1], **parts("sigmoid")), INPUTS[:50])
    path = calque.export_onnx(other, tmp_path / "model.onnx")
    said = r"exported from another network or run: the plan is the same, .* are not \(layer stem, layer scores"

    with pytest.raises(VerificationError, match=said) as caught:
        calque.verify(path, q, "no inputs at all")

    assert caught.value.verification is None
    assert any("another network or run" in note for note in calque.verify(path, q, INPUTS, bound=0).notes)


def parts(name: str) -> dict[str, nn.Module]:
    return {part: PARTS[part]() for part in ("stem", *FORWARDS[name][0])}


def test_another_plan_is_named(tmp_path: Path) -> None:
    path = calque.export_onnx(quantized("sigmoid", override={"stem": "w4a8"}), tmp_path / "model.onnx")

    with pytest.raises(
        VerificationError, match=r"its plan is another one \(stem is w4a8 in the file and w8a8 in the net"
    ):
        calque.verify(path, made("sigmoid")[0], INPUTS)


def test_a_network_that_was_saved_and_loaded_is_the_one_of_its_file(tmp_path: Path) -> None:
    q = quantized("boxes beside scores", bits="w4a8", override={"score": "w4", "boxes": None})
    path = calque.export_onnx(q, tmp_path / "model.onnx")
    calque.save(q, tmp_path / "q.safetensors")
    net = Net(FORWARDS["boxes beside scores"][1], **parts("boxes beside scores"))

    again = calque.load(tmp_path / "q.safetensors", net)

    assert calque.verify(path, again, INPUTS).optimized.exact >= 0.99


def test_a_file_without_calques_metadata_is_judged_by_its_outputs_and_that_is_noted(tmp_path: Path) -> None:
    q, path = written("two heads", tmp_path)
    for file in (path, edited(path, "boxes/scale", double)):
        proto = onnx.load(file)
        del proto.metadata_props[:]
        onnx.save(proto, file)

    found = calque.verify(path, q, INPUTS)

    assert any("judged by its outputs alone" in note for note in found.notes)
    with pytest.raises(VerificationError, match="is not that of"):
        calque.verify(tmp_path / "edited.onnx", q, INPUTS)


def test_damaged_metadata_and_other_outputs_are_named(tmp_path: Path) -> None:
    q, path = written("two heads", tmp_path)
    proto = onnx.load(path)
    fewer = tmp_path / "fewer.onnx"
    del proto.graph.output[1]
    onnx.save(proto, fewer)
    next(entry for entry in proto.metadata_props if entry.key == "calque.plan").value = "stem w8a8"
    onnx.save(proto, tmp_path / "damaged.onnx")

    with pytest.raises(VerificationError, match=r"the file has 1 outputs \(.*\), the network 2"):
        calque.verify(fewer, q, INPUTS)
    with pytest.raises(VerificationError, match=r"calque\.plan must be a JSON object\. Got 'stem w8a8'"):
        calque.verify(tmp_path / "damaged.onnx", q, INPUTS)


@pytest.mark.filterwarnings("ignore::calque.errors.CaptureWarning")
def test_a_network_quantized_in_parts_is_verified_part_by_part(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            result: Tensor = self.head(y.mean((2, 3)) if y.sum() > 0 else y.amax((2, 3)))
            return result

    q = calque.quantize(networks.seeded(Branching()), INPUTS, recipe="nearest")
    assert isinstance(q, PartlyQuantized)
    path = calque.export_onnx(q.parts["body"], tmp_path / "body.onnx")

    with pytest.raises(SpecError, match=r"verify needs a network that was captured whole.*q\.parts\[path\]"):
        calque.verify(path, q, INPUTS)


# ---- the rules, on outputs that a runtime might return


class Returning:
    """A runtime whose outputs are those of the file, changed."""

    def __init__(self, path: Path, change: Callable[[list[Tensor]], list[Tensor]]):
        self.runtime, self.change = OnnxRuntime(load_proto(path)), change

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        return self.change(self.runtime.run(leaves))

    def kernels(self) -> list[object]:
        return []


def returned(tmp_path: Path, name: str, change: Callable[[list[Tensor]], list[Tensor]]) -> Agreement:
    q, path = written(name, tmp_path)
    names = [output.name for output in onnx.load(path).graph.output]
    runtime = Returning(path, change)
    return agreements([runtime], q, [{"x": INPUTS}], names, [])[0]  # type: ignore[list-item]  # it has no kernels


def test_decibels_tell_the_error_beside_the_spread_of_the_output(tmp_path: Path) -> None:
    exact = made("regression")[0].integer()(INPUTS).double()
    error = 0.1 * exact.std(correction=0)

    noisy = returned(tmp_path, "regression", lambda outputs: [outputs[0] + error.float()])
    equal = returned(tmp_path, "regression", lambda outputs: outputs)
    broken = returned(tmp_path, "regression", lambda outputs: [outputs[0] * torch.nan])

    assert noisy.decibels == pytest.approx(20, abs=0.01)
    assert (noisy.exact, equal.exact, broken.exact) == (0, 1, 0)
    assert (equal.decibels, equal.largest_steps) == (LIMIT_DB, 0)
    assert broken.decibels == -LIMIT_DB


def test_a_scalar_is_compared_with_its_own_size(tmp_path: Path) -> None:
    right = returned(tmp_path, "mean", lambda outputs: [outputs[0] * (1 + 1e-6), outputs[1]])
    wrong = returned(tmp_path, "mean", lambda outputs: [outputs[0] * 1.1, outputs[1]])

    assert right.outputs[0].passes(0.99)
    assert wrong.outputs[0].decibels == pytest.approx(20, abs=0.1)
    assert not wrong.outputs[0].passes(0.99)
    assert wrong.outputs[1].passes(0.99)


def test_whole_numbers_count_where_they_are_equal_and_have_no_decibels(tmp_path: Path) -> None:
    def one_percent(outputs: list[Tensor]) -> list[Tensor]:
        changed = outputs[0].clone()
        changed.view(-1)[::50] += 1
        return [changed]

    found = returned(tmp_path, "classes", one_percent)

    assert found.outputs[0].exact == pytest.approx(0.98)
    assert (found.outputs[0].decibels, found.outputs[0].mean_steps) == (None, None)
    assert found.outputs[0].passes(0.98)
    assert not found.outputs[0].passes(0.99)


@pytest.mark.parametrize(
    ("decibels", "share", "bound", "passes"),
    [(30.0, 0.99, 0.99, True), (29.9, 1.0, 0.99, False), (60.0, 0.98, 0.99, False), (60.0, 0.98, 0.97, True),
     (None, 0.99, 0.99, True), (-200.0, 0.0, 0, True)],
)  # fmt: skip
def test_an_output_passes_by_its_share_and_its_error_and_without_a_bound_by_neither(
    decibels: float | None, share: float, bound: float, passes: bool
) -> None:
    output = OutputAgreement("y", "values", share, share, decibels, 0.0, 0.0)

    assert output.passes(bound) == passes


def test_the_spread_is_that_of_the_narrowest_slice_and_of_a_constant_its_size() -> None:
    wide, narrow = torch.arange(100.0)[:, None] * 10, torch.arange(100.0)[:, None] / 100
    both = torch.cat([wide, narrow], 1)

    torch.testing.assert_close(spread_of(both)[0], both.double().std(0, correction=0))
    assert spread_of(torch.full((20, 3), -4.0)).tolist() == [[4.0, 4.0, 4.0]]
    assert spread_of(torch.tensor(2.5)).item() == 2.5
    assert spread_of(torch.tensor([[float("-inf"), 1.0, 3.0]])).item() == 1.0


@pytest.mark.parametrize(("name", "moved"), [("regression", 0.05), ("scores", 0.001)])
@pytest.mark.parametrize(("codes", "share"), [(0, 0.0), (1, 1.0), (200, 0.0)])
def test_other_values_count_where_a_code_parts_and_few_codes_do(
    tmp_path: Path, name: str, moved: float, codes: int, share: float
) -> None:
    """Every row's values move by a part of their spread: beside equal codes, one other code a row, or most codes."""
    (q, path), parts_at = written(name, tmp_path), "stem.output"
    proto = onnx.load(path)
    names = [output.name for output in proto.graph.output]
    onnx.save(_with_outputs(proto, list(q.quantizers)), path)
    position = list(q.quantizers).index(parts_at)

    def change(outputs: list[Tensor]) -> list[Tensor]:
        values, *found = outputs
        parted = found[position].clone()
        parted.flatten(1)[:, :codes] ^= 1
        return [values + moved * values.std(), *found[:position], parted, *found[position + 1 :]]

    runtime = Returning(path, change)
    found = agreements([runtime], q, [{"x": INPUTS}], names, list(q.quantizers))[0]  # type: ignore[list-item]

    assert found.parted == (parts_at if codes else "")
    assert found.parted_share == codes / 512
    assert found.exact == share


class Attention(nn.Module):
    """Float kernels in front of grids: single codes of a right file part at rounding edges."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(4))
        self.value = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.embed(x[:, 0])
        for block in self.blocks:
            y = block(y)
        result: Tensor = self.value(y.mean(1))
        return result


@pytest.mark.slow  # four blocks of a transformer
def test_single_codes_that_part_behind_float_kernels_do_not_fail_a_right_file(tmp_path: Path) -> None:
    q = calque.quantize(networks.seeded(Attention()), INPUTS, bits="w8a8", recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    found = calque.verify(path, q, INPUTS)

    assert found.optimized.exact >= 0.99
    with pytest.raises(VerificationError, match="is not that of"):
        calque.verify(edited(path, "value/bias/codes", plus_200), q, INPUTS)


# ---- what is printed


def test_every_output_and_every_column_is_told_in_the_table_and_in_json(tmp_path: Path) -> None:
    q, path = written("classes and scores", tmp_path)
    found = calque.verify(path, q, INPUTS)
    text, figures = str(found), json.loads(found.to_json())

    for output in found.optimized.outputs:
        assert sum(output.name in line for line in text.splitlines()) >= 3  # optimized, optimizer off, far outside
    legend = [line for line in text.splitlines() if line.startswith("  ")]
    for column in (
        "optimized:",
        "optimizer off,",
        "far outside,",
        "= exact:",
        "= simulated:",
        "dB:",
        "mean steps, largest:",
    ):
        assert sum(column in line for line in legend) == 1, column
    assert any(line.startswith("  first tensor that parts:") for line in legend)
    assert [each["kind"] for each in figures["optimized"]["outputs"]] == ["whole numbers", "values"]
    assert figures["optimized"]["exact"] == min(each["exact"] for each in figures["optimized"]["outputs"])
    assert figures["optimized"]["outputs"][0]["decibels"] is None
    assert figures["plain"]["outputs"][1]["largest_steps"] == found.plain.outputs[1].largest_steps  # type: ignore[union-attr]

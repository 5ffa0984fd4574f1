"""What a file calls its inputs, outputs, axes and constants, and what wrong arguments are told."""

import copy
import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import calque
import networks
from calque.errors import CaptureError, ExportError, SpecError, VerificationError
from calque.network import Batch
from calque.network.batching import equal_axes
from calque.network.outputs import flatten_outputs
from calque.network.paths import leaf_paths
from calque.network.signature import Layout, laid_out
from calque.quantized.model import QuantizedModel
from calque.shipping.names import interface
from calque.shipping.onnx import float_onnx
from calque.shipping.runtimes import Target
from calque.shipping.verify import run_onnx
from networks import Net
from slow import slow

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
AUTO = torch.export.Dim.AUTO


def names_of(graph: onnx.GraphProto) -> tuple[list[str], list[str]]:
    return [value.name for value in graph.input], [value.name for value in graph.output]


def axes_of(graph: onnx.GraphProto) -> dict[str, list[int | str]]:
    """The size or name of each axis of the inputs and outputs."""
    values = (*graph.input, *graph.output)
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def exported(q: QuantizedModel, folder: Path, **options: Any) -> onnx.GraphProto:
    return onnx.load(calque.export_onnx(q, folder / "q.onnx", **options)).graph


class Builtin(nn.Module):
    """An argument with the name of a Python function."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.body(input)))
        return y


@pytest.fixture(scope="module")
def builtin() -> QuantizedModel:
    return calque.quantize(networks.seeded(Builtin()), X, recipe="nearest")


class Nested(nn.Module):
    """A list and a dict of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, boxes: list[Tensor], features: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.head(F.relu(self.body(boxes[0] + boxes[1])) + features["p3"])
        return y


@pytest.mark.parametrize("target", ["onnxruntime", slow("qonnx")])
def test_an_argument_keeps_its_name_in_every_file(tmp_path: Path, builtin: QuantizedModel, target: Target) -> None:
    q, model = builtin, networks.seeded(Builtin())
    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", Builtin())

    files = [
        exported(q, tmp_path, target=target),
        exported(loaded, tmp_path, target=target),
        float_onnx(model, q).graph,
    ]

    assert [names_of(file) for file in files] == 3 * [(["input"], ["output"])]
    assert [axes_of(file) for file in files] == 3 * [{"input": ["batch", 8], "output": ["batch", 3]}]


def test_tensors_inside_an_argument_are_called_by_their_place(tmp_path: Path) -> None:
    q = calque.quantize(networks.seeded(Nested()), {"boxes": [X, X + 1], "features": {"p3": X}}, recipe="nearest")

    assert names_of(exported(q, tmp_path)) == (["boxes_0", "boxes_1", "features_p3"], ["output"])


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Found:
    logits: Any
    hidden: Any = None
    version: int = 1


class Results(dict[str, Any]):
    """A dict of its own type, as transformers returns."""


RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], object], list[str]]] = {
    "tensor": (lambda y, z: y, ["output"]),
    "tuple": (lambda y, z: (y, z), ["output_0", "output_1"]),
    "tuple of one": (lambda y, z: (y, None), ["output"]),
    "numbers between": (lambda y, z: (3, y, None, z), ["output_1", "output_3"]),
    "dict": (lambda y, z: {"boxes": y, "scores": [z, z + 1]}, ["boxes", "scores_0", "scores_1"]),
    "ordered dict": (lambda y, z: OrderedDict(b=y, a=z), ["b", "a"]),
    "numbered": (lambda y, z: {0: y, 1: z}, ["output_0", "output_1"]),
    "own dict": (lambda y, z: Results(logits=y, n=2, past=(z, z + 1)), ["logits", "past_0", "past_1"]),
    "dataclass": (lambda y, z: Found(y, Found(z)), ["logits", "hidden_logits"]),
    "named tuple": (lambda y, z: Pair(y, {"third": z}), ["first", "second_third"]),
    "torch's own": (lambda y, z: y.topk(2), ["values", "indices"]),
    "one dict in a tuple": (lambda y, z: ({"a": y, "b": z},), ["a", "b"]),
    "mixed": (lambda y, z: (y, {"b": z}), ["output_0", "output_1_b"]),
    "the same twice": (lambda y, z: {"a": y, "b": y}, ["a", "b"]),
}


def returning(pack: Callable[[Tensor, Tensor], object]) -> tuple[nn.Module, QuantizedModel]:
    """A network with that output, float and quantized."""

    def forward(net: Net, x: Tensor) -> object:
        y = F.relu(net.body(x))
        return pack(net.head(y), y)

    model = networks.seeded(Net(forward, body=nn.Linear(8, 8), head=nn.Linear(8, 8)))
    return model, calque.quantize(model, X, recipe="nearest")


@pytest.mark.parametrize("case", RETURNED.values(), ids=RETURNED)
def test_outputs_are_called_by_their_keys_fields_and_positions(
    case: tuple[Callable[[Tensor, Tensor], object], list[str]],
) -> None:
    pack, expected = case

    names = interface(returning(pack)[1])

    assert (names.inputs, list(names.outputs)) == (("x",), expected)


CLASHES: dict[str, tuple[Callable[[Tensor, Tensor], object], list[str]]] = {
    "operators": (lambda y, z: {"relu": y, "quantize": z + 1, "body": z.sin()}, ["relu", "quantize", "body"]),
    "constants": (lambda y, z: {"body/scale": y, "flat": z, "x": z + 1}, ["body/scale_", "flat", "x_"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASHES.values(), ids=CLASHES)
def test_outputs_may_be_called_like_anything_inside_the_file(
    case: tuple[Callable[[Tensor, Tensor], object], list[str]], tmp_path: Path
) -> None:
    _, q = returning(case[0])
    path = calque.export_onnx(q, tmp_path / "q.onnx")

    found = calque.verify(path, q, X)

    assert names_of(onnx.load(path).graph) == (["x"], case[1])
    assert found.optimized.exact == 1
    assert len(found.reasons) > 1
    assert str(found).count("values on no grid") == 1


class Echo(nn.Module):
    """Outputs that are an input, a weight and one tensor twice; an input called output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(3))

    def forward(self, output: Tensor, x: Tensor) -> dict[str, Any]:
        y = F.relu(self.body(output)) + x
        return {"x": x, "output": y, "again": y, "gain": self.gain, "rows": x.shape[0], "none": None}


@pytest.fixture(scope="module")
def echo() -> QuantizedModel:
    return calque.quantize(networks.seeded(Echo()), (X, X.flip(0)), recipe="nearest")


@pytest.mark.parametrize("target", ["onnxruntime", slow("openvino"), slow("qonnx")])
def test_outputs_never_have_the_name_of_an_input_or_of_each_other(
    tmp_path: Path, echo: QuantizedModel, target: Target
) -> None:
    if target != "onnxruntime":
        pytest.importorskip(target)
    model = networks.seeded(Echo())
    path = calque.export_onnx(echo, tmp_path / "q.onnx", target=target)

    assert names_of(onnx.load(path).graph) == (["output", "x"], ["x_", "output_", "again", "gain"])
    found = calque.verify(path, echo, (X, X.flip(0)), target=target, original=model)
    assert [output.name for output in found.optimized.outputs] == ["x_", "output_", "again", "gain"]
    assert found.optimized.exact == 1


@pytest.mark.parametrize("target", ["onnxruntime", slow("openvino"), slow("qonnx")])
def test_chosen_names_are_the_files(tmp_path: Path, echo: QuantizedModel, target: Target) -> None:
    if target != "onnxruntime":
        pytest.importorskip(target)
    inputs, outputs = ["relu", "add"], ["body", "output", "view", "x y"]
    path = calque.export_onnx(echo, tmp_path / "q.onnx", target=target, input_names=inputs, output_names=outputs)

    assert names_of(onnx.load(path).graph) == (inputs, outputs)
    assert calque.verify(path, echo, (X, X.flip(0)), target=target).optimized.exact == 1


def test_one_kind_of_names_may_be_chosen_alone(tmp_path: Path, builtin: QuantizedModel) -> None:
    graph = exported(builtin, tmp_path, input_names=["output"])

    assert axes_of(graph) == {"output": ["batch", 8], "output_": ["batch", 3]}
    assert names_of(exported(builtin, tmp_path, output_names=["logits"])) == (["input"], ["logits"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"input_names": ["a"]},
            r"input_names is a list with one distinct name for each input \(output, x\)\. Got 1: a\.",
        ),
        ({"input_names": []}, r"name for each input \(output, x\)\. Got 0: none\."),
        ({"input_names": "ab"}, r"name for each input \(output, x\)\. Got 'ab'\."),
        ({"input_names": ["a", 3]}, r"Got \['a', 3\]\."),
        ({"input_names": ["a", "a"]}, r"none of them empty\. Got 'a', 'a'\."),
        ({"input_names": ["a", " "]}, r"none of them empty\. Got 'a', ' '\."),
        (
            {"output_names": ["a", "b"]},
            r"output_names is a list .* for each output \(x, output, again, gain\)\. Got 2: a, b\.",
        ),
        ({"output_names": ["a", "b", "c", "x"]}, r"must differ from the names of the inputs \(output, x\)\. Got 'x'\."),
        ({"output_names": ["a", "b", "c", "body/scale"]}, r"'body/scale' is the name of a tensor inside the file\."),
    ],
)
def test_chosen_names_are_checked(tmp_path: Path, echo: QuantizedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        calque.export_onnx(echo, tmp_path / "q.onnx", **options)

    assert not list(tmp_path.iterdir())


class ModelOutput(OrderedDict[str, Any]):
    """A dict that pytree knows with its keys, as those of transformers."""


pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: ModelOutput(zip(keys, values, strict=True)),
)


def test_outputs_of_transformers_are_called_by_their_keys() -> None:
    _, tree = flatten_outputs(ModelOutput(logits=X, past=((X, X), (X, X)), loss=None))

    assert leaf_paths(tree) == [("logits",), *(("past", layer, part) for layer in range(2) for part in range(2))]


def test_paths_of_leaves_say_keys_fields_and_positions() -> None:
    leaves, tree = flatten_outputs({"a": [X, Pair(X, None)], "b": Found(X), "c": X.topk(2)})

    expected = [("a", 0), ("a", 1, "first"), ("b", "logits"), ("c", "values"), ("c", "indices")]
    assert leaf_paths(tree) == expected
    assert len(leaves) == len(expected)


class Encoder(nn.Module):
    """Tokens that attend to each other under a mask; a score for each, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) + (attention_mask[:, None] - 1) * 1e4
        x = scores.softmax(-1) @ x
        return {"tokens": x, "logits": self.head(x.mean(1)), "pairs": scores.flatten(1)}


def sentences(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(20, (4, length), generator=generator) for length in lengths]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


@pytest.fixture(scope="module")
def encoder() -> QuantizedModel:
    return calque.quantize(networks.seeded(Encoder()), sentences(5, 7, 9), recipe="nearest")


def test_axes_of_one_length_share_a_name(tmp_path: Path, encoder: QuantizedModel) -> None:
    model = networks.seeded(Encoder())
    calque.save(encoder, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", Encoder())

    expected = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "tokens": ["batch", "sequence", 8],
        "logits": ["batch", 3],
        "pairs": ["batch", "pairs_axis1"],
    }
    for graph in (
        exported(encoder, tmp_path),
        exported(loaded, tmp_path, target="qonnx"),
        float_onnx(model, encoder).graph,
    ):
        assert axes_of(graph) == expected


def pairs_of_images(*sides: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    """Images of one height each, and widths of their own."""
    return [
        (torch.rand(4, 1, height, left, generator=(g := torch.Generator().manual_seed(0))),
         torch.rand(4, 1, height, right, generator=g))
        for height, left, right in sides
    ]  # fmt: skip


class TwoImages(nn.Module):
    """One layer for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        x, y = F.relu(self.a(left)), F.relu(self.a(right))
        return {"maps": y, "halves": F.avg_pool2d(x, 2), "score": x.mean((2, 3)) + y.mean((2, 3))}


def test_axes_that_differed_in_a_batch_have_names_of_their_own(tmp_path: Path) -> None:
    q = calque.quantize(networks.seeded(TwoImages()), pairs_of_images((8, 8, 8), (12, 10, 14)), recipe="nearest")

    assert axes_of(exported(q, tmp_path)) == {
        "left": ["batch", 1, "height", "width"],
        "right": ["batch", 1, "height", "right_width"],
        "maps": ["batch", 4, "height", "right_width"],
        "halves": ["batch", 4, "halves_axis2", "halves_axis3"],
        "score": ["batch", 4],
    }


def test_axes_that_are_free_by_request_share_no_name_that_nothing_shows(tmp_path: Path) -> None:
    axes = {name: {2: AUTO, 3: AUTO} for name in ("left", "right")}
    q = calque.quantize(networks.seeded(TwoImages()), pairs_of_images((8, 8, 8)), recipe="nearest", dynamic=axes)
    path = calque.export_onnx(q, tmp_path / "q.onnx")

    found = axes_of(onnx.load(path).graph)
    assert found["left"] == ["batch", 1, "height", "width"]
    assert found["right"] == ["batch", 1, "right_height", "right_width"]
    left, right = torch.rand(3, 1, 6, 10), torch.rand(3, 1, 12, 4)
    assert run_onnx(path, [left, right]).shape == (3, 4, 12, 4)


def test_other_axes_are_called_by_their_input_and_number(tmp_path: Path) -> None:
    net = networks.seeded(Net(lambda net, x: net.head(net.body(x).relu()), body=nn.Linear(8, 8), head=nn.Linear(8, 3)))
    q = calque.quantize(net, [torch.rand(4, length, 8) for length in (5, 6)], recipe="nearest")

    assert axes_of(exported(q, tmp_path)) == {"x": ["batch", "x_1", 8], "output": ["batch", "x_1", 3]}
    assert axes_of(exported(q, tmp_path, input_names=["frames"]))["frames"] == ["batch", "frames_1", 8]


def test_a_file_from_before_equal_axes_were_stored_is_read_and_named_by_what_torch_finds(
    tmp_path: Path, encoder: QuantizedModel
) -> None:
    q = copy.deepcopy(encoder)
    q.facts = replace(q.facts, equal_axes=None)
    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", Encoder())

    found = axes_of(exported(loaded, tmp_path))
    assert loaded.facts.equal_axes is None
    assert found["input_ids"] == found["attention_mask"] == ["batch", "sequence"]


def test_equal_axes_are_those_that_vary_together() -> None:
    batches: list[Batch] = [
        {"ids": torch.zeros(2, n), "mask": torch.zeros(2, n, n), "x": torch.zeros(2, n, 3)} for n in (4, 6)
    ]
    odd: list[Batch] = [{"x": torch.zeros(2, 4, 4)}, {"x": torch.zeros(3, 4, 5)}]

    assert equal_axes(batches) == ((("ids", 1), ("mask", 1), ("mask", 2), ("x", 1)),)
    assert equal_axes(odd) == ((("x", 2),),)
    assert equal_axes([laid_out(each, Layout(apart=False)) for each in odd]) == ((("x", 0),), (("x", 2),))
    assert equal_axes(odd[:1]) == ()


def test_equal_axes_survive_saving(tmp_path: Path, encoder: QuantizedModel) -> None:
    calque.save(encoder, tmp_path / "q.safetensors")

    assert encoder.facts.equal_axes == ((("input_ids", 1), ("attention_mask", 1)),)
    assert calque.load(tmp_path / "q.safetensors", Encoder()).facts.equal_axes == encoder.facts.equal_axes


class Shared(nn.Module):
    """A layer called twice, one that stays float, a norm and a mask that is computed from constants."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.kept, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.body(F.relu(self.body(x)))))
        x = self.kept(x) * torch.linspace(0, 1, 8).softmax(0) + x.sin()
        y: Tensor = self.head(x)
        return y


def shared() -> QuantizedModel:
    return calque.quantize(networks.seeded(Shared()), X, bits="w4a8", recipe="nearest", override={"kept": None})


def test_constants_of_layers_have_their_names(tmp_path: Path) -> None:
    q = shared()
    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", Shared())
    names = {tensor.name for tensor in exported(q, tmp_path).initializer}

    kept = {f"{layer}/{part}" for layer in q.layers for part in ("scale", "bias/codes")}
    assert kept | {"body/codes", "head/codes", "norm.weight", "norm.bias", "kept.weight", "kept.bias"} <= names
    assert {tensor.name for tensor in exported(loaded, tmp_path).initializer} == names
    assert not [name for name in names if name.startswith(("val_", "module."))]
    assert {"body/weight/scale", "body#2/weight/scale", "norm.weight"} <= {
        tensor.name for tensor in exported(q, tmp_path, target="qonnx").initializer
    }


SCRIPT = """
import hashlib, sys, warnings
sys.path[:0] = {path!r}
import torch, calque, test_interface
torch.set_num_threads(1)
file = calque.export_onnx(test_interface.shared(), {file!r})
"""


@pytest.mark.slow  # another process imports everything
def test_two_exports_have_the_same_bytes_in_one_process_and_in_another(tmp_path: Path) -> None:
    q = shared()
    files = [calque.export_onnx(q, tmp_path / f"{number}.onnx") for number in range(2)]
    script = SCRIPT.format(
        path=[str(Path(__file__).parent), str(Path(networks.__file__).parent)], file=str(tmp_path / "2.onnx")
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})

    digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (*files, tmp_path / "2.onnx")}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, q, path: calque.export_onnx(net, path), SpecError, "Got the float network Builtin: quantize it fi"),
        (lambda net, q, path: calque.export_onnx(path, q), SpecError, r"Got the path '.*q\.onnx': are the arguments sw"),
        (lambda net, q, path: calque.export_onnx(cast(Any, {}), path), SpecError, r"calque\.load returned\. Got dict\."),
        (lambda net, q, path: calque.export_onnx(q, cast(Any, 3)), SpecError, r"takes as path a str or Path\. Got int\."),
        (lambda net, q, path: calque.export_onnx(q, path.parent), IsADirectoryError, "is a folder. Add the name of the"),
        (lambda net, q, path: calque.export_onnx(q, path / "a" / "b"), FileNotFoundError, "the folder .* does not exist"),
        (lambda net, q, path: calque.save(net, path), SpecError, r"save\(q, path\) takes as q what .* Got the float netw"),
        (lambda net, q, path: calque.save(path, q), SpecError, r"are the arguments swapped\?"),
        (lambda net, q, path: calque.save(q, path.parent), IsADirectoryError, "is a folder"),
        (lambda net, q, path: calque.save(q, path / "a" / "b"), FileNotFoundError, "the folder .* does not exist"),
        (lambda net, q, path: calque.load(net, path), SpecError, r"load\(path, model\) takes .* Builtin: are the argume"),
        (lambda net, q, path: calque.load(path.parent, net), IsADirectoryError, "is a folder. Pass the file in it"),
        (lambda net, q, path: calque.load(path, net), FileNotFoundError, "there is no file"),
        (lambda net, q, path: calque.load(__file__, q), CaptureError, "is quantized by calque already"),
        (lambda net, q, path: calque.verify(q, path, X), SpecError, r"Got QuantizedModel: are the arguments swapped\?"),
        (lambda net, q, path: calque.verify(__file__, net, X), SpecError, "Got the float network Builtin: quantize it"),
        (lambda net, q, path: calque.verify(path.parent, q, X), IsADirectoryError, "is a folder. Pass the file in it"),
        (lambda net, q, path: calque.verify(path, q, X), FileNotFoundError, "there is no file"),
        (lambda net, q, path: run_onnx(path, [X]), FileNotFoundError, "there is no file"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_in_one_sentence(
    tmp_path: Path,
    builtin: QuantizedModel,
    call: Callable[[nn.Module, QuantizedModel, Path], object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        call(Builtin(), builtin, tmp_path / "q.onnx")

    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def builtin_file(builtin: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calque.export_onnx(builtin, tmp_path_factory.mktemp("files") / "q.onnx")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            X[:, :5],
            r"input input of the file is float32 \(batch, 8\)\. Got float32 \(40, 5\); prepare it as in calibration",
        ),
        (X[None], r"Got float32 \(1, 40, 8\)"),
        (X.double(), r"is float32 \(batch, 8\)\. Got float64 \(40, 8\)"),
        (X.to(torch.uint8), r"Got uint8 \(40, 8\)"),
        (X.bfloat16(), r"Got bfloat16 \(40, 8\)"),
    ],
)
def test_inputs_that_the_file_does_not_take_are_told(
    builtin: QuantizedModel, builtin_file: Path, inputs: Tensor, message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        run_onnx(builtin_file, [inputs])
    with pytest.raises(VerificationError, match=message):
        calque.verify(builtin_file, builtin, inputs)


class Twofold(Builtin):
    """Two outputs in place of one."""

    def forward(self, input: Tensor) -> Any:
        y = super().forward(input)
        return y, y + 1


def test_the_float_network_of_another_one_is_told(builtin: QuantizedModel) -> None:
    with pytest.raises(ExportError, match="has 1 inputs and 1 outputs, this one has 1 and 2"):
        float_onnx(networks.seeded(Twofold()), builtin)

"""What networks return: any type, with constants, is returned by the quantized network as well."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
from calque.errors import CaptureError
from calque.network import capture
from calque.network.outputs import flatten_outputs
from calque.recipe import FAST, Distillation, Recipe, Tuning
from networks import Net, Plain

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Any

    def __post_init__(self) -> None:
        assert not isinstance(self.logits, str)


class Pair(NamedTuple):
    first: Any
    second: Any


class Named(dict[str, Any]):
    """A dict whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


Pack = Callable[["Net", Tensor, Tensor, Tensor], object]

PACKS: dict[str, Pack] = {
    "dataclass": lambda net, y, h, x: Plain(y, h, 4),
    "nested": lambda net, y, h, x: {"all": [Plain(y, Frozen((h, None))), ("two", 2)], "pair": Pair(h, Plain(x))},
    "frozen": lambda net, y, h, x: Frozen(y),
    "named tuple": lambda net, y, h, x: Pair(y, OrderedDict(b=h, a=1.5)),
    "dict": lambda net, y, h, x: Named(y=y, z=None),
    "constants": lambda net, y, h, x: (None, 3, y, 2.5, "text", True, float("nan"), torch.float32),
    "tensors": lambda net, y, h, x: (net.anchors, torch.ones(3), x, y, y),
    "sizes": lambda net, y, h, x: (x.shape[0], y, x.shape[1]),
    "no floats": lambda net, y, h, x: (y, y > 0, y.argmax(1)),
}


def packed(pack: Pack) -> Net:
    def forward(net: Net, x: Tensor) -> object:
        hidden = F.relu(net.body(x))
        return pack(net, net.head(hidden), hidden, x)

    return Net(forward, body=nn.Linear(8, 8), head=nn.Linear(8, 3), anchors=torch.zeros(5))


def assert_alike(expected: Any, received: Any) -> None:
    """Objects of the same types, equal constants and close tensors."""
    left, tree = flatten_outputs(expected)
    right, other = flatten_outputs(received)
    assert tree == other
    assert type(received) is type(expected)
    for a, b in zip(left, right, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=0.1 * a.abs().max().item())


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_quantized_network_returns_what_the_network_returns(pack: Pack, tmp_path: Path) -> None:
    model = packed(pack)
    q = calque.quantize(model, X, bits="w8a8", recipe="nearest")
    calque.save(q, tmp_path / "q.safetensors")
    loaded = calque.load(tmp_path / "q.safetensors", packed(pack))

    for size in (1, 7):
        with torch.no_grad():
            assert_alike(model(X[:size]), q(X[:size]))
        assert_alike(q(X[:size]), loaded(X[:size]))
        assert_alike(q(X[:size]), q.integer()(X[:size]))


@pytest.mark.parametrize("name", ["nested", "constants", "tensors", "sizes"])
def test_a_file_has_the_outputs_that_are_tensors(name: str, tmp_path: Path) -> None:
    q = calque.quantize(packed(PACKS[name]), X, bits="w8a8", recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "q.onnx")
    tensors = [leaf for leaf in flatten_outputs(q(X))[0] if isinstance(leaf, Tensor)]

    names = [value.name for value in onnx.load(path).graph.output]
    assert len(names) == len(tensors) == len(set(names))


def test_a_dataclass_is_rebuilt_without_its_init() -> None:
    @dataclass
    class Checked:
        y: Tensor

        def __init__(self, y: Tensor, *, again: bool) -> None:
            self.y = y

    leaves, spec = flatten_outputs([Checked(X, again=True)])
    (result,) = torch.utils._pytree.tree_unflatten([2 * leaf for leaf in leaves], spec)

    assert type(result) is Checked
    assert torch.equal(result.y, 2 * X)


def test_capturing_registers_no_type_of_the_user() -> None:
    capture(packed(PACKS["nested"]), {"x": X})

    assert torch.utils._pytree.tree_leaves(plain := Plain(X)) == [plain]


def test_an_output_that_cannot_be_taken_apart_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"forward must return tensors, .* Got set\."):
        capture(packed(lambda net, y, h, x: {y}), {"x": X})


def test_a_constant_that_differs_between_calls_is_refused() -> None:
    counts = iter(range(100))
    with pytest.raises(CaptureError, match="besides tensors must not depend"):
        capture(packed(lambda net, y, h, x: (y, next(counts))), {"x": X})


TRAINED = {
    "distilled": replace(FAST, distillation=Distillation(steps=2)),
    "tuned": replace(FAST, tuning=Tuning(steps=2)),
}


@pytest.mark.parametrize("recipe", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("memory", ["1GB", "1KB"])
def test_training_copes_with_outputs_that_are_no_floats(recipe: Recipe, memory: str) -> None:
    model = packed(lambda net, y, h, x: Plain((x.shape[0], y > 0, y.argmax(1), net.anchors, x), y, 2))

    def loss(reference: object, output: object) -> Tensor:
        assert isinstance(reference, Plain)
        assert isinstance(output, Plain)
        return F.mse_loss(output.hidden, reference.hidden)

    x = X.clone()
    q = calque.quantize(model, x, bits="w8a8", recipe=recipe, memory=memory, loss=loss)

    with torch.no_grad():
        assert F.mse_loss(q(x).hidden, model(x).hidden) < 1e-2 * model(x).hidden.var()
    assert not any(value.requires_grad for value in (x, *q.buffers()))

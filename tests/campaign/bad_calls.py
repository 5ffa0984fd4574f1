"""Calls of the API that must fail with one of our errors: keywords under values that they cannot take, files and networks."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import calque
from calque.recipe import ADVANCED
from calque.settings import RATES, AdaQuant, Blocks, ClosedForm, Distillation, Ranges, Search, Sequential, Tuning

from .bad_files import broken, images, shortened, special, tensors
from .bad_words import MODULE


@dataclass(frozen=True, slots=True)
class Call:
    """A call.

    Attributes:
        given: what is wrong in it.
        named: one of these must be in the error.
    """

    given: str
    call: Callable[[], object]
    named: tuple[str, ...]


def values() -> dict[str, Any]:
    """One value of each kind."""
    return {
        "an object": object(), "a number": 3, "a share": 0.5, "minus one": -1, "zero": 0, "vast": 10**30,
        "digits": 10**6000, "nan": float("nan"),
        "infinity": float("inf"), "a word": "nonsense", "bytes": b"w8a8", "True": True, "False": False, "a list": [],
        "a list of None": [None],
        "a dict": {}, "a dict of numbers": {1: 2}, "a set": {1}, "a function": len, "a class": nn.Linear,
        "a network": nn.Linear(2, 2),
        "a tensor": torch.ones(2), "an array": np.ones(2), "a complex": 1j, "None": None, "no word": "", "NUL": "a\0b",
        "a surrogate": "a\udc80b",
        "a long word": "w" * 100_000, "a path": Path("nonsense"), "an iterator": iter(()), "a slice": slice(3),
        "a type": int, "an error": ValueError("x"),
    }  # fmt: skip


TEXTS = ("a word", "no word", "NUL", "a surrogate", "a long word")
PATHS = ("a word", "a path", "a surrogate")  # where a file may be written
BOOLS = ("True", "False")
NUMBERS = ("a number", "a share", "minus one", "zero", "vast", "digits", "nan", "infinity")
CALLABLES = ("a function", "a class", "a type")
# Of each keyword the kinds of values that it takes, or that are told apart only later; and other names of it in errors.
Table = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
QUANTIZE: Table = {
    "model": ((), ("network", "calibration")), "calibration": ((), ("input", "network")),
    "bits": (("None",), ("w8a8", "several")),
    "budget": (("None",), ()), "plan": (("None",), ()), "override": (("None", "a dict"), ("pattern", "bits", "layer")),
    "recipe": (("None",), ()),
    "placement": ((), ()), "first_last": (("None",), ("bits",)), "loss": (("None", "a network", *CALLABLES), ()),
    "dynamic": (("None", "a dict"), ("axes", "axis")),
    "run": (("None", *PATHS), ("a\0b", "folder", "path")), "seed": (("a number", "zero", "minus one"), ()),
    "device": (("None",), ()), "memory": (("a number",), ()),
    "workers": (("None", "a number"), ()), "progress": (("None", "a network", *BOOLS, *CALLABLES), ()),
}  # fmt: skip
EXPORT: Table = {
    "model": ((), ("as q",)), "path": (PATHS, ("a\\x00b", "a\\udc80b", "folder", "w" * 50)), "target": ((), ()),
    "input_names": (("None",), ("input names", "names")), "output_names": (("None",), ("output names", "names")),
}  # fmt: skip
VERIFY: Table = {
    "path": ((), ("file", "folder", "a\\x00b", "w" * 50)), "model": ((), ("as q",)),
    "inputs": ((), ("calibration", "network")), "target": ((), ()),
    "bound": (("zero", "a share"), ()), "original": (("None",), ("model", "network", "layer")),
}  # fmt: skip
LOAD: Table = {"path": VERIFY["path"], "model": ((), ("network",))}
SAVE: Table = {"q": ((), ()), "path": EXPORT["path"]}
ONNX_MODEL: Table = {"path": VERIFY["path"], "model": ((), ("as q",)), "target": ((), ())}
LATENCY: Table = {
    "model": ((), ("as q",)), "inputs": ((), ("calibration", "network")), "bits": (("None",), ("w8a8",)),
    "threads": (("a number",), ()), "batch": (("a number",), ()),
    "progress": (("None", "a network", *BOOLS, *CALLABLES), ()),
}  # fmt: skip
BUDGET: Table = {
    **{name: (("None", "a number", "a share"), ()) for name in ("size", "bops", "activation_memory")},
    "latency": (("None",), ("table", "pair")), "loss": (("a number", "a share", "zero", "vast"), ()),
    "minimize": ((), ()),
}  # fmt: skip
PIECES: tuple[Any, ...] = (  # of a recipe
    Ranges(), RATES, ClosedForm(), AdaQuant(), Sequential(), Blocks(5), Distillation(steps=5), Tuning(), Search(),
)  # fmt: skip
OPTIONAL = ("blocks", "normalization", "distillation", "tuning")  # stages that a recipe may leave out
COUNTS = ("steps", "rounds", "rows", "priced_inputs", "finalists")
SHARES = ("tolerance", "channel_scales", "minutes", "mixup")
RATE_FIELDS = ("rate", *(field.name for field in fields(RATES)))


def recipe_table(names: list[str]) -> Table:
    """Of a recipe's fields, or of a piece's: the kinds of values that each may take."""
    found: Table = {}
    for name in names:
        taken: tuple[str, ...] = ()
        if name == "name":
            taken = ("a word", "NUL", "a surrogate")
        elif name in OPTIONAL:
            taken = ("None",)
        elif name in COUNTS:
            taken = ("a number",)
        elif name in RATE_FIELDS:
            taken = ("a number", "a share")
        elif name in SHARES:
            taken = ("a number", "a share", "zero")
        found[name] = (taken, ())
    return found


def network() -> nn.Module:
    space: dict[str, Any] = {}
    exec(MODULE, space)
    net: nn.Module = space["build"]()
    return net.eval()


def calls(folder: Path) -> Iterator[Call]:
    """All cases, for the current folder, which is `folder` and has its ground."""
    net, x = network(), images()
    q = calque.load("run/q.safetensors", net)
    base = {"model": net, "calibration": x, "recipe": "nearest", "progress": False}
    yield from _wrong("quantize", calque.quantize, base, QUANTIZE)
    yield from _wrong("export_onnx", calque.export_onnx, {"model": q, "path": "x.onnx"}, EXPORT)
    yield from _wrong("verify", calque.verify, {"path": "model.onnx", "model": q, "inputs": x}, VERIFY)
    yield from _wrong("load", calque.load, {"path": "run/q.safetensors", "model": net}, LOAD)
    yield from _wrong("save", calque.save, {"q": q, "path": "x.q"}, SAVE)
    yield from _wrong("OnnxModel", calque.OnnxModel, {"path": "model.onnx", "model": q}, ONNX_MODEL)
    yield from _wrong(
        "latency_table", calque.latency_table, {"model": q, "inputs": x, "bits": ("w8a8",), "progress": False}, LATENCY
    )
    yield from _wrong("Budget", calque.Budget, {"loss": 0.1, "minimize": "size"}, BUDGET)
    for piece in (ADVANCED, *PIECES):
        plain = {field.name: getattr(piece, field.name) for field in fields(piece)}
        yield from _wrong(type(piece).__name__, type(piece), plain, recipe_table(list(plain)))
    yield from _plans()
    yield from _files(folder, q, net, x)
    yield from _inputs(q, net, base)
    yield from _networks(q, base)
    endless = {"generator": x, "large batches": torch.zeros(1).expand(50, 1, 2000, 2000), "empty batches": x[:0]}
    for what, batch in endless.items():
        yield Call(f"endless {what}", partial(_quantized, base, calibration=itertools.repeat(batch)), ("calibration",))
    half, both = calque.Budget(size=100_000), ("w8a8", "w4a4")
    alone: dict[str, dict[str, Any]] = {
        "budget and plan": {"bits": both, "budget": half, "plan": q.plan}, "budget": {"budget": half}, "bits": {"bits": both},
    }  # fmt: skip
    for what, options in alone.items():
        yield Call(f"{what} alone", partial(_quantized, base, **options), ("budget",))


def _quantized(base: dict[str, Any], **options: Any) -> object:
    return calque.quantize(**{**base, **options})


def _wrong(what: str, function: Callable[..., object], base: dict[str, Any], table: Table) -> Iterator[Call]:
    """Every keyword under every kind of value that it does not take, beside good values of the others."""
    for keyword, (taken, names) in table.items():
        for kind, value in values().items():
            if kind not in taken:
                given = {**base, keyword: value}
                yield Call(f"{what}({keyword}={kind})", partial(function, **given), (keyword, *names))


def _plans() -> Iterator[Call]:
    readers: dict[str, Callable[[Any], object]] = {
        "Plan.parse": calque.Plan.parse, "Recipe.parse": calque.Recipe.parse,
        "Prices.from_json": calque.Prices.from_json,
        "Report.from_json": calque.Report.from_json,
    }  # fmt: skip
    for kind, value in values().items():
        yield Call(f"Plan({{'a': {kind}}})", partial(calque.Plan, {"a": value}), ("plan",))
        named = ("Plan.load", "directory", "nonsense", "a\udc80b")
        yield Call(f"Plan.load({kind})", partial(calque.Plan.load, value), named)
        if kind != "a dict":
            yield Call(f"Plan({kind})", partial(calque.Plan, value), ("plan",))
            yield Call(f"Budget.from_dict({kind})", partial(calque.Budget.from_dict, value), ("budget",))
        for name, read in readers.items() if kind not in TEXTS else ():
            yield Call(f"{name}({kind})", partial(read, value), (name.split(".")[0].lower(),))


def _files(folder: Path, q: Any, net: nn.Module, x: Tensor) -> Iterator[Call]:
    place = folder / "bad paths"
    place.mkdir(exist_ok=True)
    writers: dict[str, Callable[[str], object]] = {
        "save": lambda path: calque.save(q, path), "export_onnx": lambda path: calque.export_onnx(q, path),
        "Plan.save": lambda path: q.plan.save(path),
    }  # fmt: skip
    readers: dict[str, Callable[[str], object]] = {
        "load": lambda path: calque.load(path, net), "verify": lambda path: calque.verify(path, q, x),
        "OnnxModel": lambda path: calque.OnnxModel(path, q),
        "Plan.load": calque.Plan.load, "recipe": lambda path: calque.quantize(net, x, recipe=path),
        "latency": lambda path: calque.quantize(net, x, bits=("w8a8", "w4a4"), recipe="nearest",
            budget=calque.Budget(latency=(path, 4.0))),
    }  # fmt: skip
    for what, name in special(place, ".x"):
        named = (shortened(name) or "is a directory", "folder")
        for call, write in writers.items():
            if what not in ("missing", "line break", "dangling", "surrogate"):
                yield Call(f"{call}({what})", partial(write, name), named)
        for call, read in readers.items():
            yield Call(f"{call}({what})", partial(read, name), (*named, "latency", "recipe"))
        if what not in ("missing", "directory", "line break", "dangling", "no name", "home of nobody", "surrogate"):
            yield Call(f"run={what}", partial(calque.quantize, net, x, recipe="nearest", run=name), (*named, "run"))
    for suffix, reader, source in (
        (".q", "load", "run/q.safetensors"),
        (".onnx", "verify", "model.onnx"),
        (".onnx", "OnnxModel", "model.onnx"),
        (".toml", "Plan.load", "run/plan.toml"),
    ):
        for what, content in broken(".safetensors", (folder / source).read_bytes()):
            path = place / f"{what}{suffix}"
            path.write_bytes(content)
            if reader != "Plan.load" or not (what.startswith("cut") or what == "empty"):
                yield Call(f"{reader}({path.name})", partial(readers[reader], str(path)), (str(path),))


def _inputs(q: Any, net: nn.Module, base: dict[str, Any]) -> Iterator[Call]:
    structured = np.zeros(4, dtype=[("a", "f4")])
    more = {"objects": np.array([None]), "structured": structured, "complex": np.ones((4, 1, 8, 8), np.complex64),
        "words": np.array(["a"]),
            "dates": np.array(["2020"], "M8[Y]"), "recursive": _recursive()}  # fmt: skip
    for what, value in {**tensors(), **more}.items():
        names = ("calibration", "input")
        yield Call(f"quantize of {what}", partial(calque.quantize, **{**base, "calibration": value}), names)
        yield Call(f"verify on {what}", partial(calque.verify, "model.onnx", q, value), names)
        yield Call(
            f"latency_table of {what}",
            partial(calque.latency_table, q, value, bits=("w8a8",), progress=False),
            names,
        )


def _recursive() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _networks(q: Any, base: dict[str, Any]) -> Iterator[Call]:
    """Networks whose weights are no plain float32 numbers."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse": lambda w: w.to_sparse(), "meta": lambda w: w.to("meta"), "float8": lambda w: w.to(torch.float8_e4m3fn),
        "complex": lambda w: w.to(torch.complex64), "half": lambda w: w.half(), "double": lambda w: w.double(),
        "nan": lambda w: w * torch.nan,
        "infinite": lambda w: w + torch.inf, "nested": lambda w: torch.nested.nested_tensor(list(w)),
        "empty": lambda w: w[:, :0], "huge": lambda w: w * 1e38,
        "rows": lambda w: w.to_sparse_csr(), "whole": lambda w: (w * 9).long(),
        "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    }  # fmt: skip
    for what, change in changes.items():
        net = network()
        last: Any = net.get_submodule("3")
        last.weight = nn.Parameter(change(last.weight.detach()), requires_grad=False)
        yield Call(
            f"network of {what} weights",
            partial(calque.quantize, **{**base, "model": net}),
            ("weight", "network", "layer 3", "model"),
        )
    for what, net in {
        "a float network": network(),
        "a layer of q": q.graph_module,
    }.items():
        for name, call in {"save": lambda n: calque.save(n, "x.q"), "export_onnx": lambda n: calque.export_onnx(n, "x.onnx"),
                           "verify": lambda n: calque.verify("model.onnx", n, base["calibration"]),
                           "OnnxModel": lambda n: calque.OnnxModel("model.onnx", n),
                           "latency_table": lambda n: calque.latency_table(n, base["calibration"])}.items():  # fmt: skip
            yield Call(f"{name} of {what}", partial(call, net), ("quantize",))

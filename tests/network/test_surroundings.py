"""What stands around a call changes no code and is what it was afterwards; what cannot be neutral is named."""

import asyncio
import locale
import logging
import multiprocessing
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import calque
import networks
from calque.errors import SurroundingsError
from calque.network.surroundings import require_exact_products
from calque.quantized.model import QuantizedModel
from calque.recipe import SEQUENTIAL, AdaQuant

SHORT = replace(SEQUENTIAL, name="short", fit=AdaQuant(steps=8))  # gradient descent
X = networks.images(24, seed=0)
Codes = dict[str, tuple[Tensor, ...]]


def codes(q: QuantizedModel) -> Codes:
    return {name: (layer.codes, layer.scale, layer.bias) for name, layer in q.layers.items()}


def fitted(model: nn.Module | None = None) -> Codes:
    model = networks.seeded(networks.Residual()) if model is None else model
    return codes(calque.quantize(model, X, bits="w4a4", recipe=SHORT))


def same(a: Codes, b: Codes) -> bool:
    return a.keys() == b.keys() and all(torch.equal(*pair) for name in a for pair in zip(a[name], b[name], strict=True))


@pytest.fixture(scope="module")
def expected() -> Codes:
    return fitted()


def state() -> dict[str, Any]:
    """What a call could leave changed."""
    loggers = {
        name: logging.getLogger(name) for name in ("", "torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    }
    return {
        "filters": list(warnings.filters), "showwarning": warnings.showwarning,
        "levels": {name: logger.level for name, logger in loggers.items()},
        "log filters": [list(handler.filters) for logger in loggers.values() for handler in logger.handlers],
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "device": torch.empty(0).device,
        "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "anomaly": torch.is_anomaly_enabled(),
        "precision": torch.get_float32_matmul_precision(), "mha": torch.backends.mha.get_fastpath_enabled(),
        "kernels": (torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled()),
        "random": (hash(tuple(torch.get_rng_state().tolist())), random.getstate(), str(np.random.get_state())),
        "errstate": np.geterr(), "cwd": os.getcwd(), "locale": locale.setlocale(locale.LC_NUMERIC),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "modules": (nn.Module.__call__, nn.Module.__getattr__, nn.TransformerEncoder.forward, torch.autocast.__enter__),
        "compiling": (torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag),
    }  # fmt: skip


@contextmanager
def set_to(setter: Callable[[Any], object], value: object, before: object) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


class Counting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * 1 if func is torch.relu else func(*args, **(kwargs or {}))


class Doubling(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own hook
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.convolution.default else result


@contextmanager
def another_folder() -> Iterator[None]:
    before = os.getcwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", calque.errors.CalibrationWarning)  # ours, which the user asked to be errors
        yield


@contextmanager
def a_seed_of_the_users() -> Iterator[None]:
    before = torch.get_rng_state()
    torch.manual_seed(1234)
    try:
        yield
    finally:
        torch.set_rng_state(before)


NEUTRAL: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "default device meta": lambda: torch.device("meta"),
    "default device cpu": lambda: set_to(torch.set_default_device, "cpu", None),
    "deterministic": lambda: set_to(torch.use_deterministic_algorithms, True, False),
    "dynamo": lambda: torch._dynamo.config.patch(assume_static_by_default=False, capture_scalar_outputs=True),
    "fake tensors": FakeTensorMode,
    "a mode of functions": Counting,
    "a mode of operators": Doubling,
    "anomaly detection": torch.autograd.detect_anomaly,
    "a profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "numpy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": warnings_as_errors,
    "another folder": another_folder,
    "a seed": a_seed_of_the_users,
    "fast attention off": lambda: set_to(torch.backends.mha.set_fastpath_enabled, False, True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", NEUTRAL)
def test_codes_do_not_depend_on_what_stands_around_the_call(name: str, expected: Codes) -> None:
    model = networks.seeded(networks.Residual())

    with NEUTRAL[name]():
        before = state()
        found = fitted(model)
        after = state()

    assert same(found, expected)
    assert after == before


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", NEUTRAL)
def test_an_error_leaves_the_surroundings_as_they_were(name: str, expected: Codes) -> None:  # torch is imported whole
    def unable(net: networks.Net, x: Tensor) -> Tensor:
        return net.weight * x.sum() if x.sum() > 0 else x

    model = networks.Net(unable, weight=torch.ones(3))

    with NEUTRAL[name]():
        before = state()
        with pytest.raises(calque.errors.CaptureError):
            calque.quantize(model, X, recipe="nearest")
        after = state()

    assert after == before


def test_files_do_not_depend_on_what_stands_around_the_calls(tmp_path: Path) -> None:
    model = networks.small()
    q = calque.quantize(model, X, bits="w4a4", recipe="nearest")
    plain = calque.export_onnx(q, tmp_path / "plain.onnx").read_bytes()

    with (
        torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), torch.device("meta"),
        NEUTRAL["a mode of operators"](), warnings_as_errors(), np.errstate(all="raise"),
    ):  # fmt: skip
        calque.save(q, tmp_path / "q")
        loaded = calque.load(tmp_path / "q", model)
        calque.export_onnx(loaded, tmp_path / "k.onnx")
        found = calque.verify(tmp_path / "k.onnx", loaded, X)

    assert found.agreement == 1.0
    assert same(codes(loaded), codes(q))
    assert (tmp_path / "k.onnx").read_bytes() == plain


def in_vmap(call: Callable[[], object]) -> None:
    torch.func.vmap(lambda x: (call(), x)[1])(torch.ones(2))


def in_grad(call: Callable[[], object]) -> None:
    torch.func.grad(lambda x: (call(), x.sum())[1])(torch.ones(2))


def in_trace(call: Callable[[], object]) -> None:
    torch.jit.trace(lambda x: (call(), x + 1)[1], (torch.ones(2),), check_trace=False)  # type: ignore[no-untyped-call]


def in_float64(call: Callable[[], object]) -> None:
    with set_to(torch.set_default_dtype, torch.float64, torch.float32):
        call()


def in_float16(call: Callable[[], object]) -> None:
    with set_to(torch.set_default_dtype, torch.float16, torch.float32):
        call()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    ("around", "message"),
    [
        (in_float64, "default dtype is torch.float64.*set_default_dtype"),
        (in_float16, "default dtype is torch.float16.*set_default_dtype"),
        (in_vmap, "inside a transform of torch.func"),
        (in_grad, "inside a transform of torch.func"),
        (in_trace, "inside torch.jit.trace"),
    ],
)
def test_what_cannot_be_left_is_named(around: Callable[..., None], message: str, tmp_path: Path) -> None:
    model = networks.small()
    q = calque.quantize(model, X, recipe="nearest")
    calque.save(q, tmp_path / "q")
    file = calque.export_onnx(q, tmp_path / "k.onnx")
    before = state()

    for call in (
        lambda: calque.quantize(model, X, recipe="nearest"), lambda: calque.load(tmp_path / "q", model),
        lambda: calque.export_onnx(q, tmp_path / "other.onnx"), lambda: calque.verify(file, q, X),
    ):  # fmt: skip
        with pytest.raises(SurroundingsError, match=message):
            around(call)

    assert state() == before


def processor_has(monkeypatch: pytest.MonkeyPatch, products: bool) -> None:
    """Has torch say that the processor computes products of fewer bits than float32's, or that it does not."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: products)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: products)


@pytest.mark.parametrize(("precision", "products"), [("medium", "bf16"), ("high", "tf32")])
def test_products_of_fewer_bits_are_named_where_the_processor_has_them(
    precision: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor_has(monkeypatch, True)

    with (
        set_to(torch.set_float32_matmul_precision, precision, "highest"),
        pytest.raises(SurroundingsError, match=rf"{products} on cpu .*set_float32_matmul_precision.*highest"),
    ):
        fitted()


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_precision_that_the_processor_lacks_is_no_obstacle(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor_has(monkeypatch, False)

    with set_to(torch.set_float32_matmul_precision, precision, "highest"):
        require_exact_products(torch.device("cpu"))


def test_products_of_fewer_bits_are_named_on_an_accelerator() -> None:
    with (
        set_to(torch.set_float32_matmul_precision, "high", "highest"),
        pytest.raises(SurroundingsError, match=r"tf32 on cuda.*highest"),
    ):
        require_exact_products(torch.device("cuda"))


def test_a_function_under_torch_compile_may_quantize(expected: Codes) -> None:
    model = networks.seeded(networks.Residual())

    @torch.compile(backend="eager")
    def served(x: Tensor) -> tuple[Tensor, QuantizedModel]:
        y = x + 1
        q = calque.quantize(model, X, bits="w4a4", recipe=SHORT)
        return y * 2, q

    result, q = served(torch.ones(2))

    assert torch.equal(result, torch.full((2,), 4.0))
    assert same(codes(q), expected)


def test_a_thread_and_a_task_quantize_as_the_main_thread_does(expected: Codes) -> None:
    found: list[Codes] = []

    async def task() -> None:
        await asyncio.sleep(0)
        found.append(fitted())

    async def tasks() -> None:
        await asyncio.gather(task(), task())

    thread = threading.Thread(target=lambda: found.append(fitted()))
    thread.start()
    thread.join()
    asyncio.run(tasks())

    assert [same(each, expected) for each in found] == [True] * 3


def in_child(sender: Any) -> None:
    sender.send({name: tuple(part.tolist() for part in parts) for name, parts in fitted().items()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_quantizes_as_its_parent_does(expected: Codes) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_child, args=(sender,))
    child.start()
    found = receiver.recv() if receiver.poll(120) else None
    child.join(10)

    assert found == {name: tuple(part.tolist() for part in parts) for name, parts in expected.items()}


def test_a_calibration_of_fake_tensors_is_an_error() -> None:
    with FakeTensorMode():
        fake = torch.randn(8, 1, networks.SIDE, networks.SIDE)

    with pytest.raises(calque.errors.CalqueError, match="FakeTensor"):
        calque.quantize(networks.small(), fake)

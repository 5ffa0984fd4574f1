"""Threads of one process: each gets what it gets alone, and the process stays as it was."""

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import joblib
import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.errors import CaptureError
from calque.network.exclusive import exclusively, for_this_thread
from calque.network.rewrites.functional import silent_tracing
from calque.network.rewrites.regions import in_float32
from calque.network.rewrites.shortcuts import slow_attention, without_shortcuts
from calque.network.surroundings import undisturbed
from campaign.threads import campaign, images, network, tensors
from slow import slow

X = networks.images(16, seed=0)


@pytest.mark.parametrize("seed", [3, slow(7)])  # quantizing beside loading, quantizing, exporting and training
def test_threads_together_do_what_each_does_alone(seed: int) -> None:
    counts = campaign(2, seed=seed)

    assert counts.wrong == ()
    assert counts.tried == counts.right >= 6


HAS_FLAG = hasattr(
    torch.fx._symbolic_trace, "is_fx_symbolic_tracing"
)  # which a thread can be kept from; not in torch 2.8


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_other_threads_see_nothing_of_a_trace() -> None:
    seen: list[object] = []

    def look() -> tuple[object, ...]:
        encoder = nn.TransformerEncoder
        return (
            bool(torch.compiler.is_compiling()), bool(torch.compiler.is_exporting()),
            HAS_FLAG and torch.fx._symbolic_trace.is_fx_symbolic_tracing(), torch._C._get_mkldnn_enabled(),
            bool(torch.backends.mha.get_fastpath_enabled()), inner(torch.ones(1, 3)).tolist(), encoder.__name__,
        )  # fmt: skip

    def forward(net: networks.Net, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            seen.append(in_thread(look))
        y: Tensor = net.conv(x)
        return y

    inner = networks.seeded(nn.Linear(3, 2))
    before = look()

    network = calque.quantize(networks.Net(forward, conv=nn.Conv2d(1, 2, 3)), X, recipe="nearest")

    assert seen
    assert set(map(str, seen)) == {str(before)}
    assert list(network.layers) == ["conv"]  # and not what the other thread called meanwhile


def test_a_call_that_begins_while_another_thread_traces_takes_no_mode_of_it_away() -> None:
    traced, inside = threading.Event(), threading.Event()

    @undisturbed
    def call() -> None:
        inside.set()
        traced.wait(60)

    other = threading.Thread(target=call)

    def forward(net: networks.Net, x: Tensor) -> Tensor:
        if other.ident is None and torch.compiler.is_exporting():
            other.start()
            inside.wait(60)
        y: Tensor = net.conv(x)
        return y

    try:
        q = calque.quantize(networks.Net(forward, conv=nn.Conv2d(1, 2, 3)), X, recipe="nearest")
    finally:
        traced.set()
        other.join()

    assert list(q.layers) == ["conv"]


def test_patches_of_a_turn_are_for_its_thread_alone() -> None:
    shared = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval()
    x = torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    before = (nn.TransformerEncoder.forward, torch.autocast.__enter__)

    def lowered() -> tuple[torch.dtype, bool, bool]:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        shared(x, src_key_padding_mask=padding)
        return dtype, bool(torch.backends.mha.get_fastpath_enabled()), shared.use_nested_tensor

    with exclusively(), in_float32("cpu"), without_shortcuts(), slow_attention():
        mine, theirs = lowered(), in_thread(lowered)

    assert mine == (torch.float32, False, True)
    assert theirs == (torch.bfloat16, True, True)
    assert (nn.TransformerEncoder.forward, torch.autocast.__enter__) == before


@pytest.mark.skipif(not HAS_FLAG, reason="this torch refuses compiled functions in all threads while one traces")
def test_other_threads_compile_meanwhile_or_wait() -> None:
    served: list[Tensor] = []
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")

    def forward(net: networks.Net, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            served.append(in_thread(lambda: early(torch.ones(2))))  # compiled before: does not wait
        y: Tensor = net.conv(x)
        return y

    early = torch.compile(lambda x: x + 1, backend="eager")
    early(torch.ones(2))
    first = threading.Thread(target=lambda: served.append(compiled(torch.ones(2))))

    def progress(phase: str, done: int, total: int) -> None:
        if first.ident is None:
            first.start()

    model = networks.Net(forward, conv=nn.Conv2d(1, 2, 3))
    q = calque.quantize(model, X, recipe="nearest", progress=progress)
    first.join()

    assert list(q.layers) == ["conv"]
    assert {tuple(each.tolist()) for each in served} == {(2.0, 2.0), (3.0, 3.0)}


def test_a_patch_that_somebody_replaced_is_theirs() -> None:
    with exclusively():
        with for_this_thread(torch.backends.mha, "_is_fastpath_enabled", False):
            torch.backends.mha.set_fastpath_enabled(True)
        assert torch.backends.mha._is_fastpath_enabled is True


def test_a_turn_may_be_taken_again_by_its_thread_and_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), exclusively(), exclusively():
        _ = 1 / 0

    def enter() -> bool:
        with exclusively():
            return True

    assert in_thread(enter)


def test_warnings_and_logs_are_silent_in_this_thread_alone(caplog: pytest.LogCaptureFixture) -> None:
    def speak() -> None:
        warnings.warn("heard", UserWarning, stacklevel=1)
        logging.getLogger("torch.onnx.part").warning("heard")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        with silent_tracing():
            speak()
            assert not caught
            in_thread(speak)
        assert len(caught) == 1
        assert warnings.filters == filters

    assert len(caplog.records) == 1


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_filters_are_what_they_were_whoever_leaves_first(first: str) -> None:
    before = list(warnings.filters)
    ours, theirs = silent_tracing(), warnings.catch_warnings()

    order = (ours, theirs) if first == "ours" else (theirs, ours)
    for each in order:
        each.__enter__()
    for each in order:
        each.__exit__(None, None, None)

    assert list(warnings.filters) == before


def test_a_quantized_network_answers_in_threads_as_it_does_alone() -> None:
    q = calque.quantize(networks.seeded(networks.Residual()), X, bits="w4a4", recipe="nearest")
    batches = [networks.images(8, seed=seed) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}
    ready = threading.Barrier(4)

    def answer(index: int) -> None:
        ready.wait()
        with torch.no_grad():
            found[index] = [q(batches[index]) for _ in range(10)]  # the first of all makes its kernels

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with torch.no_grad():
        serial = [q(batch) for batch in batches]
    assert sorted(found) == [0, 1, 2, 3]
    assert all(torch.equal(each, serial[index]) for index in range(4) for each in found[index])


def test_a_callback_may_call_calque() -> None:
    inner: list[list[Tensor]] = []

    def progress(phase: str, done: int, total: int) -> None:
        if not inner:
            inner.append(in_thread(lambda: tensors(calque.quantize(network(0), images(0), recipe="nearest"))))

    calque.quantize(network(1), images(1), recipe="nearest", progress=progress)

    alone = tensors(calque.quantize(network(0), images(0), recipe="nearest"))
    assert all(map(torch.equal, inner[0], alone))


@contextmanager
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def test_workers_that_are_threads_leave_the_number_of_threads_alone() -> None:
    plain = tensors(calque.quantize(network(0), images(0), bits="w4a4", recipe="light", workers=1))
    seen: list[int] = []

    with two_threads(), joblib.parallel_backend("threading"):
        q = calque.quantize(
            network(0), images(0), bits="w4a4", recipe="light", workers=2,
            progress=lambda *_: seen.append(in_thread(torch.get_num_threads)),
        )  # fmt: skip
        after = (torch.get_num_threads(), in_thread(torch.get_num_threads))

    assert after == (2, 2)
    assert set(seen) == {2}
    assert all(map(torch.equal, tensors(q), plain))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_traces_quantizes_all_the_same() -> None:
    inside, done = threading.Event(), threading.Event()

    def forward(net: networks.Net, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and not inside.is_set():
            inside.set()
            done.wait(120)
        y: Tensor = net.conv(x)
        return y

    def child(sender: Any) -> None:
        found = tensors(calque.quantize(network(0), images(0), recipe="nearest"))
        sender.send(([part.tolist() for part in found], nn.Module.__call__.__qualname__))

    expected = tensors(calque.quantize(network(0), images(0), recipe="nearest"))
    name = nn.Module.__call__.__qualname__
    model = networks.Net(forward, conv=nn.Conv2d(1, 2, 3))
    tracing = threading.Thread(target=lambda: calque.quantize(model, X, recipe="nearest"))
    tracing.start()
    assert inside.wait(120)
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            child(sender)
        finally:
            os._exit(0)
    try:
        found = receiver.recv() if receiver.poll(120) else None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done.set()
        tracing.join()

    assert found == ([part.tolist() for part in expected], name)


def test_an_error_in_one_thread_is_no_other_threads() -> None:
    def unable(net: networks.Net, x: Tensor) -> Tensor:
        return net.weight * x if x.sum() > 0 else x

    def fail() -> str:
        with pytest.raises(CaptureError, match="cannot be captured"):
            calque.quantize(networks.Net(unable, weight=torch.ones(1)), X, recipe="nearest")
        return "named"

    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(fail())),
        threading.Thread(
            target=lambda: results.append(tensors(calque.quantize(network(0), images(0), recipe="nearest")))
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert "named" in results
    assert len(results) == 2

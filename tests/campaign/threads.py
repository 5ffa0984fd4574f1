"""Threads of one process that quantize, export, load, verify and infer at once, each compared with one thread alone.

python -m tests.campaign.threads 50
"""

import copy
import functools
import logging
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import calque
from calque.quantized.model import QuantizedModel
from calque.recipe import SEQUENTIAL, AdaQuant

SIDE = 8
SHORT = replace(SEQUENTIAL, name="short", fit=AdaQuant(steps=20))  # gradient descent
Result = list[Tensor]
Work = Callable[[], Result]


@dataclass(frozen=True)
class Counts:
    """How many pieces of work were tried, how many of them did what one thread alone does, and what the others did."""

    tried: int
    right: int
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"threads: {self.tried} tried, {self.right} right, {len(self.wrong)} wrong", *self.wrong])


class Attending(nn.Module):
    """Attention and a weight that two places share: what tracing patches."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(SIDE, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        self.head = nn.Linear(SIDE, 3)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x[:, 0]).mean(1)
        logits: Tensor = self.head(y) - self.again(y * y)
        return logits


@functools.cache
def _made(kind: int) -> nn.Module:
    net: nn.Module
    if kind == 0:
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    elif kind == 1:
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
        )
    else:
        net = Attending()
    generator = torch.Generator().manual_seed(kind)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return net.eval()


def network(kind: int) -> nn.Module:
    """A small network in eval mode: a copy, which draws nothing from torch's random state."""
    return copy.deepcopy(_made(kind))


def images(seed: int) -> Tensor:
    return torch.randn(24, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def tensors(q: QuantizedModel) -> Result:
    """All that quantizing decides; nothing of a network that was captured in parts, which none here is."""
    if isinstance(q, calque.PartlyQuantized):
        raise AssertionError(f"quantized in parts: {q.report.notes[0]}")
    return [part for layer in q.layers.values() for part in (layer.codes, layer.scale, layer.bias)]


def works(folder: Path) -> dict[str, Work]:
    """Pieces of work by name; what they read is made when each is first called, in one thread."""

    @functools.cache
    def made(kind: int) -> QuantizedModel:
        q = calque.quantize(network(kind), images(kind), recipe="nearest")
        calque.save(q, folder / f"{kind}.q")
        return q

    @functools.cache
    def exported(kind: int) -> Path:
        return calque.export_onnx(made(kind), folder / f"{kind}.onnx")

    def file(kind: int) -> Path:
        made(kind)
        return folder / f"{kind}.q"

    def fit(kind: int) -> Work:
        return lambda: tensors(calque.quantize(network(kind), images(kind), bits="w4a4", recipe=SHORT))

    def search() -> Result:
        budget = calque.Budget(size="30kB")
        q = calque.quantize(network(0), images(0), bits=("w8a8", "w4a4"), budget=budget, recipe="nearest")
        return [*tensors(q), *(torch.tensor(list(str(bits).encode())) for bits in q.plan.values())]

    def export(kind: int) -> Work:
        def run() -> Result:
            with tempfile.TemporaryDirectory() as own:
                return [torch.tensor(list(calque.export_onnx(made(kind), f"{own}/k.onnx").read_bytes()))]

        return run

    def load(kind: int) -> Work:
        return lambda: tensors(calque.load(file(kind), network(kind)))

    def verify() -> Result:
        found = calque.verify(exported(0), made(0), images(0), original=network(0))
        return [torch.tensor(found.agreement)]

    def infer(kind: int) -> Work:
        model = network(kind)

        def run() -> Result:
            with torch.no_grad():
                outputs = [(model(images(kind)), made(kind)(images(kind))) for _ in range(20)]
            first = outputs[0]
            if not all(torch.equal(a, b) for pair in outputs for a, b in zip(pair, first, strict=True)):
                raise AssertionError("the same network gave two results")
            return list(first)

        return run

    def train() -> Result:
        net = network(0).train()
        optimizer = torch.optim.Adam(net.parameters())
        for step in range(20):
            optimizer.zero_grad()
            net(images(step)).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    return {
        **{f"quantize {kind}": fit(kind) for kind in range(3)}, "quantize under a budget": search,
        **{f"export {kind}": export(kind) for kind in (0, 2)}, **{f"load {kind}": load(kind) for kind in (1, 2)},
        "verify": verify, **{f"infer {kind}": infer(kind) for kind in (1, 2)}, "train": train,
    }  # fmt: skip


def together(chosen: list[tuple[str, Work]], expected: dict[str, Result], catching: bool) -> list[str]:
    """What went wrong while each of these ran in a thread of its own.

    Args:
        catching: whether half of the threads keep warnings to themselves meanwhile.
    """
    wrong: list[str] = []
    ready = threading.Barrier(len(chosen))

    def run(name: str, work: Work, silent: bool) -> None:
        ready.wait()
        try:
            if silent:
                with warnings.catch_warnings():
                    found = work()
            else:
                found = work()
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            return
        pairs = zip(found, expected[name], strict=False)
        if len(found) != len(expected[name]) or not all(torch.equal(a, b) for a, b in pairs):
            wrong.append(f"{name}: another result than alone")

    threads = [
        threading.Thread(target=run, args=(name, work, catching and index % 2 == 0))
        for index, (name, work) in enumerate(chosen)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [f"{' + '.join(name for name, _ in chosen)}: {each}" for each in wrong]


def state() -> dict[str, object]:
    """What belongs to the whole process and must be what it was."""
    names = ("", "torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    return {
        "levels": [logging.getLogger(name).level for name in names],
        "log filters": [list(handler.filters) for name in names for handler in logging.getLogger(name).handlers],
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "stdout": sys.stdout,
        "random": hash(torch.get_rng_state().numpy().tobytes()), "kernels": torch._C._get_mkldnn_enabled(),
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "compiling": (torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag),
        "methods": (nn.Module.__call__, nn.Module.__getattr__, nn.TransformerEncoder.forward, torch.autocast.__enter__),
    }  # fmt: skip


def campaign(trials: int, *, threads: int = 3, seed: int = 0) -> Counts:
    """Runs `trials` random choices of work in two to `threads` threads; the process's state is one more piece of each."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="calque-threads-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = works(Path(folder))
        plans = [generator.choices(list(known), k=generator.randint(2, threads)) for _ in range(trials)]
        expected = {name: known[name]() for name in dict.fromkeys(name for names in plans for name in names)}
        before, filters = state(), list(warnings.filters)
        tried, wrong = 0, list[str]()
        for trial, names in enumerate(plans):
            chosen, catching = [(name, known[name]) for name in names], trial % 2 == 1
            wrong += together(chosen, expected, catching)
            after = state()
            wrong += [f"{name} is {after[name]}, was {was}" for name, was in before.items() if after[name] != was]
            if (
                not catching and warnings.filters != filters
            ):  # catch_warnings in threads may itself leave another's list
                wrong.append("warnings.filters changed")
            warnings.filters[:] = filters  # type: ignore[index]  # typed as a sequence; it is a list
            tried += len(chosen) + 1
    return Counts(tried, tried - len(wrong), tuple(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(campaign(int(sys.argv[1]) if len(sys.argv) > 1 else 50))

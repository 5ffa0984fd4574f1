"""What a bug report needs: versions, processor, runtimes, and whether calque works here from a network to a checked file."""

import getpass
import importlib
import json
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from calque.cli.machine import Machine, this_machine
from calque.run.extras import EXTRAS, import_extra, pip_line
from calque.run.files import temporary_folder

# Packages that calque needs, and what is imported of them.
REQUIRED = {
    "torch": "torch", "numpy": "numpy", "scipy": "scipy", "onnx": "onnx", "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime", "safetensors": "safetensors", "joblib": "joblib", "typer": "typer", "rich": "rich",
}  # fmt: skip
ROWS, WIDTH, CLASSES = 32, 16, 4  # of the network that is tried
LONGEST_REASON = 300  # characters of what an error says


@dataclass(frozen=True, slots=True)
class Package:
    """A package: what is installed, and whether it can be imported.

    Attributes:
        version: "" where it is not installed.
        problem: why it cannot be imported, or cannot be used; "" where nothing is known.
        extra: the line that installs it, of a package that calque does without; "" of one that it needs.
    """

    name: str
    version: str
    problem: str
    extra: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found here. No text in it has the user's name or home.

    Attributes:
        calque, python: versions.
        packages: those that calque needs, then the extras.
        threads: that torch computes with; None where it cannot be asked.
        devices: of torch, besides the processor.
        runtimes: what executes files -> its providers or devices.
        saturates: whether sums of uint8 x int8 products stop at 16 bits in a default session of ONNX Runtime; None where it
            cannot be asked.
        trial: what became of a network of two layers: quantized, exported, verified.
        works: whether all of that did.
    """

    calque: str
    python: str
    machine: Machine
    packages: tuple[Package, ...]
    threads: int | None
    devices: tuple[str, ...]
    runtimes: dict[str, tuple[str, ...]]
    saturates: bool | None
    trial: str
    works: bool

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        machine = self.machine
        flags = "not told by this system" if machine.features is None else ", ".join(machine.features) or "none known"
        memory = "not told by this system" if machine.memory is None else f"{machine.memory / 2**30:.1f} GiB"
        threads = "unknown" if self.threads is None else str(self.threads)
        rows = {
            "calque": f"{self.calque}, which {'works' if self.works else 'does not work'} here",
            "Python": self.python, "system": machine.system,
            "processor": machine.processor, "its features": flags, "uint8 x int8": SUMS[self.saturates],
            "cores": f"{machine.usable_cores} of {machine.cores} for this process, {threads} threads of torch",
            "memory": memory, "GPU": ", ".join(self.devices) or "none that torch can use",
            **{package.name: _state(package) for package in self.packages},
            **{f"{name} runs on": ", ".join(found) for name, found in self.runtimes.items()},
            "trial": self.trial,
        }  # fmt: skip
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


SUMS = {
    True: "stop at 16 bits in default sessions of ONNX Runtime: no VNNI (docs: Deploy)",
    False: "exact in default sessions of ONNX Runtime",
    None: "unknown, as ONNX Runtime cannot be asked",
}


def diagnose() -> Diagnosis:
    """What is installed, what the machine is, and whether calque works here; nothing is raised for what is missing."""
    packages = [_package(name, module) for name, module in REQUIRED.items()]
    packages += [_package(each.package, each.module, pip_line(name)) for name, each in EXTRAS.items()]
    usable = {package.name for package in packages if package.version and not package.problem}
    problem, agreement = _asked(_try_out)
    trial = f"fails: {problem}" if problem else f"two layers quantized, exported and verified: {agreement}"
    return Diagnosis(
        version("calque"), f"{platform.python_version()} ({platform.python_implementation()}, {_environment()})",
        this_machine(), tuple(packages), _asked(_threads)[1] if "torch" in usable else None,
        tuple(_asked(_devices)[1] or ()) if "torch" in usable else (),
        {name: tuple(_asked(ask)[1] or ()) for name, ask in RUNTIMES.items() if name in usable},
        _asked(_saturates)[1] if "onnxruntime" in usable else None, trial, not problem,
    )  # fmt: skip


def _state(package: Package) -> str:
    if package.problem:
        return f"{package.version or 'unknown version'}, which cannot be imported: {package.problem}"
    if package.version:
        return package.version
    return f"not installed: {package.extra or f'pip install {package.name}'}"


def _package(name: str, module: str, extra: str = "") -> Package:
    try:
        found = version(name)
    except PackageNotFoundError:
        found = ""
    problem, _ = _asked(lambda: importlib.import_module(module)) if found else ("", None)
    return Package(name, found, problem, extra)


def _asked(question: Callable[[], Any]) -> tuple[str, Any]:
    """Why there is no answer, or "", and the answer."""
    try:
        return "", question()
    except Exception as error:  # whatever a broken installation raises: it is what is looked for
        return without_names(f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]), None


def without_names(text: str) -> str:
    """The text without the user's home and name, as it may become public."""
    for home in {str(Path.home()), str(Path.home().resolve())} - {"/"}:
        text = text.replace(home, "~")
    try:
        user = re.escape(getpass.getuser())
    except (KeyError, OSError):  # a container without users
        return text
    return re.sub(rf"(?<=[/\\-]){user}(?=[/\\]|$)", "user", text)


def _environment() -> str:
    if (Path(sys.prefix) / "conda-meta").is_dir():
        return "conda"
    return "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _devices() -> list[str]:
    """What torch can compute on besides the processor, and what it was built for where that finds nothing."""
    import torch

    if torch.cuda.is_available():
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return [
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {kind}"
            for found in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    return ["mps"] if torch.backends.mps.is_available() else []


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _openvino_devices() -> list[str]:
    return list(import_extra("openvino").Core().available_devices)


RUNTIMES: dict[str, Callable[[], list[str]]] = {"onnxruntime": _providers, "openvino": _openvino_devices}


def _saturates() -> bool:
    from calque.shipping.saturation import saturates

    return saturates("onnxruntime")


def _try_out() -> str:
    """Quantizes, exports and verifies a network of two layers; the agreement in words."""
    import torch
    from torch import nn

    from calque.pipeline.quantize import quantize
    from calque.shipping.onnx import export_onnx
    from calque.shipping.verify import verify

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global state
        torch.random.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)).eval()
    inputs = torch.randn(ROWS, WIDTH, generator=generator)
    with temporary_folder() as folder:
        q = quantize(net, inputs, bits="w8a8", recipe="nearest", progress=False)
        found = verify(export_onnx(q, folder / "model.onnx"), q, inputs)
    return f"{found.agreement_exact:.0%} of {found.inputs} outputs are the exact evaluation's in ONNX Runtime"

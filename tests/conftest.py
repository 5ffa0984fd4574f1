"""Fixtures that several files share; each is made once."""

import functools
from pathlib import Path
from typing import Any

import pytest
import pytest_randomly
import torch
from hypothesis import settings
from torch import Tensor

import calque
import networks
from calque.quantized.model import QuantizedModel

# qonnx registers a hook that prints at every test; what a test captures would begin with it.
pytest_randomly.entrypoint_reseeds = []

# An example's time says how busy or old the machine is, not whether the code is right.
settings.register_profile("calque", deadline=None)
settings.load_profile("calque")

# The networks are tiny: more threads only wait for each other, 20 times as long on a busy machine.
torch.set_num_threads(1)


def parse_translations_once() -> None:
    """Lets each export begin with a copy of what torch knows of ONNX; it would parse onnxscript's 500 functions every time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parsed = functools.cache(ONNXRegistry.from_torchlib)

    def copied(*args: Any, **kwargs: Any) -> ONNXRegistry:
        known, registry = parsed(*args, **kwargs), ONNXRegistry()
        vars(registry).update(vars(known))
        registry.functions = {target: list(found) for target, found in known.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[method-assign]


parse_translations_once()


@pytest.fixture(scope="session")
def trained() -> networks.Residual:
    return networks.trained()


@pytest.fixture(scope="session")
def calibration() -> Tensor:
    return networks.stripes(128, seed=3)[0]


@pytest.fixture(scope="session")
def test_inputs() -> Tensor:
    return networks.stripes(256, seed=4)[0]


@pytest.fixture(scope="session")
def exported(
    trained: networks.Residual, calibration: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> networks.Exported:
    """`quantize` of the trained network, rounded to nearest, with other options, and its file; neither may be changed."""
    known: dict[str, tuple[QuantizedModel, Path]] = {}

    def of(**options: Any) -> tuple[QuantizedModel, Path]:
        key = str(sorted(options.items()))
        if key not in known:
            q = calque.quantize(trained, calibration, recipe="nearest", **options)
            known[key] = q, calque.export_onnx(q, tmp_path_factory.mktemp("exported") / "model.onnx")
        return known[key]

    return of

"""Accurate post-training quantization of PyTorch networks to 2-8 bits, shipped as verified ONNX."""

import importlib
import threading
from importlib.metadata import version
from typing import TYPE_CHECKING

from calque import errors

__version__ = version("calque")

__all__ = [
    "Budget",
    "Latency",
    "LatencyTable",
    "OnnxModel",
    "PartlyQuantized",
    "Plan",
    "Prices",
    "Recipe",
    "Report",
    "Verification",
    "errors",
    "export_onnx",
    "latency_table",
    "load",
    "quantize",
    "save",
    "verify",
]

# A name is imported when it is first asked for (PEP 562): what never exports does not wait for onnx, and what asks for
# the version does not even wait for torch.
_ROOMS = {
    "Budget": "allocation.budget",
    "Latency": "shipping.latency",
    "LatencyTable": "shipping.table",
    "OnnxModel": "shipping.module",
    "PartlyQuantized": "quantized.partly",
    "Plan": "grid.bits",
    "Prices": "quantized.prices",
    "Recipe": "recipe",
    "Report": "report",
    "Verification": "shipping.verification",
    "export_onnx": "shipping.onnx",
    "latency_table": "shipping.table",
    "load": "shipping.saved.quantized",
    "quantize": "pipeline.quantize",
    "save": "shipping.saved.quantized",
    "verify": "shipping.verify",
}

if TYPE_CHECKING:
    from calque.allocation.budget import Budget
    from calque.grid.bits import Plan
    from calque.pipeline.quantize import quantize
    from calque.quantized.partly import PartlyQuantized
    from calque.quantized.prices import Prices
    from calque.recipe import Recipe
    from calque.report import Report
    from calque.shipping.latency import Latency
    from calque.shipping.module import OnnxModel
    from calque.shipping.onnx import export_onnx
    from calque.shipping.saved import load, save
    from calque.shipping.table import LatencyTable, latency_table
    from calque.shipping.verification import Verification
    from calque.shipping.verify import verify
else:  # where a type checker saw it, every name would exist
    _importing = threading.RLock()  # torch's modules import each other: two threads would each find some half-made

    def __getattr__(name: str) -> object:
        """The public name, or the room of this name, which is imported now."""
        home = f"{__name__}.{_ROOMS.get(name, name)}"
        try:
            with _importing:
                found = importlib.import_module(home)
        except ModuleNotFoundError as error:
            if error.name != home or name in _ROOMS:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        if name in _ROOMS:
            found = globals()[name] = getattr(found, name)
        return found

    def __dir__() -> list[str]:
        return sorted([*__all__, "__version__"])

"""Accurate post-training quantization of PyTorch networks to 2-8 bits, shipped as verified ONNX."""

from importlib.metadata import version

from calque import errors
from calque.budget import Budget
from calque.export import Latency, LatencyTable, OnnxModel, Verification, export_onnx, latency_table, verify
from calque.partly import PartlyQuantized
from calque.pipeline import quantize
from calque.prices import Prices
from calque.recipe import Recipe
from calque.report import Report
from calque.spec import Plan
from calque.storage import load, save

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

"""Exported files, and what runtimes do with them."""

from calque.export.latency import Latency
from calque.export.module import OnnxModel
from calque.export.onnx import export_onnx
from calque.export.runtimes import Target
from calque.export.table import LatencyTable, latency_table
from calque.export.verification import Agreement, OutputAgreement, Verification
from calque.export.verify import count_kernels, run_onnx, verify

__all__ = [
    "Agreement",
    "Latency",
    "LatencyTable",
    "OnnxModel",
    "OutputAgreement",
    "Target",
    "Verification",
    "count_kernels",
    "export_onnx",
    "latency_table",
    "run_onnx",
    "verify",
]

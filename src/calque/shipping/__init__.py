"""Exported files, and what runtimes do with them."""

from calque.shipping.latency import Latency
from calque.shipping.module import OnnxModel
from calque.shipping.onnx import export_onnx
from calque.shipping.runtimes import Target
from calque.shipping.table import LatencyTable, latency_table
from calque.shipping.verification import Agreement, OutputAgreement, Verification
from calque.shipping.verify import count_kernels, run_onnx, verify

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

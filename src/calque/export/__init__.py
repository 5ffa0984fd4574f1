"""Files that standard runtimes execute, and their verification."""

from calque.export.onnx import export_onnx
from calque.export.verify import Agreement, Verification, count_kernels, run_onnx, verify

__all__ = ["Agreement", "Verification", "count_kernels", "export_onnx", "run_onnx", "verify"]

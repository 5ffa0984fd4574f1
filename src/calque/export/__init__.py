"""Files that standard runtimes execute, and their verification."""

from calque.export.onnx import export_onnx
from calque.export.verify import Agreement, Verification, run_onnx, verify

__all__ = ["Agreement", "Verification", "export_onnx", "run_onnx", "verify"]

"""Quantized networks as safetensors files: packed codes, and JSON in the metadata."""

from calque.shipping.saved.quantized import load, save

__all__ = ["load", "save"]

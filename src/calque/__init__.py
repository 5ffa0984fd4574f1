"""Accurate post-training quantization of PyTorch networks to 2-8 bits, shipped as verified ONNX."""

from calque.pipeline import quantize
from calque.recipe import Recipe
from calque.spec import Plan

__all__ = ["Plan", "Recipe", "quantize"]

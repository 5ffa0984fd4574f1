"""Grids in the network, and the quantized model."""

"""Factors of channels that move from a layer to its neighbour."""

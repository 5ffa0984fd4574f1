"""Codes, scales, zero points and biases that must not change by a bit while the code is moved around."""

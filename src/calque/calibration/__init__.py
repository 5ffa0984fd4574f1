"""Inputs, and what a network computes on them."""

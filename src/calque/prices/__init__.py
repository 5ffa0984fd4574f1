"""Prices of choices of bits, and the plans that keep a budget."""

from calque.prices.plans import Solution, pareto, priced, solve
from calque.prices.table import Prices

__all__ = ["Prices", "Solution", "pareto", "priced", "solve"]

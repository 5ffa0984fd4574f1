"""Bits under a budget: the integer program, and the plans that keep a budget by measured prices."""

from calque.allocation.plans import Solution, pareto, priced, solve
from calque.allocation.program import Allocation, Constraint, Costs, allocate

__all__ = ["Allocation", "Constraint", "Costs", "Solution", "allocate", "pareto", "priced", "solve"]

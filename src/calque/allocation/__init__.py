"""The integer program: one choice per layer, the least objective, every constraint kept."""

from calque.allocation.program import Allocation, Constraint, Costs, allocate

__all__ = ["Allocation", "Constraint", "Costs", "allocate"]

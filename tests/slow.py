"""Parameters of a test that `make test` leaves to `make test-all`."""

import pytest
from _pytest.mark import ParameterSet


def slow(*values: object) -> ParameterSet:
    """These arguments of a parametrized test, for the whole suite alone: neighbours of what each run tries."""
    return pytest.param(*values, marks=pytest.mark.slow)

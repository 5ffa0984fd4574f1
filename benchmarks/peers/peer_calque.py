"""calque itself, in the environment of the caller, measured as its peers are."""

import warnings
from functools import partial

import calque
from benchmarks.peers.adapter import COMMON, Method, Problem, Result, main
from calque.recipe import RECIPES


def quantize(problem: Problem, recipe: str) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", calque.errors.CalibrationWarning)
        model = calque.quantize(
            problem.model, problem.calibration, bits=problem.bits, recipe=recipe, placement="integer", seed=problem.seed
        )
    return Result(model, COMMON, f"recipe {recipe}, its defaults")


METHODS: dict[str, Method] = {name: partial(quantize, recipe=name) for name in RECIPES}

if __name__ == "__main__":
    main(("calque",), METHODS)

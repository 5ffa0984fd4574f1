"""calque itself, in the environment of the caller, measured as its peers are."""

import warnings
from functools import partial

import calque
from benchmarks.peers.adapter import COMMON, Method, Problem, Result, main
from benchmarks.peers.network import CANDIDATES, END_BITS, layers, parse, prepare
from calque.allocation.costs import CHANNEL_BYTES
from calque.recipe import RECIPES


def quantize(problem: Problem, recipe: str) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", calque.errors.CalibrationWarning)
        model = calque.quantize(
            problem.model, problem.calibration, bits=problem.bits, recipe=recipe, placement="integer", seed=problem.seed
        )
    return Result(model, COMMON, f"recipe {recipe}, its defaults")


def mixed(problem: Problem, recipe: str) -> Result:
    """Bits of weights by the integer program, in no larger file than with the same bits everywhere; activations' are fixed."""
    channels = sum(len(layer.weight) for layer in layers(prepare(problem.model)).values())
    activation, ends = parse(problem.bits).activation, f"w{END_BITS}a{END_BITS}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", calque.errors.CalibrationWarning)
        everywhere = calque.quantize(
            problem.model,
            problem.calibration,
            bits=problem.bits,
            first_last=ends,
            recipe="nearest",
            placement="integer",
        )
        limit = everywhere.report.file_size
        quantized = calque.quantize(
            problem.model, problem.calibration, bits=[f"w{weight}a{activation}" for weight in CANDIDATES],
            budget=calque.Budget(size=limit), first_last=ends,
            recipe=recipe, placement="integer", seed=problem.seed,
        )  # fmt: skip
    bits = "".join(layer.bits[1] for layer in quantized.report.layers[1:-1])
    settings = f"bits of weights by the integer program, recipe {recipe}: {bits}; a file of at most {limit:,} bytes"
    return Result(quantized, COMMON, settings, quantized.report.size - CHANNEL_BYTES * channels)


METHODS: dict[str, Method] = {name: partial(quantize, recipe=name) for name in RECIPES}
METHODS |= {f"mixed-{name}": partial(mixed, recipe=name) for name in ("light", "fast")}

if __name__ == "__main__":
    main(("calque",), METHODS)

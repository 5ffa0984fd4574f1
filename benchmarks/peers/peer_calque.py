"""calque itself, in the environment of the caller, measured as its peers are."""

import warnings
from functools import partial

import calque
from benchmarks.peers.adapter import COMMON, Method, Problem, Result, main
from benchmarks.peers.network import CANDIDATES, END_BITS, layers, parse, prepare, weight_bytes
from calque.costs import CHANNEL_BYTES
from calque.recipe import RECIPES


def quantize(problem: Problem, recipe: str) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", calque.errors.CalibrationWarning)
        model = calque.quantize(
            problem.model, problem.calibration, bits=problem.bits, recipe=recipe, placement="integer", seed=problem.seed
        )
    return Result(model, COMMON, f"recipe {recipe}, its defaults")


def mixed(problem: Problem, recipe: str) -> Result:
    """Bits of weights by the integer program, in no more bytes than the same bits everywhere take; activations' are fixed."""
    model = prepare(problem.model)
    limit, channels = weight_bytes(model, problem.bits), sum(len(layer.weight) for layer in layers(model).values())
    activation = parse(problem.bits).activation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", calque.errors.CalibrationWarning)
        quantized = calque.quantize(
            problem.model, problem.calibration, bits=[f"w{weight}a{activation}" for weight in CANDIDATES],
            budget=calque.Budget(size=limit + CHANNEL_BYTES * channels), first_last=f"w{END_BITS}a{END_BITS}",
            recipe=recipe, placement="integer", seed=problem.seed,
        )  # fmt: skip
    bits = "".join(layer.bits[1] for layer in quantized.report.layers[1:-1])
    settings = f"bits of weights by the integer program, recipe {recipe}: {bits}; at most {limit:,} bytes"
    return Result(quantized, COMMON, settings, quantized.report.size - CHANNEL_BYTES * channels)


METHODS: dict[str, Method] = {name: partial(quantize, recipe=name) for name in RECIPES}
METHODS |= {f"mixed-{name}": partial(mixed, recipe=name) for name in ("light", "fast")}

if __name__ == "__main__":
    main(("calque",), METHODS)

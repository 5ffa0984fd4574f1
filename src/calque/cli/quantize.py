"""`calque quantize`: a network and its inputs from the command line to the folder of a run."""

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer

from calque.cli.signals import shielded_workers
from calque.cli.terminal import advice, complain, notes
from calque.cli.words import ENTRY, Quiet, Seed, recipes
from calque.errors import CalibrationError
from calque.grid.bits import SHIPPED, Placement, Plan
from calque.run.files import remove_folder


def quantize_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="function that returns the network: my_package.my_module:build")],
    calibration: Annotated[Path, typer.Option(help="unlabelled inputs: .npy, .npz, .safetensors or .pt")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the run")],
    weights: Annotated[Path | None, typer.Option(help="state dict: .safetensors or .pt")] = None,
    bits: Annotated[
        str | None, typer.Option(help="w8a8 (default), w4, w4g32, ...; a comma list under a budget")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="TOML file with the bits of every layer")] = None,
    size: Annotated[
        str | None, typer.Option(help="budget of the exported file: a fraction of the float32 model, or 300kB")
    ] = None,
    bops: Annotated[str | None, typer.Option(help="budget of bit-operations: a fraction, or 3.5G")] = None,
    activation_memory: Annotated[
        str | None, typer.Option(help="budget of live activations: a fraction, or 300kB")
    ] = None,
    latency: Annotated[str | None, typer.Option(help="budget by your table: table.csv=4.0 (milliseconds)")] = None,
    max_loss: Annotated[float | None, typer.Option(help="dual form: the most that the loss may rise")] = None,
    minimize: Annotated[str | None, typer.Option(help="dual form: size, bops or latency")] = None,
    loss: Annotated[str | None, typer.Option(help="kl, mse or my_package.my_module:loss")] = None,
    override: Annotated[list[str] | None, typer.Option(help="pattern=bits or pattern=float; repeatable")] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"{', '.join(SHIPPED)} or a TOML file", autocompletion=recipes)
    ] = None,
    placement: Annotated[str, typer.Option(help="integer or inputs")] = "integer",
    first_last: Annotated[str, typer.Option(help="bits of the ends, auto or none")] = "auto",
    dynamic: Annotated[list[str] | None, typer.Option(help="axes that may change: x:2,3; repeatable")] = None,
    seed: Seed = 0,
    memory: Annotated[str, typer.Option(help="for values between operators; the rest goes to disk")] = "2GB",
    workers: Annotated[int | None, typer.Option(help="processes that fit layers side by side")] = None,
    device: Annotated[str | None, typer.Option(help="where to compute: cpu, cuda, ...")] = None,
    evaluate: Annotated[str | None, typer.Option(help="metric of a network: my_package.my_module:score")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was interrupted or killed")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run that is in the folder")] = False,
    quiet: Quiet = False,
) -> None:
    """Quantizes a network and writes the folder of the run; prints the report."""
    from calque.allocation.highs import own_output
    from calque.cli.folder import Run, claim_pieces, is_started, require_free, versions, write_run, write_start
    from calque.cli.inputs import (
        build_model,
        evaluate_model,
        parse_axes,
        parse_bits,
        parse_budget,
        parse_loss,
        parse_overrides,
    )
    from calque.cli.readers import load_calibration
    from calque.cli.weights import load_weights
    from calque.pipeline.options import find_device
    from calque.pipeline.quantize import quantize
    from calque.recipe import find_recipe

    require_free(output, resume=resume, overwrite=overwrite)
    network = build_model(model)
    inputs = load_calibration(calibration)
    if weights is None:
        complain("note", f"no --weights: {model} is trusted to return trained weights.")
    else:
        for note in load_weights(network, weights):
            complain("note", note)
    chosen = None if recipe is None else find_recipe(recipe)
    known_plan = None if plan is None else Plan.load(plan)
    overrides, axes = parse_overrides(override or []), parse_axes(dynamic or [])
    budget = parse_budget(size, bops, activation_memory, latency, max_loss, minimize)
    candidates = None if bits is None else parse_bits(bits, several=budget is not None)
    judge = parse_loss(loss)
    if device is not None:
        find_device(device)
    pieces = claim_pieces(output, overwrite=overwrite)
    arguments = [argument for argument in context.obj if argument not in ("--resume", "--overwrite")]
    with (
        advice(shlex.join([*_program(), *arguments, "--resume"]), lambda: is_started(output)),
        notes("calque.pipeline.quantize", quiet=quiet),
        shielded_workers(workers),
        own_output(),
    ):
        scores = {} if evaluate is None else {"float": evaluate_model(evaluate, network)}
        with _discarding(pieces, resume=resume):
            q = quantize(
                network, inputs, bits=candidates, budget=budget, plan=known_plan, override=overrides, recipe=chosen,
                placement=cast(Placement, placement),  # quantize checks it
                first_last=None if first_last == "none" else first_last, loss=judge, dynamic=axes, run=pieces,
                seed=seed, device=device, memory=memory, workers=workers, progress=False if quiet else None,
            )  # fmt: skip
        settings = Run(
            model, None if weights is None else str(weights.resolve()), str(calibration.resolve()), seed,
            shlex.join([ENTRY, *arguments]), scores, versions(), evaluate,
        )  # fmt: skip
        write_run(output, q, find_recipe(chosen), settings)
    if evaluate is not None:
        scores = {**scores, "quantized": evaluate_model(evaluate, q)}
        write_start(output, replace(settings, scores=scores))
    print(q.report)
    for name, score in scores.items():
        print(f"{name}: {score:.6g} ({evaluate})")


@contextmanager
def _discarding(pieces: Path, *, resume: bool) -> Iterator[None]:
    """Leaves no unfinished run behind where the weights or inputs are to blame: it could only fail again."""
    try:
        yield
    except CalibrationError:
        if not resume:
            remove_folder(pieces)
        raise


def _program() -> list[str]:
    """What starts this program again."""
    found = shutil.which(ENTRY)
    if found is not None and Path(sys.argv[0]).exists() and Path(sys.argv[0]).samefile(found):
        return [ENTRY]
    return [sys.executable, "-m", ENTRY]

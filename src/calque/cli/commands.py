"""The commands; each reads its arguments, calls the API and prints what it returns."""

import json
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, cast

import typer

from calque.allocation.highs import own_output
from calque.cli.export import export_command, verify_command
from calque.cli.folder import (
    Run,
    claim,
    claim_pieces,
    is_started,
    read_report,
    read_run,
    require_free,
    versions,
    write_run,
    write_start,
)
from calque.cli.inputs import (
    build_model,
    evaluate_model,
    parse_axes,
    parse_bits,
    parse_budget,
    parse_loss,
    parse_overrides,
)
from calque.cli.latency import latency_command
from calque.cli.plan import plan_command
from calque.cli.readers import load_calibration
from calque.cli.signals import EndedError, ending_signals, shielded_workers
from calque.cli.terminal import advice, complain, notes, one_line, visible_warnings
from calque.cli.weights import load_weights
from calque.demo import BITS, DemoRow, run_demo
from calque.errors import CalibrationError, CalqueError
from calque.fields import shown
from calque.files import LONGEST_PATH, remove_folder, temporary_folder, write_whole
from calque.options import find_device
from calque.pipeline import quantize
from calque.progress import Phase, watched
from calque.recipe import RECIPES, find_recipe
from calque.report import table_lines
from calque.spec import Placement, Plan

MISSPELT = 2  # the exit code of a command that cannot be read
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended
DEMO = "demo.json"  # the file that tells a demonstration's folder from others
DEMO_PHASES = (  # about the seconds of each, the capture's among them
    Phase("train", (4.0,)),
    *(Phase(f"{bits} fit", (seconds,)) for bits in BITS for seconds in (2.0, 5.0)),
)
ENTRY = "calque"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Accurate post-training quantization to 2-8 bits.",
)

Folder = Annotated[Path, typer.Argument(help="the folder of a run", metavar="RUN")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]
Seed = Annotated[
    int,
    typer.Option(help="of everything random; the same seed gives the same codes, but for recipes bounded in minutes"),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{ENTRY} {version('calque')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command("demo")
def demo_command(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder that keeps the files")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Trains, quantizes, exports and verifies a small network on handwritten digits; prints one table."""
    started = time.perf_counter()
    with temporary_folder() as temporary:
        folder = temporary if output is None else output
        claim(folder, (DEMO,))
        write_whole(folder / DEMO, json.dumps({"seed": seed, "versions": versions()}, indent=1).encode())
        with watched(False if quiet else None) as watch:
            watch.expect(DEMO_PHASES)
            rows = run_demo(folder, seed=seed, progress=watch)
    for line in _demo_table(rows):
        print(line)
    kept = "" if output is None else f"; the files are in {output}"
    print(f"{time.perf_counter() - started:.0f} s in all, training included{kept}")


def _demo_table(rows: list[DemoRow]) -> list[str]:
    headings = (
        "bits", "bytes", "of float", "ONNX bytes", "accuracy: float", "nearest", "fast", "file",
        "file = simulated", "file = exact", "seconds",
    )  # fmt: skip
    cells = [
        (
            row.bits, f"{row.size:,}", f"{row.size / row.float_size:.1%}", f"{row.file_bytes:,}",
            *map("{:.2%}".format, (row.float_accuracy, row.nearest, row.fast, row.exported)),
            *map("{:.2%}".format, (row.agreement, row.agreement_exact)),
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    return table_lines(headings, cells)


@app.command("quantize")
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
    recipe: Annotated[str | None, typer.Option(help=f"{', '.join(RECIPES)} or a TOML file")] = None,
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
        notes("calque.pipeline", quiet=quiet),
        shielded_workers(workers),
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


app.command("export")(export_command)
app.command("verify")(verify_command)


@app.command("recipe")
def recipe_command(
    name: Annotated[str, typer.Argument(help=f"{', '.join(RECIPES)} or a TOML file")],
) -> None:
    """Prints a recipe as TOML, to be edited and passed back with --recipe."""
    print(find_recipe(name).to_toml(), end="")


app.command("plan")(plan_command)
app.command("latency")(latency_command)


@app.command("report")
def report_command(run: Folder) -> None:
    """Prints what a run decided and gained."""
    print(read_report(run))
    for name, score in read_run(run).scores.items():
        print(f"{name}: {score:.6g}")


def run(arguments: list[str]) -> int:
    """Runs one command; its exit code: 2 for one that is misspelt. Every error is one line on stderr."""
    command = typer.main.get_command(app)
    unfit = next((text for text in arguments if "\0" in text or len(text) > LONGEST_PATH), None)
    if unfit is not None:
        problem = "a NUL in it" if "\0" in unfit else f"{len(unfit):,} characters; at most {LONGEST_PATH:,} are taken"
        complain("error", f"an argument has {problem}: {shown(unfit)}.")
        return MISSPELT
    try:
        with visible_warnings(), own_output():
            code = command.main(arguments or ["--help"], prog_name=ENTRY, standalone_mode=False, obj=arguments)
    except (KeyboardInterrupt, typer.Abort):
        complain("error", "interrupted")
        return INTERRUPTED
    except EndedError as error:
        complain("error", str(error))
        return error.code
    except Exception as error:
        expected = isinstance(error, (CalqueError, OSError)) or hasattr(error, "format_message")
        complain("error", one_line(error) if expected else f"unexpected {_trace(error)}")
        return int(getattr(error, "exit_code", 1))  # typer's usage errors have one: 2
    return code if isinstance(code, int) else 0


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


def _trace(error: Exception) -> str:
    """An error that nobody foresaw, with the place where it was raised: what a bug report needs."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.filename}:{frame.lineno}: {one_line(error)}"


def main() -> None:
    """The command `calque`."""
    with ending_signals():
        code = run(sys.argv[1:])
    sys.exit(code)

"""The commands; each reads its arguments, calls the API and prints what it returns."""

import json
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calque.cli.doctor import doctor_command
from calque.cli.export import export_command, verify_command
from calque.cli.latency import latency_command
from calque.cli.plan import plan_command
from calque.cli.quantize import quantize_command
from calque.cli.signals import EndedError, ending_signals
from calque.cli.terminal import complain, one_line, visible_warnings
from calque.cli.words import ENTRY, Folder, Quiet, Seed, recipes
from calque.errors import CalqueError
from calque.grid.bits import SHIPPED
from calque.run.fields import shown
from calque.run.files import LONGEST_PATH, temporary_folder, write_whole
from calque.run.progress import Phase, watched

if TYPE_CHECKING:
    from calque.cli.demo import DemoRow

MISSPELT = 2  # the exit code of a command that cannot be read
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended
DEMO = "demo.json"  # the file that tells a demonstration's folder from others

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Accurate post-training quantization to 2-8 bits.",
)


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
    from calque.cli.demo import BITS, run_demo
    from calque.cli.folder import claim, versions

    phases = [  # about the seconds of each, the capture's among them
        Phase("train", (4.0,)),
        *(Phase(f"{bits} fit", (seconds,)) for bits in BITS for seconds in (2.0, 5.0)),
    ]
    started = time.perf_counter()
    with temporary_folder() as temporary:
        folder = temporary if output is None else output
        claim(folder, (DEMO,))
        write_whole(folder / DEMO, json.dumps({"seed": seed, "versions": versions()}, indent=1).encode())
        with watched(False if quiet else None) as watch:
            watch.expect(phases)
            rows = run_demo(folder, seed=seed, progress=watch)
    for line in _demo_table(rows):
        print(line)
    kept = "" if output is None else f"; the files are in {output}"
    print(f"{time.perf_counter() - started:.0f} s in all, training included{kept}")


def _demo_table(rows: "list[DemoRow]") -> list[str]:
    from calque.report import table_lines

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


app.command("quantize")(quantize_command)
app.command("export")(export_command)
app.command("verify")(verify_command)


@app.command("recipe")
def recipe_command(
    name: Annotated[str, typer.Argument(help=f"{', '.join(SHIPPED)} or a TOML file", autocompletion=recipes)],
) -> None:
    """Prints a recipe as TOML, to be edited and passed back with --recipe."""
    from calque.recipe import recipe_text

    print(recipe_text(name), end="")


app.command("plan")(plan_command)
app.command("latency")(latency_command)
app.command("doctor")(doctor_command)


@app.command("report")
def report_command(run: Folder) -> None:
    """Prints what a run decided and gained."""
    from calque.cli.folder import read_report, read_run

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
        with visible_warnings():
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


def _trace(error: Exception) -> str:
    """An error that nobody foresaw, with the place where it was raised: what a bug report needs."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.filename}:{frame.lineno}: {one_line(error)}"


def main() -> None:
    """The command `calque`."""
    with ending_signals():
        code = run(sys.argv[1:])
    sys.exit(code)

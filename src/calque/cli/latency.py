"""`calque latency`: a table of latencies, measured on this processor, that a budget reads."""

from pathlib import Path
from typing import Annotated

import typer

from calque.cli.words import Folder, Trust


def latency_command(
    run: Folder,
    output: Annotated[Path, typer.Option("-o", "--output", help="the CSV file to write", metavar="TABLE.CSV")],
    bits: Annotated[
        str | None,
        typer.Option(help="comma list of choices; by default those of the run's budget, or w8a8,w4a8,w4a4,w2a4"),
    ] = None,
    threads: Annotated[int, typer.Option(help="of a session")] = 1,
    batch: Annotated[int, typer.Option(help="rows of an input")] = 1,
    inputs: Annotated[
        Path | None,
        typer.Option(help="inputs that give the sizes, as --calibration; the run's own by default", metavar="FILE"),
    ] = None,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
) -> None:
    """Times each layer of a run's network at each choice of bits in ONNX Runtime, for a budget: --latency TABLE.CSV=4.0."""
    from calque.cli.curve import read_prices
    from calque.cli.folder import NETWORK, PRICES, trusted_run
    from calque.cli.inputs import InputError, build_model, parse_bits
    from calque.cli.readers import load_calibration
    from calque.shipping.saved import load
    from calque.shipping.table import latency_table

    settings = trusted_run(run, trust=trust)
    if not output.parent.is_dir():
        raise InputError(f"the folder {output.parent} does not exist. Make it first.")
    q = load(run / NETWORK, build_model(settings.model))
    choices = None if bits is None else parse_bits(bits, several=True)
    if bits is None and (run / PRICES).is_file():
        choices = tuple(dict.fromkeys(text for row in read_prices(run).choices for text in row))
    given = load_calibration(Path(settings.calibration) if inputs is None else inputs)
    shown = False if quiet else None
    table = latency_table(q, given, bits=choices, threads=threads, batch=batch, progress=shown)
    table.save(output)
    print(table)
    print(f"{output}: --latency {output}=MILLISECONDS limits the layers' sum")

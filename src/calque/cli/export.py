"""`calque export` and `calque verify`: a run's file, and what a runtime does with it."""

from pathlib import Path
from typing import Annotated, cast

import typer
from torch import nn

from calque.cli.folder import NETWORK, trusted_run
from calque.cli.inputs import build_model, load_calibration, load_weights
from calque.errors import VerificationError
from calque.export import Target, Verification, export_onnx, verify
from calque.export.verify import BOUND
from calque.model import QuantizedModel
from calque.storage import load

Folder = Annotated[Path, typer.Argument(help="the folder of a run", metavar="RUN")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="import the function that run.json names, although others could have written its name"
    ),
]
Runtime = Annotated[str, typer.Option("--target", help="onnxruntime, openvino or qonnx")]


def export_command(
    run: Folder,
    path: Annotated[Path, typer.Argument(help="the file to write", metavar="MODEL.ONNX")],
    check: Annotated[bool, typer.Option("--verify", help="run the file on the calibration inputs")] = False,
    target: Runtime = "onnxruntime",
    trust: Trust = False,
) -> None:
    """Exports the network of a run: ONNX for onnxruntime and openvino, which read the same file, or qonnx."""
    settings = trusted_run(run, trust=trust)
    q = load(run / NETWORK, build_model(settings.model))
    export_onnx(q, path, target=cast(Target, target))  # which checks it
    print(f"{path}: {path.stat().st_size:,} bytes")
    if check:
        _verify(path, q, load_calibration(Path(settings.calibration)), target, BOUND, None, as_json=False)


def verify_command(
    path: Annotated[Path, typer.Argument(help="the exported file", metavar="MODEL.ONNX")],
    run: Folder,
    inputs: Annotated[
        Path | None,
        typer.Option(help="inputs to compare on, as --calibration; the run's own by default", metavar="FILE"),
    ] = None,
    target: Runtime = "onnxruntime",
    bound: Annotated[float, typer.Option(help="least share of outputs that agree with the exact evaluation")] = BOUND,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False,
    trust: Trust = False,
) -> None:
    """Runs an exported file and compares it with its run: agreement, kernels, bytes, latency beside the float network."""
    settings = trusted_run(run, trust=trust)
    original = build_model(settings.model)
    q = load(run / NETWORK, original)
    if settings.weights is not None:
        load_weights(original, Path(settings.weights))
    given = load_calibration(Path(settings.calibration) if inputs is None else inputs)
    _verify(path, q, given, target, bound, original, as_json=as_json)


def _verify(
    path: Path,
    q: QuantizedModel,
    inputs: object,
    target: str,
    bound: float,
    original: nn.Module | None,
    *,
    as_json: bool,
) -> None:
    """Prints the figures, those of a file below the bound too, before that ends in an error."""
    try:
        found = verify(path, q, inputs, target=cast(Target, target), bound=bound, original=original)
    except VerificationError as error:
        if isinstance(error.verification, Verification):
            print(error.verification.to_json() if as_json else error.verification)
        raise
    print(found.to_json() if as_json else found)

"""`calque export` and `calque verify`: a run's file, and what a runtime does with it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from calque.cli.terminal import notes
from calque.cli.words import Folder, Runtime, Trust
from calque.grid.bits import BOUND

if TYPE_CHECKING:
    from calque.shipping.runtimes import Target

Metric = Annotated[
    str | None,
    typer.Option(
        "--evaluate", help="score the file too, by my_package.my_module:score; with --verify that of the run by default"
    ),
]


def export_command(
    run: Folder,
    path: Annotated[Path, typer.Argument(help="the file to write", metavar="MODEL.ONNX")],
    check: Annotated[bool, typer.Option("--verify", help="run the file on the calibration inputs")] = False,
    target: Runtime = "onnxruntime",
    input_names: Annotated[
        str | None, typer.Option(help="names of the inputs in the file, by position: a,b", metavar="NAMES")
    ] = None,
    output_names: Annotated[str | None, typer.Option(help="names of the outputs, as well", metavar="NAMES")] = None,
    evaluate: Metric = None,
    trust: Trust = False,
) -> None:
    """Exports the network of a run: ONNX for onnxruntime and openvino, which read the same file, or qonnx."""
    from calque.cli.folder import NETWORK, trusted_run
    from calque.cli.inputs import build_model
    from calque.cli.readers import load_calibration
    from calque.cli.scores import checked, print_scores, scored
    from calque.shipping.onnx import export_onnx
    from calque.shipping.saved import load

    settings = trusted_run(run, trust=trust)
    original = build_model(settings.model)
    q = load(run / NETWORK, original)
    names = {"input_names": _names(input_names), "output_names": _names(output_names)}
    with notes("calque.shipping.onnx"):
        export_onnx(q, path, target=cast("Target", target), **names)  # which checks all of them
    print(f"{path}: {path.stat().st_size:,} bytes")
    failure = None
    if check:
        inputs = load_calibration(Path(settings.calibration))
        found, failure = checked(path, q, inputs, target=target, bound=BOUND, original=None)
        print(found)
    metric = evaluate or (settings.evaluate if check else None)
    if metric is not None:
        print_scores(scored(run, metric, path, q, original, target), metric)
    if failure is not None:
        raise failure


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


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
    evaluate: Metric = None,
    trust: Trust = False,
) -> None:
    """Runs an exported file and compares it with its run: agreement, kernels, bytes, latency, and your metric if it has one."""
    from calque.cli.folder import NETWORK, trusted_run
    from calque.cli.inputs import build_model
    from calque.cli.readers import load_calibration
    from calque.cli.scores import checked, load_original_, print_scores, scored
    from calque.shipping.saved import load

    settings = trusted_run(run, trust=trust)
    original = build_model(settings.model)
    q = load(run / NETWORK, original)
    load_original_(original, settings)
    given = load_calibration(Path(settings.calibration) if inputs is None else inputs)
    found, failure = checked(path, q, given, target=target, bound=bound, original=original)
    metric = evaluate or settings.evaluate
    scores = {} if metric is None else scored(run, metric, path, q, original, target)
    if as_json:
        figures = json.loads(found.to_json())
        print(json.dumps({**figures, "scores": scores} if scores else figures))
    else:
        print(found)
        print_scores(scores, metric)
    if failure is not None:
        raise failure

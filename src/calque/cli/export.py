"""`calque export` and `calque verify`: a run's file, and what a runtime does with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer
from torch import nn

from calque.cli.folder import NETWORK, Run, read_run, trusted_run, write_start
from calque.cli.inputs import build_model, evaluate_model
from calque.cli.readers import load_calibration
from calque.cli.terminal import notes
from calque.cli.weights import load_weights
from calque.errors import VerificationError
from calque.export import OnnxModel, Target, Verification, export_onnx, verify
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
    settings = trusted_run(run, trust=trust)
    original = build_model(settings.model)
    q = load(run / NETWORK, original)
    names = {"input_names": _names(input_names), "output_names": _names(output_names)}
    with notes("calque.export.onnx"):
        export_onnx(q, path, target=cast(Target, target), **names)  # which checks all of them
    print(f"{path}: {path.stat().st_size:,} bytes")
    failure = None
    if check:
        inputs = load_calibration(Path(settings.calibration))
        found, failure = _checked(path, q, inputs, target=target, bound=BOUND, original=None)
        print(found)
    metric = evaluate or (settings.evaluate if check else None)
    if metric is not None:
        _print_scores(_scored(run, metric, path, q, original, target), metric)
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
    settings = trusted_run(run, trust=trust)
    original = build_model(settings.model)
    q = load(run / NETWORK, original)
    _load(original, settings)
    given = load_calibration(Path(settings.calibration) if inputs is None else inputs)
    found, failure = _checked(path, q, given, target=target, bound=bound, original=original)
    metric = evaluate or settings.evaluate
    scores = {} if metric is None else _scored(run, metric, path, q, original, target)
    if as_json:
        figures = json.loads(found.to_json())
        print(json.dumps({**figures, "scores": scores} if scores else figures))
    else:
        print(found)
        _print_scores(scores, metric)
    if failure is not None:
        raise failure


def _load(original: nn.Module, settings: Run) -> None:
    if settings.weights is not None:
        load_weights(original, Path(settings.weights))


def _checked(
    path: Path, q: QuantizedModel, inputs: object, *, target: str, bound: float, original: nn.Module | None
) -> tuple[Verification, VerificationError | None]:
    """The figures, those of a file below the bound too, and the error that this is."""
    try:
        return verify(path, q, inputs, target=cast(Target, target), bound=bound, original=original), None
    except VerificationError as error:
        if not isinstance(error.verification, Verification):
            raise
        return error.verification, error


def _scored(
    run: Path, metric: str, path: Path, q: QuantizedModel, original: nn.Module, target: str
) -> dict[str, float]:
    """The user's metric of the float network, the quantized one and the file, which the run keeps.

    What the run knows of the same metric is not measured again, but for the file.
    """
    settings = read_run(run)
    scores = dict(settings.scores) if metric == settings.evaluate else {}
    if "float" not in scores:
        _load(original, settings)
        scores["float"] = evaluate_model(metric, original.eval())
    if "quantized" not in scores:
        scores["quantized"] = evaluate_model(metric, q)
    name = "file" if target == "onnxruntime" else f"file in {target}"
    scores[name] = evaluate_model(metric, OnnxModel(path, q, target=cast(Target, target)))
    write_start(run, replace(settings, evaluate=metric, scores=scores))
    return scores


def _print_scores(scores: dict[str, float], metric: str | None) -> None:
    for name, score in scores.items():
        print(f"{name}: {score:.6g} ({metric})")

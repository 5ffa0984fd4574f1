"""What a file of a run is found to do: its agreement in a runtime, and the user's metric."""

from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import nn

from calque.cli.folder import Run, read_run, write_start
from calque.cli.inputs import evaluate_model
from calque.cli.weights import load_weights
from calque.errors import VerificationError
from calque.quantized.model import QuantizedModel
from calque.shipping.module import OnnxModel
from calque.shipping.runtimes import Target
from calque.shipping.verification import Verification
from calque.shipping.verify import verify


def load_original_(original: nn.Module, settings: Run) -> None:
    if settings.weights is not None:
        load_weights(original, Path(settings.weights))


def checked(
    path: Path, q: QuantizedModel, inputs: object, *, target: str, bound: float, original: nn.Module | None
) -> tuple[Verification, VerificationError | None]:
    """The figures, those of a file below the bound too, and the error that this is."""
    try:
        return verify(path, q, inputs, target=cast(Target, target), bound=bound, original=original), None
    except VerificationError as error:
        if not isinstance(error.verification, Verification):
            raise
        return error.verification, error


def scored(run: Path, metric: str, path: Path, q: QuantizedModel, original: nn.Module, target: str) -> dict[str, float]:
    """The user's metric of the float network, the quantized one and the file, which the run keeps.

    What the run knows of the same metric is not measured again, but for the file.
    """
    settings = read_run(run)
    scores = dict(settings.scores) if metric == settings.evaluate else {}
    if "float" not in scores:
        load_original_(original, settings)
        scores["float"] = evaluate_model(metric, original.eval())
    if "quantized" not in scores:
        scores["quantized"] = evaluate_model(metric, q)
    name = "file" if target == "onnxruntime" else f"file in {target}"
    scores[name] = evaluate_model(metric, OnnxModel(path, q, target=cast(Target, target)))
    write_start(run, replace(settings, evaluate=metric, scores=scores))
    return scores


def print_scores(scores: dict[str, float], metric: str | None) -> None:
    for name, score in scores.items():
        print(f"{name}: {score:.6g} ({metric})")

"""A built network trained end to end: the float network distilled into it, then its biases tuned."""

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from calque.calibration.job import Job
from calque.calibration.losses import Loss, closeness, kl, kl_and_mse, mse
from calque.correction.biases import tune_biases
from calque.correction.distillation import distill
from calque.gains import Distilled, Tuned
from calque.pipeline.build import Built, Clock
from calque.quantized.assembled import Assembled
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.recipe import Recipe
from calque.run.checkpoint import Piece
from calque.settings import Distillation, Tuning


def trained_end_to_end(
    job: Job, built: Built, recipe: Recipe, loss: Loss, references: Sequence[Sequence[Tensor]]
) -> Built:
    """A built network distilled and its biases tuned, in place, as far as the recipe asks for it."""
    clock, model = Clock(), built.model
    if recipe.distillation is not None:
        found = _distilled(job, built, recipe.distillation, loss, references)
        built = replace(built, distilled=found)
        clock.lap("distillation")
    if recipe.tuning is not None:
        codes = {name: layer.codes.clone() for name, layer in model.layers.items()}
        built = replace(built, tuned=_tuned(job, model, recipe.tuning, loss, references))
        assert all(torch.equal(layer.codes, codes[name]) for name, layer in model.layers.items())
        clock.lap("biases")
    return replace(built, phases={**built.phases, **clock.phases})


def _distilled(
    job: Job, built: Built, how: Distillation, loss: Loss, references: Sequence[Sequence[Tensor]]
) -> Distilled:
    """Distills the float network in place; what was finished before is not done again."""
    module, checkpoint = built.model.graph_module, built.pieces
    needs = checkpoint.needs(network=Piece(module.state_dict(), {}))
    ready = checkpoint.get("distillation", needs)
    if ready is not None:
        module.load_state_dict(dict(ready.tensors), strict=False)
        return Distilled(**ready.facts)
    outputs = kl_and_mse if closeness(references[0]) is kl else mse
    judge = {"outputs": outputs, "run": loss, "kl": kl, "mse": mse}[how.loss]
    shared = job.network.shared
    found = distill(
        module, lambda inputs: list(job.network.module(*inputs)), job.batches, references, judge, how,
        fixed_codes={*shared, *shared.values()}, memory=job.memory, generator=job.generator("distillation"),
        on_step=lambda step, steps: job.progress("distillation", step, steps),
    )  # fmt: skip
    moved = {name: part for name, part in module.named_modules() if isinstance(part, (QuantizedLayer, Quantizer))}
    state = {f"{name}.{key}": value for name, part in moved.items() for key, value in part.state_dict().items()}
    checkpoint.put("distillation", Piece(state, asdict(found), needs))
    return found


def _tuned(job: Job, model: Assembled, how: Tuning, loss: Loss, references: Sequence[Sequence[Tensor]]) -> Tuned:
    """Tunes the biases in place."""
    judge = {"run": loss, "kl": kl, "mse": mse}[how.loss]
    return tune_biases(
        model.graph_module, job.batches, references, judge, how, memory=job.memory,
        generator=job.generator("biases"), on_step=lambda step, _: job.progress("biases", step, how.steps),
    )  # fmt: skip

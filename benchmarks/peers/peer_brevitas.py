"""Brevitas, in its own environment: ranges by error, GPTQ, Qronos and learned rounding, with bias correction.

Its ImageNet example is followed (brevitas_examples/imagenet_classification/ptq): equalization, calibration, the method, bias
correction; quantizers are put where the others have theirs.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas import config
from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
from brevitas.graph.equalize import EqualizeGraph
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant import (
    Int8WeightPerChannelFloatMSE,
    Int32Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8ActPerTensorFloatMSE,
)
from brevitas_examples.imagenet_classification.ptq import ptq_common
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import (
    CacheVision,
    LearnedRoundTrainer,
    get_blocks,
    is_layer,
    parse_args_to_dataclass,
    vision_block_forward,
    vision_forward,
)
from torch import Tensor, nn

from benchmarks.peers.adapter import COMMON, Method, Problem, Result, main
from benchmarks.peers.network import END_BITS, Marker, layers, plan, prepare

Loader = list[tuple[Tensor, Tensor]]
BATCH = 64  # of the example
PERCENTILE = 99.999  # of the example, for grids of 8 bits
RATE = 1e-2  # the example's 1e-3 is for its linear rounding: in 1000 steps sigmoids hardly move
EQUALIZE = 20  # iterations of the example; the variant without it is a method of its own


def quantize(problem: Problem, method: Callable[[nn.Module, Loader], str], *, equalize: int = 0) -> Result:
    """The network with every step of the example; `method` runs between calibration and bias correction."""
    config.IGNORE_MISSING_KEYS = True
    model = prepare(problem.model)
    if equalize:
        model = EqualizeGraph(iterations=equalize, merge_bias=True).apply(model)
    bits = plan(model, problem.bits)
    for name, module in list(model.named_modules()):
        if isinstance(module, Marker):
            model.set_submodule(name, qnn.QuantIdentity(act_quant=_activation(END_BITS)))
    for name, module in layers(model).items():
        model.set_submodule(name, _layer(name, module, bits[name].weight, bits[name].activation))
    model.eval()
    generator = torch.Generator().manual_seed(problem.seed)
    images = problem.calibration[torch.randperm(len(problem.calibration), generator=generator)]
    loader = [(batch, torch.empty(0)) for batch in torch.split(images, BATCH)]
    with torch.no_grad():
        model(images[:BATCH])
    ptq_common.calibrate(loader, model)
    settings = method(model, loader)
    ptq_common.apply_bias_correction(loader, model)
    model.eval()
    steps = [f"{equalize} iterations of equalization"] * bool(equalize) + [settings, "bias correction"]
    return Result(model, COMMON, "; ".join(step for step in steps if step))


def _layer(name: str, module: nn.Module, weight: int, activation: int) -> nn.Module:
    """One layer with its quantizers, made by Brevitas' own rewriter."""
    weight_quant = Int8WeightPerChannelFloatMSE.let(
        bit_width=weight, narrow_range=False, scaling_impl=ParameterFromStatsFromParameterScaling
    )
    options = {
        "weight_quant": weight_quant, "input_quant": _activation(activation), "bias_quant": Int32Bias,
        "return_quant_tensor": False,
    }  # fmt: skip
    kinds = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    holder = torch.fx.symbolic_trace(nn.Sequential(module))
    return next(iter(layers(layerwise_quantize(holder, kinds)).values()))


def _activation(bits: int) -> Any:
    """Asymmetric, per tensor: by squared error below 8 bits, by percentiles of the example at 8."""
    if bits < END_BITS:
        return ShiftedUint8ActPerTensorFloatMSE.let(bit_width=bits)
    return ShiftedUint8ActPerTensorFloat.let(
        bit_width=bits, high_percentile_q=PERCENTILE, low_percentile_q=100 - PERCENTILE
    )


def nearest(model: nn.Module, loader: Loader) -> str:
    return ""


def gptq(model: nn.Module, loader: Loader) -> str:
    ptq_common.apply_gptq(loader, model, act_order=True, use_quant_activations=True, create_weight_orig=True)
    return "GPTQ on quantized inputs, activation order"


def qronos(model: nn.Module, loader: Loader) -> str:
    ptq_common.apply_qronos(model, loader, act_order=True)
    return "Qronos, activation order, alpha 1e-6"


def learned_round(iterations: int, batch: int, model: nn.Module, loader: Loader) -> str:
    """AdaRound's loss on one layer after the other; the example's trainer, but in float32: it is for GPUs in float16."""
    options = Namespace(
        learned_round="hard_sigmoid", learned_round_loss="regularised_mse", learned_round_mode="layerwise",
        learned_round_iters=iterations, learned_round_lr=RATE, learned_round_lr_scheduler=None,
        learned_round_batch_size=batch,
    )  # fmt: skip
    trainer = parse_args_to_dataclass(options)
    trainer.training_args.use_amp = False
    trainer.training_args.losses_args[0].kwargs = {"max_count": iterations}
    LearnedRoundTrainer(config=trainer).train(
        model=model, model_forward=vision_forward, block_forward=vision_block_forward, data_loader=loader,
        cache=CacheVision(), get_blocks_fn=partial(get_blocks, block_check_fn=is_layer), keep_gpu=True,
    )  # fmt: skip
    return f"learned rounding, {iterations} iterations of {batch} images a layer, rate {RATE}"


METHODS: dict[str, Method] = {
    "nearest": partial(quantize, method=nearest),
    "gptq": partial(quantize, method=gptq),
    "qronos": partial(quantize, method=qronos),
    "learned-round-1000": partial(quantize, method=partial(learned_round, 1000, 16)),
    "equalized gptq": partial(quantize, method=gptq, equalize=EQUALIZE),
}

if __name__ == "__main__":
    main(("brevitas",), METHODS)

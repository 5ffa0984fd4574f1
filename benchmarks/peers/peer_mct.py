"""Model Compression Toolkit, in its own environment: its post-training quantization and its gradient-based one.

It quantizes the outputs of operators. To put grids where the others have them, quantization of outputs is turned off in its
description of the target platform, and operators that change nothing stand where a grid is: Hardtanh without bounds has 8 bits,
LeakyReLU of slope 1 has the bits of the layer behind it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import model_compression_toolkit as mct
from mct_quantizers import QuantizationMethod
from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR, PYTORCH_KERNEL
from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema
from model_compression_toolkit.target_platform_capabilities.targetplatform2framework.attribute_filter import NotEq
from model_compression_toolkit.target_platform_capabilities.targetplatform2framework.layer_filter_params import (
    LayerFilterParams,
)
from torch import Tensor, fx, nn

from benchmarks.peers.adapter import COMMON, Method, Problem, Result, main
from benchmarks.peers.network import CANDIDATES, END_BITS, layers, parse, plan, prepare, weight_bytes

EVERYTHING = 1e9  # a bound that no activation reaches
FIRST, REST = "FirstConv", "RestConv"
BATCH = 32
# Of soft rounding without Hessian scores. Its default, 0.01, makes the sum over all weights a million times the distance to the
# float outputs, which then decide next to nothing. Found on calibration images of resnet20 W4A4.
REGULARIZATION = 1e-6
Set = schema.OperatorSetNames


def post_training(problem: Problem) -> Result:
    model, _ = mct.ptq.pytorch_post_training_quantization(
        _prepare(problem),
        partial(_images, problem),
        core_config=_config(),
        target_platform_capabilities=_target(problem),
    )
    return Result(model.eval(), COMMON, "ranges by squared error, bias correction, its defaults")


def mixed(problem: Problem) -> Result:
    """Bits of weights by its integer program, in no more bytes than the same bits everywhere take; activations' are fixed."""
    limit = weight_bytes(prepare(problem.model), problem.bits)
    model, information = mct.ptq.pytorch_post_training_quantization(
        _prepare(problem),
        partial(_images, problem),
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=limit),
        core_config=_config(),
        target_platform_capabilities=_target(problem, CANDIDATES),
    )
    bits = "".join(str(CANDIDATES[choice]) for choice in information.mixed_precision_cfg)
    settings = f"bits of weights by an integer program, its defaults: {bits}; at most {limit:,} bytes"
    return Result(model.eval(), COMMON, settings, round(information.final_resource_utilization.weights_memory))


def gradient(problem: Problem, epochs: int, weighted: bool = True) -> Result:
    """Soft rounding of weights with biases, all layers at once, towards the float network's layer outputs.

    Args:
        weighted: whether images and layers are weighted by their Hessian scores, its default; where not, at REGULARIZATION.
    """
    model, _ = mct.gptq.pytorch_gradient_post_training_quantization(
        _prepare(problem),
        partial(_images, problem),
        core_config=_config(),
        gptq_config=mct.gptq.get_pytorch_gptq_config(
            n_epochs=epochs,
            use_hessian_based_weights=weighted,
            use_hessian_sample_attention=weighted,
            regularization_factor=None if weighted else REGULARIZATION,
        ),
        target_platform_capabilities=_target(problem),
    )
    kind = "its defaults" if weighted else f"without Hessian scores, regularization {REGULARIZATION}"
    return Result(model.eval(), COMMON, f"gradient PTQ, {epochs} epochs in batches of {BATCH}, {kind}")


def _images(problem: Problem) -> Iterator[list[Tensor]]:
    yield from ([batch] for batch in problem.batches(BATCH))


def _prepare(problem: Problem) -> fx.GraphModule:
    model = prepare(problem.model, marker=_grid_of_8)
    bits = plan(model, problem.bits)
    names = layers(model)
    for node in list(model.graph.nodes):
        if node.op == "call_module" and node.target in names:
            low = bits[node.target].activation < END_BITS
            name = f"input_of_{node.target}"
            model.add_submodule(name, nn.LeakyReLU(1.0) if low else _grid_of_8())
            with model.graph.inserting_before(node):
                grid = model.graph.call_module(name, node.args[:1])
            node.args = (grid,)
    model.recompile()
    return model


def _grid_of_8() -> nn.Module:
    return nn.Hardtanh(-EVERYTHING, EVERYTHING)


def _config() -> Any:
    kernel = {
        KERNEL_ATTR: mct.DefaultDict(default_value=PYTORCH_KERNEL),
        BIAS_ATTR: mct.DefaultDict(default_value="bias"),
    }
    custom = mct.core.CustomOpsetLayers
    return mct.core.CoreConfig(
        mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(),
        quantization_config=mct.core.QuantizationConfig(
            custom_tpc_opset_to_layer={
                FIRST: custom([LayerFilterParams(nn.Conv2d, in_channels=3)], kernel),
                REST: custom([LayerFilterParams(nn.Conv2d, NotEq("in_channels", 3))], kernel),
                "Grid8": custom([nn.Hardtanh]),
            }
        ),
    )


def _target(problem: Problem, weights: tuple[int, ...] | None = None) -> Any:
    """Weights symmetric per channel, grids asymmetric per tensor; first and last layer at 8 bits.

    Args:
        weights: the bits that the layers between may have, most first; those of the problem by default.
    """
    bits = parse(problem.bits)
    off = schema.AttributeQuantizationConfig(
        weights_quantization_method=QuantizationMethod.SYMMETRIC, weights_n_bits=8, weights_per_channel_threshold=True,
        enable_weights_quantization=False, lut_values_bitwidth=None,
    )  # fmt: skip

    def operator(weight: int | None, activation: int | None) -> Any:
        kernel = {}
        if weight is not None:
            kernel[KERNEL_ATTR] = off.clone_and_edit(weights_n_bits=weight, enable_weights_quantization=True)
            kernel[BIAS_ATTR] = off
        return schema.OpQuantizationConfig(
            default_weight_attr_config=off, attr_weights_configs_mapping=kernel,
            activation_quantization_method=QuantizationMethod.UNIFORM, activation_n_bits=activation or 8,
            supported_input_activation_n_bits=(8, 4, 2), enable_activation_quantization=activation is not None,
            quantization_preserving=False, fixed_scale=None, fixed_zero_point=None, simd_size=32,
            signedness=schema.Signedness.AUTO,
        )  # fmt: skip

    def options(*operators: Any) -> Any:
        return schema.QuantizationConfigOptions(quantization_configurations=operators, base_config=operators[0])

    sets = (
        (FIRST, options(operator(END_BITS, None))), (Set.FULLY_CONNECTED, options(operator(END_BITS, None))),
        (REST, options(*(operator(weight, None) for weight in weights or (bits.weight,)))),
        ("Grid8", options(operator(None, END_BITS))), (Set.LEAKY_RELU, options(operator(None, bits.activation))),
    )  # fmt: skip
    return schema.TargetPlatformCapabilities(
        default_qco=options(operator(None, None)), tpc_minor_version=1, tpc_patch_version=0, tpc_platform_type="benchmark",
        operator_set=tuple(schema.OperatorsSet(name=name, qc_options=found) for name, found in sets),
        fusing_patterns=(), name="benchmark", add_metadata=False,
    )  # fmt: skip


METHODS: dict[str, Method] = {
    "ptq": post_training,
    "mixed": mixed,
    "gptq-5": partial(gradient, epochs=5),
    "gptq-5-mse": partial(gradient, epochs=5, weighted=False),
    "gptq-20-mse": partial(gradient, epochs=20, weighted=False),
}

if __name__ == "__main__":
    main(("model-compression-toolkit",), METHODS)

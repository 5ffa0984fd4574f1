"""AIMET, in its own environment: AdaRound and SeqMSE.

The documented order: fold batch norms, the method on weights, freeze their grids, calibrate the activations.
Weight grids are searched by AIMET's tf_enhanced, activation grids by its squared error.
"""

import tempfile
from functools import partial
from typing import Any

import torch
from aimet_torch._base.nn.modules import custom
from aimet_torch.adaround import Adaround, AdaroundParameters
from aimet_torch.common.defs import QuantScheme
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.encoding_analyzer import SqnrEncodingAnalyzer
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import apply_seq_mse
from torch import Tensor, fx, nn

from benchmarks.peers.adapter import COMMON, Method, Problem, Result, main
from benchmarks.peers.network import END_BITS, layers, marked, parse, plan, prepare

SCHEME = QuantScheme.post_training_tf_enhanced
BATCH = 32  # what AdaRound fits to in a step


def nearest(problem: Problem) -> Result:
    model = _prepare(problem)
    return _calibrated(problem, _simulation(problem, model), "weights by tf_enhanced")


def seq_mse(problem: Problem) -> Result:
    simulation = _simulation(problem, _prepare(problem))
    apply_seq_mse(simulation, list(problem.batches(BATCH)), num_candidates=20)
    return _calibrated(problem, simulation, "SeqMSE, 20 candidates, its defaults")


def adaround(problem: Problem, iterations: int) -> Result:
    model = _prepare(problem)
    bits = plan(model, problem.bits)
    lowest = parse(problem.bits).weight
    ends = [(module, END_BITS) for name, module in layers(model).items() if bits[name].weight == END_BITS]
    batches = list(problem.batches(BATCH))
    parameters = AdaroundParameters(batches, len(batches), default_num_iterations=iterations)
    with tempfile.TemporaryDirectory() as folder:
        rounded = Adaround.apply_adaround(
            model, batches[0][:1], parameters, folder, "weights", default_param_bw=lowest, param_bw_override_list=ends,
            default_quant_scheme=SCHEME, default_config_file=get_path_for_per_channel_config(),
        )  # fmt: skip
        simulation = _simulation(problem, rounded)
        simulation.set_and_freeze_param_encodings(f"{folder}/weights.encodings")
    return _calibrated(
        problem, simulation, f"AdaRound, {iterations} iterations of {BATCH} images a layer, its defaults"
    )


def _prepare(problem: Problem) -> fx.GraphModule:
    return prepare(problem.model, custom.Add, nn.Identity)


def _simulation(problem: Problem, model: Any) -> Any:
    """AIMET's simulation with its quantizers put where the others have theirs; weights per channel, symmetric."""
    bits = plan(model, problem.bits)
    results = marked(model, nn.Identity)
    simulation = QuantizationSimModel(
        model, problem.calibration[:1], quant_scheme=SCHEME, default_param_bw=parse(problem.bits).weight,
        default_output_bw=END_BITS, config_file=get_path_for_per_channel_config(),
    )  # fmt: skip
    for name, module in simulation.named_qmodules():
        inputs: Any = [None for _ in module.input_quantizers]
        outputs: Any = [_activation(END_BITS) if name in results else None]
        module.input_quantizers, module.output_quantizers = nn.ModuleList(inputs), nn.ModuleList(outputs)
        if name in bits:
            module.input_quantizers[0] = _activation(bits[name].activation)
            module.param_quantizers["weight"].bitwidth = bits[name].weight
            assert module.param_quantizers["weight"].shape[0] == len(module.weight)
            assert module.param_quantizers["weight"].symmetric
    return simulation


def _activation(bits: int) -> QuantizeDequantize:
    """Asymmetric, per tensor, by squared error: its default weighs clipped values three times and does worse at 4 bits."""
    return QuantizeDequantize((), bits, False, encoding_analyzer=SqnrEncodingAnalyzer((), gamma=1.0))


def _calibrated(problem: Problem, simulation: Any, settings: str) -> Result:
    def forward(model: nn.Module, batches: list[Tensor]) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    simulation.compute_encodings(forward, list(problem.batches()))
    return Result(simulation.model.eval(), COMMON, settings)


METHODS: dict[str, Method] = {
    "nearest": nearest,
    "seqmse": seq_mse,
    "adaround-1000": partial(adaround, iterations=1000),
    "adaround-2500": partial(adaround, iterations=2500),
    "adaround-10000": partial(adaround, iterations=10000),
}

if __name__ == "__main__":
    main(("aimet-torch",), METHODS)

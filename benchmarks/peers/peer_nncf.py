"""NNCF, in its own environment: its post-training quantization at 8 bits, with fast and with accurate bias correction."""

import copy
import os
from functools import partial

os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # its kernels are compiled at the first use: wait for them

import nncf
import torch

from benchmarks.peers.adapter import Method, Problem, Result, main

PLACEMENT = "NNCF's own: inputs of layers and of adds, all at 8 bits"


def quantize(problem: Problem, fast: bool) -> Result:
    if problem.bits != "w8a8":
        raise NotImplementedError("NNCF's post-training quantization of activations has 8 bits only.")
    images = nncf.Dataset(list(torch.split(problem.calibration, 1)))
    model = nncf.quantize(
        copy.deepcopy(problem.model), images, preset=nncf.QuantizationPreset.MIXED, subset_size=len(problem.calibration),
        fast_bias_correction=fast,
    )  # fmt: skip
    return Result(model.eval(), PLACEMENT, f"preset mixed, {'fast' if fast else 'accurate'} bias correction")


METHODS: dict[str, Method] = {"ptq": partial(quantize, fast=True), "accurate-bias": partial(quantize, fast=False)}

if __name__ == "__main__":
    main(("nncf",), METHODS)

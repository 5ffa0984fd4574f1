"""What older versions of torch and ONNX name otherwise or lack, each with the version that brought it, in one place."""

import inspect
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils._pytree import TreeSpec

# torch 2.9 writes checks of *args that name nothing, and fails where it runs them; 2.13 does not (2.10 to 2.12: not tried).
CHECKS_FAIL = (2, 9) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)

# What `torch.set_float32_matmul_precision` means by its words, where torch has no other name for it.
_PRECISIONS = {"highest": "none", "high": "tf32", "medium": "bf16"}


def unguarded(program: ExportedProgram) -> fx.GraphModule:
    """The program as a module that does not check its inputs: before torch 2.9 none did, and none could be asked not to."""
    known = "check_guards" in inspect.signature(program.module).parameters
    module = program.module(**({"check_guards": False} if known else {}))
    assert isinstance(module, fx.GraphModule)
    return module


def without_checks(program: ExportedProgram) -> None:
    """Keeps torch from checking the inputs of a program wherever it takes it apart, in place."""
    vars(program)["_example_inputs"] = None  # which the checks are made from


def children(tree: TreeSpec) -> list[TreeSpec]:
    """The trees of a tree's parts: a method since torch 2.10, in place of a field."""
    method: Any = getattr(tree, "children", None)
    return list(method() if method is not None else tree.children_specs)


def product_precisions(device: torch.device) -> set[str]:
    """What float32 products of matrices and convolutions may be computed as on the device: "tf32" or "bf16", or "none" or "ieee".

    Before torch 2.9 there is one switch for all of a processor's products.
    """
    if device.type not in ("cpu", "cuda"):
        return set()
    kernels: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    try:
        if device.type == "cpu":
            return {kernels.matmul.fp32_precision, kernels.conv.fp32_precision}
        return {kernels.matmul.fp32_precision}
    except AttributeError:
        if device.type == "cpu":
            return {_PRECISIONS[torch.get_float32_matmul_precision()]}
        return {"tf32" if kernels.matmul.allow_tf32 else "none"}

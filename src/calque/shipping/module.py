"""An exported file as a module: called as the network that it was made from, executed by a runtime."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calque.errors import VerificationError
from calque.network.network import value_of
from calque.quantized.admission import file_to_read, require_quantized
from calque.quantized.model import QuantizedModel
from calque.quantized.partly import PartlyQuantized, whole_only
from calque.shipping.runtimes import DEFAULT, OnnxRuntime, Runtime, Target, check_target, open_runtime
from calque.shipping.verify import load_proto


class OnnxModel(nn.Module):
    """An exported file with the signature of its network: it takes the same arguments and returns the same types.

    A function that scores a network scores the file that it became: `model.eval()`, `model.to(device)`, `torch.no_grad()` and
    `next(model.parameters()).device` work as they do there. The file itself runs on the CPU, whatever `to` says; outputs
    come back to where the inputs are.
    """

    def __init__(self, path: str | os.PathLike[str], model: QuantizedModel, *, target: Target = "onnxruntime"):
        """
        Args:
            path: a file that `calque.export_onnx` wrote.
            model: the quantized network that it was made from, which knows the arguments and the form of what is returned.
            target: the runtime: "onnxruntime" in a session with its defaults, "openvino" or "qonnx".

        Raises:
            VerificationError: no ONNX file; one with another number of outputs than the network; a runtime that cannot load it.
            MissingExtraError: a runtime that is not installed.
            SpecError: an unknown target; no path; no quantized network, or one quantized in parts, which are files of their own.
            OSError: no such file.
        """
        super().__init__()
        path = file_to_read(path, "OnnxModel(path, q)")
        require_quantized(model, "OnnxModel(path, q)")
        if isinstance(model, PartlyQuantized):
            raise whole_only(model, "OnnxModel", "OnnxModel(file, q.parts[path])")
        check_target(target)
        proto = load_proto(path)
        self._model = (model,)  # no module of this one: it keeps its device and mode
        self._places = _places(model, [output.name for output in proto.graph.output])
        self._runtime: Runtime = (
            OnnxRuntime(proto, settings=DEFAULT) if target == "onnxruntime" else open_runtime(proto, target)
        )
        self.empty = nn.Parameter(torch.empty(0), requires_grad=False)  # whose device callers ask for
        self.eval()

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> Any:
        """What the network returns for these arguments, computed by the runtime.

        Raises:
            CalibrationError, TypeError, ValueError: as the quantized network.
            VerificationError: the runtime fails.
        """
        model = self._model[0]
        leaves = model.call_form.leaves(args, kwargs)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = given[0].device
        computed = [tensor.to(device) for tensor in self._runtime.run(given)]
        outputs: list[Any] = [None if place is None else computed[place] for place in self._places]
        if None in self._places:  # sizes, which are numbers to forward and left out of files
            known = model.evaluate(*leaves)
            outputs = [known[i] if place is None else outputs[i] for i, place in enumerate(self._places)]
        return pytree.tree_unflatten(outputs, model.out_spec)


def _places(model: QuantizedModel, names: list[str]) -> list[int | None]:
    """Of each leaf that the network returns: which of the file's outputs it is; None for what is no tensor.

    Raises:
        VerificationError: the file has neither an output for each tensor nor one for each leaf.
    """
    (output,) = (node for node in model.graph_module.graph.nodes if node.op == "output")
    leaves: Any = output.args[0]
    tensors = [index for index, leaf in enumerate(leaves) if value_of(leaf) is not None]
    if len(names) not in (len(tensors), len(leaves)):
        raise VerificationError(
            f"the file has {len(names)} outputs ({', '.join(names)}), the network {len(tensors)}. Export this network."
        )
    if len(names) == len(leaves):
        return [index if index in tensors else None for index in range(len(leaves))]
    return [tensors.index(index) if index in tensors else None for index in range(len(leaves))]

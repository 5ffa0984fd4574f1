"""The captured network beside the model itself, on a few inputs."""

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calque.errors import CaptureError
from calque.network.network import Network
from calque.network.outputs import flatten_outputs
from calque.network.rewrites.functional import silent_tracing
from calque.network.rewrites.shortcuts import slow_attention
from calque.network.signature import Batch, flatten, length
from calque.network.trace import distinct

FAST_PATH = (
    "in eval mode without gradients the model takes torch's fast path for attention, which reads float masks as booleans and "
    "returns NaN in rows that are masked whole; the quantized network computes what the model does in training, and under "
    "torch.backends.mha.set_fastpath_enabled(False)."
)


def differs_by_fast_path(model: nn.Module, network: Network, batch: Batch) -> bool:
    """Whether the network equals the model only without torch's fast path for attention. Raises CaptureError: it never does."""
    with torch.no_grad(), silent_tracing():
        try:
            expected, tree = flatten_outputs(model(**distinct(batch)))
            outputs = network.module(*flatten(batch)[0])
        except Exception as error:
            raise CaptureError(
                f"the network fails on a batch of {length(batch)} rows: {str(error).splitlines()[0]} It was traced with 2; "
                "it must accept any number of rows on axis 0 of its inputs."
            ) from error
        received, found = flatten_outputs(pytree.tree_unflatten(outputs, network.out_spec))
        if found != tree:
            raise CaptureError(
                f"the captured network returns {found} on a batch of {length(batch)} rows, and the model {tree}. What a model "
                "returns besides tensors must not depend on the values of its inputs."
            )
        position = _difference(expected, received)
        if position is None:
            return False
        if received[position].shape != expected[position].shape:
            raise CaptureError(
                f"output {position} of the captured network has the shape {tuple(received[position].shape)} on a batch of "
                f"{length(batch)} rows, the model's {tuple(expected[position].shape)}: its forward fixes the size of the batch "
                "that it is traced with, as a loop over the rows does. Compute on all rows at once."
            )
        with slow_attention():
            expected, _ = flatten_outputs(model(**distinct(batch)))
    if _difference(expected, received) is None:
        return True
    raise CaptureError(
        f"output {position} of the captured network differs from the model's on a batch of {length(batch)} rows. The "
        "model must be a function of its inputs alone: no randomness, no state that changes between calls, no other path "
        "where it is traced."
    )


def _difference(expected: list[object], received: list[object]) -> int | None:
    """The first output that differs; values that are not finite in `received` do not count: calibration names the layer."""
    sizes = [_size(leaf) for leaf in expected]
    for position, (a, b) in enumerate(zip(expected, received, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.is_floating_point():
            continue
        if a.shape != b.shape:
            return position
        finite = torch.isfinite(b)
        # an output may be but the rounding errors of the others
        tolerance = 1e-3 * sizes[position] + min(1e-6, 1e-6 * max(sizes))
        if not torch.allclose(a[finite], b[finite].to(a.dtype), rtol=0.0, atol=tolerance):
            return position
    return None


def _size(leaf: object) -> float:
    """The largest finite absolute value of an output."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return 0.0
    finite = leaf[torch.isfinite(leaf)]
    return finite.abs().max().item() if finite.numel() else 0.0

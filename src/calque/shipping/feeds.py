"""Inputs as a file takes them: by position, of its shapes and types."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from calque.errors import VerificationError


def feeds_of(inputs: Sequence[onnx.ValueInfoProto], leaves: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
    """The tensors by the names of the file's inputs.

    Raises:
        VerificationError: another number of them, another rank, size of a fixed axis, or type.
    """
    if len(inputs) != len(leaves):
        names = ", ".join(value.name for value in inputs)
        raise VerificationError(f"the file has {len(inputs)} inputs ({names}). Got {len(leaves)}.")
    feeds = {}
    for value, leaf in zip(inputs, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise VerificationError(f"input {value.name} must be a tensor. Got {type(leaf).__name__}.")
        kind = value.type.tensor_type
        wanted, received = (
            helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
            str(leaf.dtype).removeprefix("torch."),
        )
        sizes = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
        if wanted != received or (kind.HasField("shape") and not _fits(sizes, leaf)):
            raise VerificationError(
                f"input {value.name} of the file is {wanted} ({', '.join(map(str, sizes))}). Got {received} "
                f"({', '.join(map(str, leaf.shape))}); prepare it as in calibration."
            )
        feeds[value.name] = np.ascontiguousarray(leaf.detach().cpu().numpy())
    return feeds


def _fits(sizes: Sequence[int | str], leaf: Tensor) -> bool:
    """Whether the tensor has those sizes; names stand for any."""
    return len(sizes) == leaf.dim() and all(
        isinstance(size, str) or size == length for size, length in zip(sizes, leaf.shape, strict=True)
    )

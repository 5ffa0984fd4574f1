"""What users have at hand as batches of tensors: NumPy arrays, data sets of single samples, loaders, lists."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from calque.errors import CalibrationError

SAMPLES = 50  # of a data set in one batch
MOST_BATCHES, MOST_BYTES = 20_000, 8 * 10**9  # of what has no length: far more than calibration needs
PLAIN = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def batches_of(given: object) -> Iterator[object]:
    """The batches of what was given, one at a time; NumPy's arrays in them are tensors.

    Args:
        given: a tensor, an array, or a tuple or dict of them with all rows; a torch Dataset, whose items are one sample each
            without a batch axis; or an iterable of batches: a list, a DataLoader, a generator.

    Raises:
        CalibrationError: none of these; arrays of something else than numbers; samples that cannot be put into one batch.
    """
    if isinstance(given, (Tensor, np.ndarray, tuple, Mapping)):
        items: Iterable[object] = [given]
    elif isinstance(given, Dataset):
        items = _collated(given)
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        items = given if isinstance(given, Sized) else _bounded(given)
    else:
        raise CalibrationError(
            "calibration is a tensor, an array, a tuple or dict of them, a Dataset, or an iterable of batches. "
            f"Got {type(given).__name__}."
        )
    return map(as_tensors, items)


def _bounded(batches: Iterable[object]) -> Iterator[object]:
    """The batches of something that does not say how many it has, and that may be endless."""
    size = 0
    for number, batch in enumerate(batches, 1):
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, (Tensor, np.ndarray))]
        size += sum(leaf.nbytes for leaf in leaves)
        if number > MOST_BATCHES or size > MOST_BYTES:
            raise CalibrationError(
                f"calibration came to no end: {number:,} batches, {size / 1e9:.2g} GB, from a {type(batches).__name__} without a "
                f"length. Pass a few hundred inputs: list(itertools.islice(batches, 20)). At most {MOST_BATCHES:,} batches and "
                f"{MOST_BYTES / 1e9:.0f} GB are taken from what may be endless."
            )
        yield batch


def unusual(tensor: Tensor) -> str:
    """What makes a tensor one that nothing here computes with, such as "sparse"; "" for plain ones."""
    if isinstance(tensor, FakeTensor):
        return "a FakeTensor, which has no values"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_meta:
        return "on the device meta, where it has no values"
    if tensor.is_quantized:
        return f"quantized ({str(tensor.dtype).removeprefix('torch.')})"
    return "" if tensor.dtype in PLAIN else f"of dtype {str(tensor.dtype).removeprefix('torch.')}"


def as_tensors(batch: object) -> object:
    """The batch with a tensor in place of each NumPy array; float64, NumPy's default, becomes float32.

    >>> as_tensors({"x": np.ones(2), "n": 3})
    {'x': tensor([1., 1.]), 'n': 3}
    """
    try:
        return _converted(batch)
    except RecursionError as error:
        raise CalibrationError("a calibration batch is nested too deeply, or holds itself. Pass tensors.") from error


def _converted(batch: object) -> object:
    if isinstance(batch, Mapping):  # those of other libraries, too, which pytree takes for leaves
        return {name: pytree.tree_map(_tensor, value) for name, value in batch.items()}
    return pytree.tree_map(_tensor, batch)


def _tensor(leaf: object) -> object:
    if isinstance(leaf, np.generic):
        return leaf.item()
    if not isinstance(leaf, np.ndarray):
        return leaf
    try:
        native = np.require(leaf.astype(leaf.dtype.newbyteorder("="), copy=False), requirements=["C", "W"])
        found = torch.from_numpy(native)
    except (TypeError, ValueError) as error:
        raise CalibrationError(
            f"calibration: an array must hold numbers that torch knows. Got dtype {leaf.dtype}."
        ) from error
    return found.float() if found.dtype == torch.float64 else found


def _collated(samples: Dataset[Any]) -> Iterator[object]:
    """Batches of SAMPLES samples in their order."""
    # a generator of its own: an iterator draws from the global state otherwise
    loader = DataLoader(samples, batch_size=SAMPLES, collate_fn=_batch, generator=torch.Generator())
    try:
        yield from loader
    except CalibrationError:
        raise
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"the samples of the {type(samples).__name__} cannot be read and put into batches: {str(error).splitlines()[0]} "
            "Return tensors of one size (a transform), or pass a DataLoader with a collate_fn."
        ) from error


def _batch(samples: list[object]) -> object:
    return default_collate([pytree.tree_map(_number, as_tensors(sample)) for sample in samples])


def _number(leaf: object) -> object:
    """A Python float as float32; collated, it would be float64."""
    return torch.tensor(leaf) if isinstance(leaf, float) else leaf

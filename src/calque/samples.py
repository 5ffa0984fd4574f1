"""What users have at hand as batches of tensors: NumPy arrays, data sets of single samples, loaders, lists."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from calque.errors import CalibrationError

SAMPLES = 50  # of a data set in one batch


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
        items = given
    else:
        raise CalibrationError(
            "calibration is a tensor, an array, a tuple or dict of them, a Dataset, or an iterable of batches. "
            f"Got {type(given).__name__}."
        )
    return map(as_tensors, items)


def as_tensors(batch: object) -> object:
    """The batch with a tensor in place of each NumPy array; float64, NumPy's default, becomes float32.

    >>> as_tensors({"x": np.ones(2), "n": 3})
    {'x': tensor([1., 1.]), 'n': 3}
    """
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
        raise CalibrationError(f"an array must hold numbers that torch knows. Got dtype {leaf.dtype}.") from error
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

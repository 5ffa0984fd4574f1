"""Shortcuts of torch's own transformer modules, which they take in eval mode without gradients and which cannot be traced."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from calque.network.exclusive import for_this_thread


@contextmanager
def without_shortcuts() -> Iterator[None]:
    """While it lasts, torch's transformer modules compute their shortcuts' results by operators that can be traced.

    So they do in this thread, which must have its turn (`exclusively`).

    In eval mode without gradients nn.TransformerEncoder leaves padded places out (nested tensors), so that they are zero in its
    result. It does so where all padding of the batch stands behind the values, with a padding mask and no other. Masks are not
    searched for a causal form.
    """
    original = nn.TransformerEncoder.forward

    @functools.wraps(original)
    def forward(
        self: nn.TransformerEncoder,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        nested, norm = self.use_nested_tensor, self.norm
        shortcut = nested and torch.backends.mha.get_fastpath_enabled() and src.dim() == 3 and mask is None
        if not shortcut or src_key_padding_mask is None:
            self.use_nested_tensor = False
            try:
                return original(self, src, mask, src_key_padding_mask, is_causal)
            finally:
                self.use_nested_tensor = nested
        padding = src_key_padding_mask
        if padding.dtype != torch.bool:  # the shortcut knows padding and values, nothing between
            padding = padding.bool()
        whole = padding.all(1, keepdim=True)  # attention over nothing would be NaN; all of the row is left out below
        self.use_nested_tensor, self.norm = False, None
        try:
            result = original(self, src, mask, padding.logical_and(whole.logical_not()), is_causal)
        finally:
            self.use_nested_tensor, self.norm = nested, norm
        result = result.masked_fill(_left_out(padding, self.mask_check)[:, :, None], 0.0)
        return result if norm is None else norm(result)

    with (
        for_this_thread(nn.TransformerEncoder, "forward", forward),
        for_this_thread(transformer, "_detect_is_causal_mask", _said_to_be_causal),
    ):
        yield


def _said_to_be_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether the caller says so: torch would look into the mask, which chooses a kernel and changes no value."""
    return is_causal is True


@contextmanager
def slow_attention() -> Iterator[None]:
    """While it lasts, torch's attention modules compute what they do in training: in this thread, whose turn it is."""
    with for_this_thread(torch.backends.mha, "_is_fastpath_enabled", False):
        yield


def _left_out(padding: Tensor, checked: bool) -> Tensor:
    """bool (N, L): the places that the shortcut leaves out; none where it checks for padding in front of values and finds it."""
    if not checked:
        return padding
    behind = padding[:, 1:].logical_or(padding[:, :-1].logical_not())
    return padding.logical_and(behind.all())

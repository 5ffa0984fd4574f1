"""What an exported file says about the network that it was made from, and whether that is this one."""

import json

import onnx
import torch
from torch import Tensor

from calque.errors import VerificationError
from calque.quantized.model import QuantizedModel
from calque.run.checkpoint import fingerprint
from calque.shipping.saved.architecture import left_float

PREFIX = "calque."  # of calque's keys in a file's metadata
PLAN, FINGERPRINT = "plan", "fingerprint"
COMPACT = (",", ":")  # of JSON without spaces
NAMED = 3  # layers that a sentence lists


def identity(model: QuantizedModel) -> dict[str, str]:
    """The plan and the fingerprints of a network, as JSON by key; the same for a network that was saved and loaded."""
    plan = {name: str(bits) for name, bits in model.plan.items()}
    fingerprints = _fingerprints(model)
    return {PLAN: json.dumps(plan, separators=COMPACT), FINGERPRINT: json.dumps(fingerprints, separators=COMPACT)}


def _fingerprints(model: QuantizedModel) -> dict[str, str]:
    """Checksums of each layer's codes, scales and bias, of all grids, and of the tensors that stay float."""
    grids: dict[str, Tensor] = {}
    for name, grid in model.quantizers.items():
        parts = {"scale": grid.scale, "zero_point": grid.zero_point, "bits": torch.tensor(grid.bits)}
        grids |= {f"{name}/{part}": value for part, value in parts.items()}
    floats = dict(left_float(model.graph_module))
    layers = {f"layer {name}": fingerprint(dict(layer.named_buffers())) for name, layer in model.layers.items()}
    return {
        **layers,
        "the grids of the tensors": fingerprint(grids),
        "the tensors that stay float": fingerprint(floats),
    }


def differences(proto: onnx.ModelProto, model: QuantizedModel) -> str:
    """How the file's own plan and fingerprints differ from the network's, as a sentence; "" where they are the same.

    Raises:
        VerificationError: metadata with calque's keys that cannot be read.
    """
    ours, found = identity(model), ""
    for key in (FINGERPRINT, PLAN):  # the plan is told where both differ
        stored, own = _stored(proto, key), json.loads(ours[key])
        apart = [] if stored is None else [name for name in {**own, **stored} if own.get(name) != stored.get(name)]
        if stored is not None and apart:
            told = [f"{name} is {stored.get(name)} in the file and {own.get(name)} in the network" for name in apart]
            shown = ", ".join((told if key == PLAN else apart)[:NAMED])
            more = f" and {len(apart) - NAMED} more" if len(apart) > NAMED else ""
            what = "its plan is another one" if key == PLAN else "the plan is the same, codes, scales or biases are not"
            found = f"this file was exported from another network or run: {what} ({shown}{more})."
    return found


def unknown_origin(proto: onnx.ModelProto) -> str:
    """A note where the file does not say what it was made from; "" where it does."""
    missing = [f"{PREFIX}{key}" for key in (PLAN, FINGERPRINT) if _stored(proto, key) is None]
    if not missing:
        return ""
    return (
        f"the file has no {' and no '.join(missing)} in its metadata (another tool or an older calque wrote it), so that nothing "
        "says whether it is this network's: it is judged by its outputs alone."
    )


def _stored(proto: onnx.ModelProto, key: str) -> dict[str, str] | None:
    """The JSON object under that key of the metadata; None where there is none."""
    text = next((entry.value for entry in proto.metadata_props if entry.key == PREFIX + key), None)
    if text is None:
        return None
    try:
        stored = json.loads(text)
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise VerificationError(
            f"the file's metadata is damaged: {PREFIX}{key} must be a JSON object. Got {text[:40]!r}. Export it again."
        )
    return stored

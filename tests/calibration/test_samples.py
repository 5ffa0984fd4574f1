"""Arrays, data sets and extra parts of batches as calibration."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

import calque
import networks
from calque.calibration.batches import ROWS, prepare
from calque.calibration.samples import as_tensors, batches_of
from calque.errors import CalibrationError, CalibrationWarning
from calque.network import Signature
from calque.network.signature import rows

IMAGES = networks.images(120, seed=0)
LABELS = torch.arange(120)
SIGNATURE = Signature(("image",), ("image",), ())
CPU = torch.device("cpu")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from IMAGES


class Samples(Dataset[Any]):
    """Items by a function of their number."""

    def __init__(self, item: Callable[[int], Any]):
        self.item = item

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


FORMS: dict[str, Callable[[], object]] = {
    "array": lambda: IMAGES.numpy(),
    "float64 array": lambda: IMAGES.double().numpy(),
    "read-only array": lambda: np.broadcast_to(IMAGES.numpy(), IMAGES.shape),
    "array of another byte order": lambda: IMAGES.numpy().astype(">f4"),
    "array with negative strides": lambda: IMAGES.numpy()[::-1].copy()[::-1],
    "list of arrays": lambda: [IMAGES[:50].numpy(), IMAGES[50:].double().numpy()],
    "tuple of arrays": lambda: (IMAGES.numpy(),),
    "dict of arrays": lambda: {"image": IMAGES.double().numpy()},
    "list of tuples with labels": lambda: [(IMAGES[:50].numpy(), LABELS[:50].numpy()), (IMAGES[50:], LABELS[50:])],
    "data set of images and labels": lambda: TensorDataset(IMAGES, LABELS),
    "data set of images": lambda: TensorDataset(IMAGES),
    "data set of parts": lambda: ConcatDataset([Subset(TensorDataset(IMAGES, LABELS), range(120))]),
    "data set of tensors": lambda: Samples(lambda i: IMAGES[i]),
    "data set of arrays and floats": lambda: Samples(lambda i: (IMAGES[i].double().numpy(), 0.5)),
    "data set of dicts": lambda: Samples(lambda i: {"image": IMAGES[i], "label": i, "path": f"{i}.png"}),
    "stream of samples": Stream,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_inputs(form: str) -> None:
    batches = prepare(FORMS[form](), SIGNATURE, CPU)

    assert all(list(batch) == ["image"] and 1 <= rows(batch) <= ROWS for batch in batches)
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), IMAGES)  # type: ignore[misc]


def test_whole_numbers_keep_their_type_and_numbers_of_numpy_are_numbers() -> None:
    found = as_tensors(
        {"ids": np.arange(3), "mask": np.ones(3, bool), "half": np.ones(2, np.float16), "n": np.int64(3)}
    )

    assert isinstance(found, dict)
    assert [found[name].dtype for name in ("ids", "mask", "half")] == [torch.int64, torch.bool, torch.float16]
    assert type(found["n"]) is int


def test_a_list_of_tensors_is_a_list_of_batches() -> None:
    assert len(list(batches_of([IMAGES[:3], IMAGES[3:6]]))) == 2
    assert len(prepare([IMAGES[:3], IMAGES[3:6]], SIGNATURE, CPU)) == 2


def test_reading_a_data_set_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()

    list(batches_of(TensorDataset(IMAGES)))

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.array(["a", "b"]), "an array must hold numbers that torch knows. Got dtype <U1"),
        ([np.array([None])], "an array must hold numbers that torch knows. Got dtype object"),
        ("images.npy", "calibration is a tensor, an array, .* Got str"),
        (
            Samples(lambda i: torch.zeros(1, i + 1)),
            "samples of the Samples cannot be read and put into batches: .* one size",
        ),
        (Samples(lambda i: object()), "samples of the Samples cannot be read and put into batches: .* Return tensors"),
        (np.ones((0, 1, 8, 8)), "needs at least one input"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(given: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        prepare(given, SIGNATURE, CPU)


class Masked(nn.Module):
    """Takes a mask if it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(image if mask is None else image * mask)
        return y


def noted(model: nn.Module, calibration: object) -> list[str]:
    notes: list[str] = []
    prepare(calibration, Signature.of(model), CPU, on_note=notes.append)
    return notes


def test_extra_keys_are_left_out_and_named() -> None:
    given = [{"image": IMAGES[:50], "label": LABELS[:50]}, {"image": IMAGES[50:], "label": LABELS[50:]}]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing could have been meant by the key
        assert noted(networks.small(), [{**batch, "input": batch["image"]} for batch in given]) == [
            "left out of the batches: image, label. forward takes: input."
        ]


def test_an_extra_key_beside_an_argument_that_was_not_given_is_warned_about() -> None:
    with pytest.warns(
        CalibrationWarning, match="left out of the batches: masks. forward takes: image, mask. Check the spell"
    ):
        notes = noted(Masked(), {"image": IMAGES, "masks": IMAGES})

    assert notes == ["left out of the batches: masks. forward takes: image, mask."]


def test_an_item_of_a_tuple_that_an_optional_argument_could_take_is_spoken_of() -> None:
    assert noted(Masked(), (IMAGES, LABELS)) == [
        "batches of 2 items were cut to the required 1; mask kept the default. A dict of keyword arguments gives optional "
        "ones, too."
    ]
    assert noted(Masked(), {"image": IMAGES, "mask": IMAGES > 0}) == []
    assert noted(networks.small(), (IMAGES, LABELS)) == []


def test_a_dict_without_a_required_argument_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"forward needs the argument\(s\) image. Got: picture"):
        prepare({"picture": IMAGES}, SIGNATURE, CPU)


def test_the_report_and_the_verification_name_what_was_left_out(tmp_path: Path) -> None:
    given = {"input": IMAGES.numpy(), "label": LABELS.numpy()}

    q = calque.quantize(networks.small(), given, recipe="nearest")
    calque.export_onnx(q, tmp_path / "model.onnx")
    found = calque.verify(tmp_path / "model.onnx", q, given, bound=0)

    note = "left out of the batches: label. forward takes: input."
    assert note in q.report.notes
    assert note in found.notes


def test_a_data_set_serves_quantize_and_verify(tmp_path: Path) -> None:
    given = TensorDataset(IMAGES, LABELS)

    q = calque.quantize(networks.small(), given, recipe="nearest")
    calque.export_onnx(q, tmp_path / "model.onnx")

    assert q.report.calibration_rows == calque.verify(tmp_path / "model.onnx", q, given, bound=0).inputs == 120
    expected = calque.quantize(networks.small(), IMAGES, recipe="nearest").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in q.state_dict().items())

"""Which ONNX Runtime a file asks for, and what is said where an older one is installed."""

import logging
import tomllib
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from torch import nn

import calque
import networks
from calque.errors import VerificationError
from calque.quantized.model import QuantizedModel
from calque.shipping.releases import NEWEST, READS, need, too_old
from calque.shipping.verify import run_onnx

X = networks.images(16, seed=0)


def quantized(bits: str) -> QuantizedModel:
    return calque.quantize(networks.small(), X, bits=bits, recipe="nearest", first_last=None)


def exported(bits: str, folder: Path) -> onnx.ModelProto:
    return onnx.load(calque.export_onnx(quantized(bits), folder / "model.onnx"))


def made(nodes: list[onnx.NodeProto], kind: int = TensorProto.FLOAT, opset: int = 21, ir: int = 10) -> onnx.ModelProto:
    constant = helper.make_tensor("c", kind, [], [1])
    return helper.make_model(
        helper.make_graph(nodes, "g", [], [], [constant]), opset_imports=[helper.make_opsetid("", opset)], ir_version=ir
    )


@pytest.mark.parametrize(
    ("bits", "release"), [("w8a8", (1, 18)), ("w3a8", (1, 18)), ("w4a8", (1, 23)), ("w8a4", (1, 24)), ("w4", (1, 23))]
)
def test_bits_ask_for_the_first_release_that_reads_them(bits: str, release: tuple[int, int], tmp_path: Path) -> None:
    assert need(exported(bits, tmp_path)).release == release


def test_groups_ask_for_kernels_of_their_width(tmp_path: Path) -> None:
    model = networks.seeded(nn.Sequential(nn.Linear(32, 8)))
    x = networks.images(4, seed=0).reshape(-1, 32)

    found = {
        bits: need(
            onnx.load(
                calque.export_onnx(
                    calque.quantize(model, x, bits=bits, recipe="nearest", first_last=None), tmp_path / "g"
                )
            )
        )
        for bits in ("w4", "w4g32", "w8g32")
    }

    assert {bits: each.release for bits, each in found.items()} == {"w4": (1, 19), "w4g32": (1, 19), "w8g32": (1, 23)}


def test_opsets_and_ir_versions_are_read_up_to_the_highest_of_a_release() -> None:
    relu = [helper.make_node("Relu", ["c"], ["y"])]

    for release, (opset, version) in READS.items():
        assert need(made(relu, opset=opset, ir=8)).release == release
        assert need(made(relu, opset=13, ir=version)).release <= release
    assert need(made(relu, opset=99)).release > NEWEST
    assert need(made(relu, ir=99)).release > NEWEST


def test_operators_inside_branches_count() -> None:
    inner = helper.make_graph(
        [helper.make_node("Min", ["low", "low"], ["y"])],
        "b",
        [],
        [],
        [helper.make_tensor("low", TensorProto.UINT8, [], [1])],
    )

    asked = need(made([helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], TensorProto.BOOL))

    assert asked.release == (1, 24)
    assert "Min of 8-bit integers" in asked.reason


@pytest.mark.parametrize(
    ("installed", "fits"),
    [("1.20.1", False), ("1.23.2", False), ("1.24.0", True), ("1.32.0", True), ("2.0.0.dev1", True), ("unknown", True)],
)
def test_a_release_is_too_old_where_it_is_in_front_of_the_first_one(installed: str, fits: bool) -> None:
    reason = too_old(made([helper.make_node("Min", ["c", "c"], ["y"])], TensorProto.UINT8), installed)

    assert (reason is None) == fits
    assert fits or reason == (
        "the file needs ONNX Runtime 1.24 or newer (Min of 8-bit integers, which activations below 8 bits have), and "
        f"{installed} is installed"
    )


def test_the_installed_release_reads_what_is_exported(tmp_path: Path) -> None:
    assert too_old(exported("w4a4", tmp_path), ort.__version__) is None


def test_what_runs_a_file_refuses_one_that_the_installed_release_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = quantized("w4a4")
    file = calque.export_onnx(q, tmp_path / "model.onnx")
    monkeypatch.setattr(ort, "__version__", "1.20.1")

    for run in (
        lambda: calque.verify(file, q, X), lambda: calque.OnnxModel(file, q), lambda: run_onnx(file, [X]),
    ):  # fmt: skip
        with pytest.raises(
            VerificationError, match=r"needs ONNX Runtime 1\.24 or newer.*1\.20\.1 is installed.*upgrade"
        ):
            run()


def test_export_keeps_a_file_that_the_installed_release_cannot_read_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q = quantized("w4a4")
    known = calque.export_onnx(q, tmp_path / "known.onnx").read_bytes()
    assert not caplog.records
    monkeypatch.setattr(ort, "__version__", "1.20.1")

    with caplog.at_level(logging.WARNING, logger="calque"):
        file = calque.export_onnx(q, tmp_path / "model.onnx")

    assert file.read_bytes() == known
    assert [
        record.getMessage().startswith("model.onnx: the file needs ONNX Runtime 1.24") for record in caplog.records
    ] == [True]


def test_the_oldest_versions_that_are_tested_are_the_declared_ones() -> None:
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lines = (root / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))

    bounds = dict(dependency.split(">=") for dependency in declared)

    assert bounds.keys() <= tested.keys()
    assert [name for name, bound in bounds.items() if not f"{tested[name]}.".startswith(f"{bound}.")] == []

"""The exported file against the network it was made from, in ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import calque
import networks
from calque.errors import ExportError, VerificationError
from calque.grid.bits import Placement
from calque.shipping.decoding import pack
from calque.shipping.verify import count_kernels, run_onnx
from networks import Exported, Net
from slow import slow

BITS = ["w8a8", slow("w7a8"), slow("w6a6"), slow("w5a8"), "w4a8", "w4a4", slow("w4a2"), "w3a4", slow("w2a8")]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("placement", ["integer", "inputs"])
def test_the_file_computes_the_exact_integer_evaluation(
    test_inputs: Tensor, bits: str, placement: Placement, exported: Exported
) -> None:
    q, path = exported(bits=bits, placement=placement)

    result = calque.verify(path, q, test_inputs)

    assert result.inputs == len(test_inputs)
    assert result.optimized.exact >= 0.99
    assert result.plain is not None
    assert result.plain.exact >= 0.97
    assert result.outside.exact >= 0.97
    if placement == "integer":
        assert result.optimized.parted == ""
        assert result.optimized.largest_steps == 0
        assert result.integer_kernels["QLinearConv"] == 4
        assert result.integer_kernels["QGemm"] == 1
        assert not result.float_kernels


def test_a_file_of_another_network_does_not_agree(test_inputs: Tensor, exported: Exported) -> None:
    q, (_, path) = exported(bits="w4a4")[0], exported(bits="w8a8")

    result = calque.verify(path, q, test_inputs, bound=0)

    assert result.optimized.parted
    assert result.optimized.largest_steps > 1


@pytest.mark.parametrize("rows", [1, 7])
def test_the_batch_axis_is_free(calibration: Tensor, rows: int, exported: Exported) -> None:
    _, path = exported(bits="w4a8")

    assert run_onnx(path, [calibration[:rows]]).shape == (rows, networks.CLASSES)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_dynamic_axes_stay_free(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.b(F.relu(net.a(x))), a=nn.Conv2d(1, 4, 3, padding=1), b=nn.Conv2d(4, 1, 3, padding=1))
    axis = torch.export.Dim.AUTO
    q = calque.quantize(net, networks.images(32, seed=0), recipe="nearest", dynamic={"x": {2: axis, 3: axis}})
    path = calque.export_onnx(q, tmp_path / "model.onnx")
    larger = networks.images(3, seed=1, side=13)

    torch.testing.assert_close(run_onnx(path, [larger]), q.integer()(larger), rtol=0, atol=0)


def wide(net: Net, x: Tensor) -> Tensor:
    y = F.silu(net.a(net.pad(x)))
    y = torch.cat([F.max_pool2d(F.relu6(net.b(y)), 2), F.avg_pool2d(F.relu(net.c(y)), 2)], 1)
    tokens: Tensor = net.d(y.flatten(2).transpose(1, 2))  # a Linear on (N, T, C)
    return net.e(F.gelu(tokens).mean(1))  # type: ignore[no-any-return]


def test_pads_concatenations_pools_and_linear_layers_on_tokens_are_exported(tmp_path: Path) -> None:
    net = Net(
        wide,
        pad=nn.ZeroPad2d((1, 0, 0, 1)),
        a=nn.Conv2d(1, 6, 2),
        b=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        c=nn.Conv2d(6, 4, 3, padding=2, dilation=2),
        d=nn.Linear(10, 8),
        e=nn.Linear(8, 3),
    )
    inputs = networks.images(200, seed=0)
    q = calque.quantize(net, inputs, bits="w4a4", recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    result = calque.verify(path, q, inputs)

    assert result.integer_kernels["QLinearConv"] == 3
    assert result.integer_kernels["QGemm"] == 2
    assert {"Conv", "Gemm", "MatMul"}.isdisjoint(result.float_kernels)
    assert result.optimized.mean_steps < 2


def test_several_inputs_and_outputs_keep_their_names_and_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            x, y = F.relu(self.a(left)), F.relu(self.b(right))
            return {"sum": (x + y).mean((2, 3)), "first": x}

    net = networks.seeded(Two())
    left, right = networks.images(40, seed=0), networks.images(40, seed=1)
    q = calque.quantize(net, (left, right), recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    assert [value.name for value in onnx.load(path).graph.input] == ["left", "right"]
    torch.testing.assert_close(run_onnx(path, [left, right]), q(left, right)["sum"], rtol=0.05, atol=0.05)
    assert calque.verify(path, q, (left, right)).optimized.exact >= 0.97


def test_a_module_that_is_called_twice_has_its_codes_once_in_the_file(tmp_path: Path) -> None:
    net = Net(
        lambda net, x: net.c(F.relu(net.c(F.relu(net.stem(x))))), stem=nn.Conv2d(1, 32, 1), c=nn.Conv2d(32, 32, 3)
    )
    q = calque.quantize(net, networks.images(40, seed=0), first_last=None, bits="w4a8", recipe="nearest")
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    sizes = [tensor.dims for tensor in onnx.load(path).graph.initializer if list(tensor.dims) == [32, 32, 3, 3]]
    assert len(sizes) == 1


def test_four_bit_weights_are_packed_and_the_file_is_near_the_packed_ideal(exported: Exported) -> None:
    q, path = exported(bits="w4a4")

    weights = {t.name: t for t in onnx.load(path).graph.initializer if t.name.endswith("/codes")}
    assert weights["conv1/codes"].data_type == onnx.TensorProto.INT4
    np.testing.assert_array_equal(
        numpy_helper.to_array(weights["conv1/codes"]).astype(np.int8), q.layers["conv1"].codes.numpy()
    )
    assert path.stat().st_size <= 1.05 * q.report.size + 1500 * len(q.layers) + 20_000


def test_odd_counts_of_four_bit_codes_are_padded() -> None:
    assert pack(np.array([1, -1, 7], dtype=np.int8), 4).tolist() == [0xF1, 0x07]


def test_the_metadata_has_plan_and_versions(exported: Exported) -> None:
    _, path = exported(bits="w4a4")

    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert '"conv1":"w4a4"' in facts["calque.plan"]
    assert '"torch"' in facts["calque.versions"]
    assert '"recipe":"nearest"' in facts["calque.run"]


@pytest.mark.parametrize("bits", [2, 3, slow(5), slow(6), slow(7)])
def test_fields_of_codes_hold_every_code_in_its_bits(bits: int, exported: Exported) -> None:
    q, path = exported(bits=f"w{bits}a8")

    layer = q.layers["conv1"]
    parts = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if "conv1/packed" in t.name}
    stored = 8 * sum(part.nbytes for part in parts.values())
    assert layer.codes.numel() * bits <= stored < (layer.codes.numel() + 8) * bits
    assert path.stat().st_size <= 1.05 * q.report.size + 1500 * len(q.layers) + 20_000


class Tokens(nn.Module):
    """A convolution, then products on (N, positions, C) and on (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.mix = nn.Linear(16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.mix(torch.relu(self.stem(x)).flatten(2).transpose(1, 2)))
        result: Tensor = self.head(y.mean(1))
        return result


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_alone_are_read_packed_by_products_and_become_float_at_load_elsewhere(
    tmp_path: Path, bits: int
) -> None:
    net = networks.seeded(Tokens())
    images = networks.images(64, seed=1)
    q = calque.quantize(net, images, bits=f"w{bits}", recipe="nearest", first_last=None)
    path = calque.export_onnx(q, tmp_path / "model.onnx")

    result = calque.verify(path, q, images)

    assert result.plain is not None
    assert result.optimized.exact == result.plain.exact == 1
    assert result.optimized.mean_steps < 1e-3
    assert result.float_kernels.get("MatMulNBits", 0) == (2 if bits == 4 else 0)
    assert "DequantizeLinear" not in result.other_kernels
    assert ("session.qdq_matmulnbits_accuracy_level" in str(result)) == (bits == 4)
    assert path.stat().st_size <= 1.05 * q.report.size + 1500 * len(q.layers) + 20_000


class Bessel(nn.Module):
    """A network with an operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.special.i1e(torch.relu(self.stem(x))).flatten(1))
        return result


def test_an_operator_without_a_translation_is_named_with_the_layer_in_front_of_it(tmp_path: Path) -> None:
    q = calque.quantize(networks.seeded(Bessel()), networks.images(32, seed=0), recipe="nearest")

    with pytest.raises(
        ExportError, match=r"cannot translate the operator aten\.special_i1e\.default \(behind layer stem\)"
    ):
        calque.export_onnx(q, tmp_path / "model.onnx")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [0, slow(1), slow(2), slow(3)])
def test_any_plan_of_a_network_with_adds_and_pools_exports_exactly(
    test_inputs: Tensor, seed: int, exported: Exported
) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = list(exported(bits="w8a8")[0].layers)
    weights, activations = (torch.randint(low, 9, (len(names),), generator=generator).tolist() for low in (2, 3))
    lines = [f'"{name}" = "w{w}a{a}"' for name, w, a in zip(names, weights, activations, strict=True)]
    plan = calque.Plan.parse("[plan]\n" + "\n".join(lines))
    q, path = exported(plan=plan)

    result = calque.verify(path, q, test_inputs)

    assert result.optimized.parted == ""
    assert result.optimized.largest_steps == 0
    assert not result.float_kernels


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("stem", "w3"), ("conv1", "w4"), ("head", "w8"), slow("stem", "w4"), slow("stem", "w8"), slow("conv1", "w3"),
        slow("conv1", "w8"), slow("head", "w3"), slow("head", "w4"),
    ],
)  # fmt: skip
def test_a_layer_of_weights_alone_among_quantized_ones_is_verified(
    test_inputs: Tensor, name: str, bits: str, exported: Exported
) -> None:
    q, path = exported(bits="w4a8", override={name: bits})

    result = calque.verify(path, q, test_inputs)

    assert q.layers[name].bias_scale is None
    assert result.optimized.exact >= 0.99
    torch.testing.assert_close(q.integer()(test_inputs), q(test_inputs))


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path: Path, calibration: Tensor, exported: Exported) -> None:
    q, _ = exported(bits="w8a8")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        calque.export_onnx(q, tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(FileNotFoundError, match=r"no\.onnx"):
        calque.verify(tmp_path / "no.onnx", q, calibration)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(VerificationError, match=r"text\.onnx is not an ONNX file"):
        calque.verify(tmp_path / "text.onnx", q, calibration)


def test_kernels_are_counted_by_name(exported: Exported) -> None:
    _, path = exported(override={"head": None})

    integer, floats, other = count_kernels(path)

    assert integer["QLinearConv"] == 4
    assert floats["Gemm"] == 1
    assert other["QuantizeLinear"] >= 1


def test_a_verification_reads_as_a_table_and_as_json(tmp_path: Path, trained: nn.Module, calibration: Tensor) -> None:
    q = calque.quantize(trained, calibration, recipe="nearest")
    result = calque.verify(calque.export_onnx(q, tmp_path / "model.onnx"), q, calibration)

    assert "integer kernels: 1 QGemm" in str(result)
    assert '"file_bytes"' in result.to_json()

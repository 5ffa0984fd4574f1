"""What is no float network in Python is refused with what to pass in its place."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

import calque
import networks
from calque.errors import CalibrationError, CaptureError
from calque.quantized.admission import require_original

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(net())


def traced() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net(), X)  # type: ignore[no-untyped-call]


def prepared() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = net()
        model.qconfig = torch.ao.quantization.get_default_qconfig("x86")  # type: ignore[no-untyped-call]
        result: nn.Module = torch.ao.quantization.prepare(model)  # type: ignore[no-untyped-call]
        return result


def dynamic() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: nn.Module = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})  # type: ignore[no-untyped-call]
        return result


def compiled() -> Any:
    return torch.compile(net(), backend="eager")


REFUSED = [
    (scripted, "the network .* compiled by torch.jit.* original Python module"),
    (traced, "the network .* compiled by torch.jit"),
    (lambda: nn.Sequential(net(), scripted()), "module 1 .* compiled by torch.jit"),
    (lambda: nn.DataParallel(net()), r"wrapped in DataParallel.* Pass model\.module\."),
    (lambda: nn.Sequential(nn.DataParallel(net())), r'set_submodule\("0", model\.get_submodule\("0"\)\.module\)'),
    (compiled, r"wrapped in OptimizedModule.* Pass model\._orig_mod\."),
    (lambda: nn.Sequential(compiled()), r'get_submodule\("0"\)\._orig_mod'),
    (prepared, r"module 0\.activation_post_process .*torch\.ao already"),
    (dynamic, r"module 0 .*quantized\.dynamic.*torch\.ao already"),
    (lambda: nn.Sequential(nn.LazyLinear(2)), "weight of module 0 has no shape yet. Call the network once"),
    (lambda: nn.Linear, "Got the class Linear; pass an instance"),
    (lambda: net().state_dict(), r"Got OrderedDict of tensors; build the network, load them"),
    (lambda: [net()], r"Got list of modules; pass one module"),
    (lambda: torch.relu, "pass the module that it calls"),
    (lambda: torch.export.export(net(), (X,)), "Got ExportedProgram; pass the module that was exported"),
    (lambda: None, "Got NoneType; pass the float network"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_another_form_of_network_is_refused_with_what_to_pass(make: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        calque.quantize(make(), X, recipe="nearest")


def test_a_remedy_that_is_named_works() -> None:
    inside = net()
    model = nn.Sequential(nn.DataParallel(inside), nn.Linear(2, 2))

    model.set_submodule("0", model.get_submodule("0").module)  # type: ignore[arg-type]  # a module, in a DataParallel

    assert model[0] is inside

    require_original(model)


def test_what_calque_quantized_is_refused_whole_or_as_a_part(tmp_path: Path) -> None:
    q = calque.quantize(net(), X, recipe="nearest")
    calque.save(q, tmp_path / "q")

    for model in (q, nn.Sequential(q, nn.Linear(2, 2)), q.graph_module):
        with pytest.raises(CaptureError, match="quantized by calque already"):
            calque.quantize(model, X, recipe="nearest")
    with pytest.raises(CaptureError, match="Pass the float network"):
        calque.load(tmp_path / "q", q)
    with pytest.raises(CaptureError, match=r"Pass model\.module"):
        calque.load(tmp_path / "q", nn.DataParallel(net()))


class Marked(nn.Module):
    """Float, with the marks of a network that is to be quantized by torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.layer, self.sum = nn.Linear(4, 4), FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        result: Tensor = self.end(self.sum.add(self.layer(x), x))
        return result


@pytest.mark.parametrize(
    "model",
    [
        Marked,
        lambda: torch.export.export(net(), (X,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module(),
        lambda: torch.fx.symbolic_trace(net()),
    ],
)
def test_float_networks_of_other_kinds_are_quantized(model: Any) -> None:
    q = calque.quantize(model().eval() if isinstance(model, type) else model(), X, recipe="nearest")

    assert not isinstance(q, calque.PartlyQuantized)
    assert q.layers


def test_a_module_compiled_in_place_is_quantized() -> None:
    model = net()
    model[0].compile(backend="eager")

    assert list(calque.quantize(model, X, recipe="nearest").layers) == ["0", "2"]


def test_a_half_precision_network_is_told_its_own_remedy_and_not_its_inputs() -> None:
    with pytest.raises(CaptureError, match=r"0\.weight is torch\.float16\. Convert it with \.float"):
        calque.quantize(net().half(), X, recipe="nearest")
    with pytest.raises(CalibrationError, match="the model itself fails"):
        calque.quantize(net(), networks.images(4, seed=0), recipe="nearest")

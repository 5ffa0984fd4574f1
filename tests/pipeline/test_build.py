"""Networks at given bits: the targets of their channel statistics, and what each stage leaves alone."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calque
import calque.pipeline.build
import networks
from calque.calibration.channel_statistics import ChannelStatistics, trained_statistics
from calque.calibration.execution import Execution
from calque.calibration.job import Job
from calque.calibration.losses import kl
from calque.errors import CalibrationError
from calque.grid.bits import Placement
from calque.network import Network, WeightedLayer, capture
from calque.pipeline.build import float_outputs
from calque.quantized.modules import QuantizedLayer
from calque.recipe import FAST, NEAREST, Normalization
from calque.run.spill import Store
from networks import Net

TRAINED = replace(NEAREST, normalization=Normalization("trained"))
INPUTS = networks.images(64, seed=0)


def normed(net: Net, x: Tensor) -> Tensor:
    """A convolution with a norm, one without, and a norm without gain and shift."""
    x = F.relu(net.norm1(net.one(x)))
    x = F.relu(net.two(x))
    x = F.relu(net.norm3(net.three(x)))
    y: Tensor = net.head(x.mean((2, 3)))
    return y


def partly() -> Net:
    return Net(
        normed, one=nn.Conv2d(1, 6, 3, padding=1), norm1=nn.BatchNorm2d(6), two=nn.Conv2d(6, 5, 3, padding=1),
        three=nn.Conv2d(5, 4, 3, padding=1), norm3=nn.BatchNorm2d(4, affine=False), head=nn.Linear(4, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Network:
    return capture(partly(), {"x": INPUTS[:4]}, {})


def test_the_trained_statistics_are_beta_and_gamma_of_the_folded_norms(network: Network) -> None:
    norm = partly().norm1

    found = trained_statistics(network)

    assert list(found) == ["one", "three"]
    assert torch.equal(found["one"].mean, norm.bias.double())
    assert torch.equal(found["one"].variance, norm.weight.double() ** 2)
    assert torch.equal(found["three"].mean, torch.zeros(4).double())  # what a norm without parameters gives
    assert torch.equal(found["three"].variance, torch.ones(4).double())


def test_the_trained_statistics_are_what_the_norms_training_inputs_gave() -> None:
    model = partly()
    model.train()
    with torch.no_grad():
        for _ in range(200):
            model(INPUTS)  # the running statistics become those of these inputs
    model.eval()
    network = capture(model, {"x": INPUTS[:4]}, {})

    found = outputs(network.module, INPUTS)

    for name, target in trained_statistics(network).items():
        torch.testing.assert_close(found[name].mean, target.mean, rtol=0.01, atol=0.01)
        torch.testing.assert_close(found[name].variance, target.variance, rtol=0.05, atol=0.01)


def outputs(module: torch.fx.GraphModule, x: Tensor) -> dict[str, ChannelStatistics]:
    """The statistics of each layer's real sums."""
    found = {}
    argument = next(node.name for node in module.graph.nodes if node.op == "placeholder")
    with Store(10**9) as store:
        execution = Execution(module, [{argument: x}], store)
        for node in module.graph.nodes:
            part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(part, (QuantizedLayer, WeightedLayer)):
                raw = part.alone() if isinstance(part, QuantizedLayer) else part
                found[str(node.target)] = ChannelStatistics.of(execution.compute(node, raw), part.geometry)
            execution.step(node)
            execution.release(node)
    return found


def test_layers_with_norms_get_the_trained_statistics_and_those_without_are_left_alone() -> None:
    model = partly()
    # the calibration inputs are others than the running statistics are of, so that there is something to move
    q, plain = (calque.quantize(model, INPUTS, bits="w8a8", recipe=recipe) for recipe in (TRAINED, NEAREST))

    target = trained_statistics(capture(model, {"x": INPUTS[:4]}, {}))
    now = outputs(q.graph_module, INPUTS)
    before = outputs(plain.graph_module, INPUTS)
    for name in ("one", "three"):
        gain = (target[name].variance / before[name].variance).sqrt()
        reached = (gain > 0.5) & (gain < 2.0)
        if name == "one":
            assert reached.any()
            torch.testing.assert_close(now[name].mean, target[name].mean, rtol=0.01, atol=0.01)
            torch.testing.assert_close(
                now[name].variance[reached], target[name].variance[reached], rtol=0.02, atol=1e-4
            )
        assert not torch.equal(q.layers[name].scale, plain.layers[name].scale)
        assert torch.equal(q.layers[name].codes, plain.layers[name].codes)
    for name in ("two", "head"):
        for leaf in ("codes", "scale", "bias", "bias_scale"):
            assert torch.equal(getattr(q.layers[name], leaf), getattr(plain.layers[name], leaf)), name


def test_a_layer_that_stays_float_has_no_statistics_to_put_back() -> None:
    model = partly()

    q = calque.quantize(model, INPUTS, bits="w8a8", override={"one": None}, recipe=TRAINED, placement="inputs")
    with torch.no_grad():
        expected = F.relu(model.norm1(model.one(INPUTS)))
        (grid,) = [quantizer for name, quantizer in q.quantizers.items() if name == "two.input"]

    assert "one" not in q.layers
    assert grid.range[1] > 0.3 * expected.amax()


def test_a_layer_without_any_variance_keeps_its_gain() -> None:
    model = partly()
    with torch.no_grad():
        model.norm1.weight[2] = 0.0

    q, plain = (calque.quantize(model, INPUTS, bits="w8a8", recipe=recipe) for recipe in (TRAINED, NEAREST))

    assert q.layers["one"].scale[2] == plain.layers["one"].scale[2]
    assert torch.isfinite(q(INPUTS)).all()


def test_float_outputs_are_those_of_the_model_batch_by_batch(network: Network) -> None:
    parts = networks.pieces(INPUTS, [50, 14])
    job = Job(network, [{"x": part} for part in parts])

    found = float_outputs(job)

    for (received,), part in zip(found, parts, strict=True):
        torch.testing.assert_close(received, partly()(part), rtol=1e-4, atol=1e-5)


def test_a_batch_that_the_network_fails_on_is_named(network: Network) -> None:
    job = Job(network, [{"x": INPUTS}, {"x": networks.images(3, 0, channels=2)}])

    with pytest.raises(CalibrationError, match="the network fails on calibration batch 1"):
        float_outputs(job)


def test_guarded_statistics_end_where_the_outputs_are_closest(trained: networks.Residual, calibration: Tensor) -> None:
    recipes = {"none": replace(FAST, normalization=None), "guarded": FAST}
    reference = [trained(calibration).detach()]

    losses = {
        (bits, name): kl(reference, [calque.quantize(trained, calibration, bits=bits, recipe=recipe)(calibration)]).item()
        for bits in ("w2a2", "w3a2") for name, recipe in recipes.items()
    }  # fmt: skip

    assert losses["w2a2", "guarded"] < 0.9 * losses["w2a2", "none"]
    assert losses["w3a2", "guarded"] <= losses["w3a2", "none"] * (1 + 1e-6)  # where every step is given back


@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_statistics_are_judged_by_the_outputs_of_the_finished_network(
    trained: networks.Residual,
    calibration: Tensor,
    placement: Placement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = []
    judge = calque.pipeline.build._Judge.__call__

    def kept(self: calque.pipeline.build._Judge, outputs: Iterable[list[Tensor]]) -> None:
        judge(self, outputs)
        losses.append(self.loss)

    monkeypatch.setattr(calque.pipeline.build._Judge, "__call__", kept)
    q = calque.quantize(trained, networks.pieces(calibration, [100, 28]), bits="w3a3", recipe=FAST, placement=placement)

    assert len(losses) == 2
    assert kl([trained(calibration)], [q(calibration)]).item() == pytest.approx(min(losses), rel=0.02)


def test_guarded_statistics_are_undone_where_the_outputs_are_no_closer(
    trained: networks.Residual, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([1.0, 0.5, 1.0, 1.0])
    monkeypatch.setattr(
        calque.pipeline.build._Judge, "__call__", lambda judge, outputs: setattr(judge, "loss", next(values))
    )

    kept, undone = (calque.quantize(trained, calibration, bits="w3a3", recipe=FAST) for _ in range(2))
    plain = calque.quantize(trained, calibration, bits="w3a3", recipe=replace(FAST, normalization=None))

    assert torch.equal(undone(calibration), plain(calibration))
    assert not torch.equal(kept(calibration), plain(calibration))

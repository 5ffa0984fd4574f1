"""The pieces of a recipe: what each stage of a run is told, as data that checks itself."""

from dataclasses import dataclass
from typing import Literal

from calque.errors import SpecError
from calque.grid.ranges import ActivationRange, WeightRange
from calque.run.fields import number, whole
from calque.run.pieces import check_fields

TensorRange = Literal["minmax", "mean_minmax", "percentile", "least_squares"]
Patches = Literal["sampled", "all"]
Target = Literal["float", "guarded", "trained"]
Objective = Literal["outputs", "run", "kl", "mse"]
Optimizer = Literal["adam", "sgd"]
Moving = Literal["biases", "scales"]
Judge = Literal["run", "kl", "mse"]

# Far above what any run needs, and below what a slip of the finger makes of it.
MOST_STEPS, MOST_ROWS = 1_000_000, 65_536  # of an optimizer, of inputs per step
MOST_PRICED, MOST_FINALISTS = 1_000_000, 1000
MOST_TOLERANCE = 100
LEAST_RATE, MOST_RATE = 1e-12, 1e6
MOST_MINUTES = 10_080  # a week


@dataclass(frozen=True, slots=True)
class Ranges:
    """How the ranges of grids are estimated. Defaults: docs/experiments.md.

    Attributes:
        activation: estimator of the inputs of layers; "output" takes the least error of the layer's output.
        tensor: estimator of tensors that no layer owns (residual adds, pools, ...).
        weight: estimator of the weights' scales; the closed forms search their own, except those of embeddings.
        tolerance: of "output" and "least_squares": the widest range is taken whose error is at most this share above the least.

    Raises:
        SpecError: a value out of its range.
    """

    activation: ActivationRange = "output"
    tensor: TensorRange = "least_squares"
    weight: WeightRange = "output"
    tolerance: float = 0.3

    def __post_init__(self) -> None:
        check_fields(self, tolerance=number(0, MOST_TOLERANCE))


@dataclass(frozen=True, slots=True)
class Rates:
    """Adam's rates; `RelativeRates` or `AbsoluteRates` say in which unit.

    Attributes:
        weight, weight_scale, bias, activation_scale, zero_point: a rate each.

    Raises:
        SpecError: a rate out of its range.
    """

    weight: float
    weight_scale: float
    bias: float
    activation_scale: float
    zero_point: float

    def __post_init__(self) -> None:
        rate = number(LEAST_RATE, MOST_RATE)
        check_fields(self, weight=rate, weight_scale=rate, bias=rate, activation_scale=rate, zero_point=rate)


class RelativeRates(Rates):
    """Weights and the zero point move in levels of their grid, scales by their logarithm, the bias in standard deviations of
    the output. Each rate falls by a cosine.
    """

    __slots__ = ()


class AbsoluteRates(Rates):
    """Everything moves in units of the layer (`calque.fitting.units`): the scales as the ranges that they span, the zero
    point as the range's lower end. The rates are constant. The released code of Hubara et al. 2021 has real units; its rates
    are for values of about 1.
    """

    __slots__ = ()


# Chosen on calibration images of resnet20 and mobilenet_v1: docs/experiments.md.
RATES = RelativeRates(weight=0.01, weight_scale=3e-3, bias=1e-3, activation_scale=3e-3, zero_point=1e-2)


@dataclass(frozen=True, slots=True)
class Nearest:
    """Weights rounded to nearest; the bias is corrected."""


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """Second moments, GPTQ, then coordinate descent.

    Attributes:
        rounds: of coordinate descent, with scales refitted after each.

    Raises:
        SpecError: a value out of its range.
    """

    rounds: int = 3

    def __post_init__(self) -> None:
        check_fields(self, rounds=whole(1, MOST_STEPS))


@dataclass(frozen=True, slots=True)
class AdaQuant:
    """Gradient descent on weights, scales, zero point and bias.

    Attributes:
        steps: of Adam per layer.
        rates: its rates, relative or absolute.
        patches: what a step sees of each input: sampled output positions or all of them.

    Raises:
        SpecError: a value out of its range.
    """

    steps: int = 250
    rates: RelativeRates | AbsoluteRates = RATES
    patches: Patches = "sampled"

    def __post_init__(self) -> None:
        check_fields(self, steps=whole(1, MOST_STEPS))


Method = Nearest | ClosedForm | AdaQuant
"""How one layer is fitted to its float output."""


@dataclass(frozen=True, slots=True)
class Sequential:
    """Each layer sees the output of the quantized layers before it.

    Attributes:
        channel_scales: exponent of the channel scales that move over a ReLU or ReLU6 into the weights on both sides; 0 for
            none, also in front of linear layers, where the exponents are chosen by error
            (calque.fitting.channel_scales.smoothing).

    Raises:
        SpecError: a value out of its range.
    """

    channel_scales: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, channel_scales=number(0, 1))


@dataclass(frozen=True, slots=True)
class Parallel:
    """Each layer sees its float input: layers are independent, and any number of workers fit them."""


Flavour = Sequential | Parallel
"""What the layers of one network see."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """AdaQuant on whole blocks, after their layers.

    Attributes:
        steps: of Adam per block.
        rates: its rates.

    Raises:
        SpecError: a value out of its range.
    """

    steps: int
    rates: RelativeRates = RATES

    def __post_init__(self) -> None:
        check_fields(self, steps=whole(1, MOST_STEPS))


@dataclass(frozen=True, slots=True)
class Normalization:
    """The statistics of each layer's channels put back (para-normalization).

    Attributes:
        target: "float": the float network's on the same inputs. "guarded": the same with the square roots of the gains, kept
            where the outputs on calibration inputs are closer for it (KL of classes, else squared error). "trained": those
            of the trained batch norms, as in the paper.

    Raises:
        SpecError: a target that is none of these.
    """

    target: Target = "float"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Distillation:
    """The float network's outputs distilled into all parameters, end to end.

    Attributes:
        minutes: that it may take; its first steps are timed, and the report has the number of steps that came of it. 0 where
            the steps are given.
        steps: of Adam, whatever time they take; the number that a report has reproduces its run. 0 where the minutes are
            given.
        rows: inputs per step.
        mixup: probability with which an input is mixed with another one; inputs that are no float tensors are not.
        loss: "kl" or "mse" of the outputs, "run", the run's own, or "outputs": the sum of both where the outputs are scores
            of classes (N, C), else mse.
        rates: Adam's.

    Raises:
        SpecError: a value out of its range; neither minutes nor steps, or both.
    """

    minutes: float = 0
    steps: int = 0
    rows: int = 16
    mixup: float = 0.5
    loss: Objective = "outputs"
    rates: RelativeRates = RATES

    def __post_init__(self) -> None:
        check_fields(
            self,
            minutes=number(0, MOST_MINUTES),
            steps=whole(0, MOST_STEPS),
            rows=whole(1, MOST_ROWS),
            mixup=number(0, 1),
        )
        if (self.minutes > 0) == (self.steps > 0):
            raise SpecError(
                f"Distillation is bounded by minutes or by steps. Got {self.minutes} minutes and {self.steps} steps; set one "
                "of them to 0."
            )


@dataclass(frozen=True, slots=True)
class Tuning:
    """The biases tuned, end to end.

    Attributes:
        optimizer: "adam": relative units, cosine decay. "sgd": biases in real units, constant rate (the released code).
        steps: of the optimizer.
        rows: inputs per step.
        rate: of the biases, in standard deviations of the layer's output or (sgd) real units, and of the scales' logarithms.
        parameters: "biases", or "scales": a gain on each channel's weight scale as well.
        loss: the run's own, "mse" or (the paper) "kl" of the outputs.

    Raises:
        SpecError: a value out of its range.
    """

    optimizer: Optimizer = "adam"
    steps: int = 50
    rows: int = 32
    rate: float = 3e-3
    parameters: Moving = "scales"
    loss: Judge = "run"

    def __post_init__(self) -> None:
        check_fields(self, steps=whole(1, MOST_STEPS), rows=whole(1, MOST_ROWS), rate=number(LEAST_RATE, MOST_RATE))


@dataclass(frozen=True, slots=True)
class Search:
    """How bits are chosen under a budget; at fixed bits nothing reads it.

    Attributes:
        fit: of each layer at each candidate, on its float input, before the candidate is priced.
        priced_inputs: calibration inputs at most on which prices are measured.
        finalists: allocations that are built and measured as whole networks; the best is the result.

    Raises:
        SpecError: a value out of its range.
    """

    fit: Method = Nearest()
    priced_inputs: int = 128
    finalists: int = 3

    def __post_init__(self) -> None:
        check_fields(self, priced_inputs=whole(1, MOST_PRICED), finalists=whole(1, MOST_FINALISTS))

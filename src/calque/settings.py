"""What an optimizer of a recipe is set to, as data: rates, distillation, the tuning of biases."""

from dataclasses import dataclass
from typing import Literal, get_args

from calque.run.fields import choice, number, whole

MOST_STEPS, MOST_ROWS = 1_000_000, 65_536  # of an optimizer, of inputs per step
LEAST_RATE, MOST_RATE = 1e-12, 1e6
MOST_MINUTES = 10_080  # a week

Solver = Literal["adaquant", "closed_form"]
Objective = Literal["outputs", "run", "kl", "mse"]
Optimizer = Literal["adam", "sgd"]
Moving = Literal["biases", "scales"]
Judge = Literal["run", "kl", "mse"]


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Adam's rates.

    Attributes:
        weight, weight_scale, bias, activation_scale, zero_point: a rate each.
        unit: "relative": weights and the zero point in levels of their grid, scales by their logarithm, the bias in standard
            deviations of the output, each falling by a cosine. "absolute": everything in units of the layer
            (`calque.fitting.units`), the scales as the ranges that they span and the zero point as the range's lower end,
            constant. The released code of Hubara et al. 2021 has real units; its rates are for values of about 1.
    """

    weight: float
    weight_scale: float
    bias: float
    activation_scale: float
    zero_point: float
    unit: Literal["relative", "absolute"] = "relative"


@dataclass(frozen=True, slots=True)
class Distillation:
    """Settings of distillation.

    Attributes:
        minutes: that it may take, where `steps` is 0; its first steps are timed, and the report has the number of steps that
            came of it. 0 for no distillation.
        steps: of Adam, whatever time they take: the number that a report has reproduces its run.
        rows: inputs per step.
        mixup: probability with which an input is mixed with another one; inputs that are no float tensors are not.
        loss: "kl" or "mse" of the outputs, "run", the run's own, or "outputs": the sum of both where the outputs are scores
            of classes (N, C), else mse.

    Raises:
        SpecError: a value out of its range.
    """

    minutes: float
    steps: int
    rows: int
    mixup: float
    loss: Objective = "outputs"

    def __post_init__(self) -> None:
        choice(*get_args(Objective))("distillation.loss", self.loss)
        whole(0, MOST_STEPS)("distillation.steps", self.steps)
        whole(1, MOST_ROWS)("distillation.rows", self.rows)
        number(0, MOST_MINUTES)("distillation.minutes", self.minutes)
        number(0, 1)("distillation.mixup", self.mixup)

    def __bool__(self) -> bool:
        """Whether anything is distilled."""
        return self.steps > 0 or self.minutes > 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """Settings of bias tuning.

    Attributes:
        optimizer: "adam": relative units, cosine decay. "sgd": biases in real units, constant rate (the released code).
        steps: of the optimizer; 0 for no tuning.
        rows: inputs per step.
        rate: of the biases, in standard deviations of the layer's output or (sgd) real units, and of the scales' logarithms.
        parameters: "biases", or "scales": a gain on each channel's weight scale as well.
        loss: the run's own, "mse" or (the paper) "kl" of the outputs.

    Raises:
        SpecError: a value out of its range.
    """

    optimizer: Optimizer
    steps: int
    rows: int
    rate: float
    parameters: Moving
    loss: Judge = "run"

    def __post_init__(self) -> None:
        for field, kind in {"optimizer": Optimizer, "parameters": Moving, "loss": Judge}.items():
            choice(*get_args(kind))(f"tuning.{field}", getattr(self, field))
        whole(0, MOST_STEPS)("tuning.steps", self.steps)
        whole(1, MOST_ROWS)("tuning.rows", self.rows)
        number(LEAST_RATE, MOST_RATE)("tuning.rate", self.rate)

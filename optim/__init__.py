"""Optimizers, parameter groups, averaged weights, the learning rate as a function of the step."""

from optim.average import ScheduleFreeWeights, WeightAverage, build_average
from optim.build import add_parameters, build_optimizer, start_state
from optim.learning_rate import lr_at, set_lr
from optim.muon import Muon

__all__ = [
    "Muon", "ScheduleFreeWeights", "WeightAverage", "add_parameters", "build_average",
    "build_optimizer", "lr_at", "set_lr", "start_state",
]  # fmt: skip

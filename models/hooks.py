"""What a model may offer the trainer beside its forward. All of it is optional: nobody inherits.

A class that has the methods or attributes of one of these protocols is treated accordingly, a
learner's own too. Everything else that the trainer knows of a model stands in the table of
models/__init__.py.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class StartsFromData(Protocol):
    """Some of its weights are computed from the images, before training starts."""

    def start_from_data(self, images: Tensor) -> None:
        """Set them from the first training images, float (n, 3, S, S), normalised.

        Called on the main process, which sends the weights to all; not for a run that starts from
        given weights.
        """
        ...


@runtime_checkable
class HasMuonGroups(Protocol):
    """It knows which of its weights the optimizer muon shall turn, and at which rates."""

    def muon_groups(self) -> list[dict]:
        """Parameter groups for optim.Muon.

        "params" with any of "orthogonal", "hold_length", "lr_scale" (a factor of the run's rate),
        "momentum" and "weight_decay".
        """
        ...


@runtime_checkable
class WeighsAuxiliaryHeads(Protocol):
    """In training it answers (logits, auxiliary logits, ...), each of which adds to the loss."""

    auxiliary_weight: float  # beside the head's 1; 0.3 for a model that does not say


@runtime_checkable
class NamesAuxiliaryHeads(Protocol):
    """Fine-tuned for other classes, it needs more than its last layer anew."""

    auxiliary_heads: tuple[str, ...]  # submodules, as get_submodule() takes them

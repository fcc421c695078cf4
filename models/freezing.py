"""What of a model is frozen in which epoch: --freeze, and --unfreeze, which lets go of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from common.errors import UserError
from common.text import did_you_mean, some
from models.weights import freeze, hold_frozen, let_go, named


@dataclass(frozen=True)
class Stage:
    """From `epoch` (counted from 0) on these parameters train; `what` is what was typed."""

    epoch: int
    what: str
    names: tuple[str, ...]


class Frozen:
    """What is frozen of a model, as a function of the epoch."""

    def __init__(
        self, model: nn.Module, what: str, later: Sequence[tuple[int, Sequence[str]]], name: str,
        image_size: int,
    ) -> None:  # fmt: skip
        """Freezes the model; `later` are epochs, from 0, with the patterns that train from then on.

        Raises UserError where a pattern names nothing, or nothing that is frozen.
        """
        before = _trainable(model)
        self._freeze = partial(freeze, what=what, name=name, image_size=image_size)
        self._freeze(model)
        self.names = before - _trainable(model)
        self.stages = tuple(_stages(model, later, self.names))

    @property
    def last_epoch(self) -> int:
        """The epoch from which on nothing changes any more."""
        return self.stages[-1].epoch if self.stages else 0

    def at(self, epoch: int) -> set[str]:
        """The names of what is frozen in an epoch."""
        return self.names.difference(*(s.names for s in self.stages if s.epoch <= epoch))

    def hold(self, model: nn.Module, epoch: int) -> list[nn.Parameter]:
        """Freeze what is frozen in an epoch, and nothing else; the parameters that begin to train.

        What trains again leaves evaluation mode with the next train().
        """
        frozen, fresh = self.at(epoch), []
        for name, p in model.named_parameters():
            if name in self.names:
                fresh += [p] * (name not in frozen and not p.requires_grad)
                p.requires_grad_(name not in frozen)
        let_go(model)
        if frozen == self.names:
            self._freeze(model)  # of a backbone, layers without parameters too
        else:
            hold_frozen(model, "", frozen)
        return fresh


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _stages(
    model: nn.Module, later: Sequence[tuple[int, Sequence[str]]], frozen: set[str]
) -> Iterable[Stage]:
    left, modules = set(frozen), [path for path, _ in model.named_modules() if path]
    for epoch, patterns in later:
        names: set[str] = set()
        for pattern in patterns:
            found = left if pattern == "all" else named(pattern, left)
            if not found:
                near = did_you_mean(pattern.rstrip(".*"), [*modules, *frozen])
                parts = some(list(dict.fromkeys(name.partition(".")[0] for name in sorted(left))))
                raise UserError(
                    f"--unfreeze {epoch + 1}:{pattern}: nothing that is frozen then has such a "
                    f"name{near}; frozen are {parts or 'none'}",
                    code="nothing-to-freeze",
                )
            names |= found
        left -= names
        order = (name for name, _ in model.named_parameters())
        yield Stage(epoch, ",".join(patterns), tuple(name for name in order if name in names))

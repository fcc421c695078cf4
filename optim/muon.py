"""Muon: momentum made orthogonal, one filter or all filters of a group together."""

import torch
from torch.optim.sgd import sgd

from optim.rows import as_stored


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for convolutions (Jordan et al., 2024), SGD for the rest.

    In a group with `orthogonal`, a filter (out, in, height, width) is a matrix of `out` rows, and
    its update is its Nesterov momentum made orthogonal: every direction moves equally far, by lr.
    `hold_length` keeps the filter's norm at sqrt(out), for filters that a norm layer follows.
    The other groups take Nesterov SGD steps. Where `found_inf` (0-dim, on the device) is 1,
    nothing changes. Gradients come without a gradient scaler's factor: unscale them before.

    On a GPU a group is updated in few operations over all of it, in the same way up to rounding.
    """

    found_inf: torch.Tensor | None = None
    _step_supports_amp_scaling = True  # else a gradient scaler would read found_inf, and wait

    def __init__(self, groups: list[dict], lr: float, momentum: float):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"orthogonal": False, "hold_length": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and parameters[0].is_cuda:
                self._update_together(parameters, group)
                continue
            for p in parameters:
                self._update(p, group)

    def _momentum(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _update(self, p: torch.Tensor, group: dict) -> None:
        lr, decay, beta = group["lr"], group["weight_decay"], group["momentum"]
        old = self._momentum(p)
        assert p.grad is not None
        gradient = p.grad if group["orthogonal"] else p.grad.add(p, alpha=decay)
        momentum = gradient.add(old, alpha=beta)
        change = gradient.add(momentum, alpha=beta)
        weight = p
        if group["orthogonal"]:
            change = orthogonal(change.flatten(1)).view(p.shape)
            scale = len(p) ** 0.5 / p.norm() if group["hold_length"] else 1 - lr * decay
            weight = p * scale
        weight = weight.sub(change, alpha=lr)
        if self.found_inf is not None:
            bad = self.found_inf > 0
            momentum, weight = torch.where(bad, old, momentum), torch.where(bad, p, weight)
        old.copy_(momentum)
        p.copy_(weight)

    def _update_together(self, parameters: list[torch.Tensor], group: dict) -> None:
        lr, decay, beta = group["lr"], group["weight_decay"], group["momentum"]
        buffers = [self._momentum(p) for p in parameters]
        if not group["orthogonal"]:
            sgd(
                parameters, [p.grad for p in parameters if p.grad is not None], [*buffers],
                fused=True, found_inf=self.found_inf, weight_decay=decay, momentum=beta, lr=lr,
                dampening=0.0, nesterov=True, maximize=False,
            )  # fmt: skip
            return
        # One long row of all filters as they lie in memory, equal shapes side by side: the columns
        # of a filter's matrix may have any order, Muon turns them all alike.
        shapes = [(len(p), p[0].numel()) for p in parameters]
        order = sorted(range(len(shapes)), key=shapes.__getitem__)
        filters = [parameters[i] for i in order]
        weights = [as_stored(p, p).view(len(p), -1) for p in filters]
        olds = [as_stored(buffers[i], parameters[i]).view(shapes[i]) for i in order]
        gradients = [as_stored(p.grad, p) for p in filters if p.grad is not None]
        gradient = torch.cat([g.flatten() for g in gradients])
        weight = torch.cat([w.flatten() for w in weights])
        old = torch.cat([b.flatten() for b in olds])
        momentum = gradient.add(old, alpha=beta)
        change = gradient.add(momentum, alpha=beta)
        change = torch.cat([x.flatten() for x in orthogonal_stacks(_stacks(change, weights))])
        if group["hold_length"]:
            lengths = torch._foreach_norm(weights)
            lengths = torch.stack(torch._foreach_div(lengths, [len(w) ** 0.5 for w in weights]))
            stacks, moved = _stacks(weight, weights), []
            for stack, length in zip(stacks, lengths.split([len(x) for x in stacks]), strict=True):
                moved.append((stack / length[:, None, None]).flatten())
            moved = torch.cat(moved)
        else:
            moved = weight * (1 - lr * decay)
        moved = moved.sub_(change, alpha=lr)
        if self.found_inf is not None:
            bad = self.found_inf > 0
            momentum, moved = torch.where(bad, old, momentum), torch.where(bad, weight, moved)
        for mine, row in ((olds, momentum), (weights, moved)):
            parts = row.split([m.numel() for m in mine])
            torch._foreach_copy_(mine, [x.view_as(m) for x, m in zip(parts, mine, strict=True)])


def _stacks(row: torch.Tensor, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views (k, n, m) of a row that holds matrices, equal shapes side by side."""
    shapes = [m.shape for m in matrices]
    kinds = list(dict.fromkeys(shapes))
    parts = row.split([shapes.count(kind) * kind.numel() for kind in kinds])
    return [part.view(-1, *kind) for part, kind in zip(parts, kinds, strict=True)]


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # x <- a x + (b s + c s s) x with s = x x'
SMALLEST_SQUARE = 256  # smaller ones are filled up: on a GPU that costs less than more operations


def orthogonal(matrix: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """About the nearest (semi-)orthogonal matrix (n, m): singular values of 0.7 to 1.2.

    Newton-Schulz iterations whose polynomial is steep at 0 rather than exact at 1: three of them
    are enough for a direction of an update (Jordan et al., 2024).
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.float()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)


def orthogonal_stacks(stacks: list[torch.Tensor], steps: int = 3) -> list[torch.Tensor]:
    """`orthogonal` of each matrix in stacks (k, n, m), in as few operations as may be.

    An iteration multiplies x by a polynomial of the square x x'. The next square follows from this
    one alone, so all iterations are on squares, filled up with zeros and stacked together, and x is
    multiplied once, at the end.
    """
    a, b, c = NEWTON_SCHULZ
    wide = [x if x.shape[1] <= x.shape[2] else x.mT for x in stacks]
    sides = [max(SMALLEST_SQUARE, x.shape[1]) for x in wide]
    done: dict[int, torch.Tensor] = {}
    for side in dict.fromkeys(sides):
        mine = [i for i, other in enumerate(sides) if other == side]
        square = wide[0].new_zeros(sum(len(wide[i]) for i in mine), side, side)
        places = square.split([len(wide[i]) for i in mine])
        for i, place in zip(mine, places, strict=True):
            n = wide[i].shape[1]
            torch.bmm(wide[i], wide[i].mT, out=place[:, :n, :n])
        length = (square.diagonal(dim1=1, dim2=2).sum(1).sqrt() + 1e-7)[:, None, None]
        square /= length.square()
        factor = None
        for step in range(steps):
            polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            factor = polynomial if factor is None else polynomial @ factor
            if step < steps - 1:
                square = polynomial @ square @ polynomial
        assert factor is not None
        factor = factor / length
        for i, part in zip(mine, factor.split([len(wide[i]) for i in mine]), strict=True):
            n = wide[i].shape[1]
            done[i] = part[:, :n, :n] @ wide[i]
    return [done[i] if wide[i] is x else done[i].mT for i, x in enumerate(stacks)]

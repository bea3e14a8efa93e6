"""Reverts moves of weights along directions, from the weights after them: exact up to rounding."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .direction import Direction, rewrite

#: Smallest factor of a relative move that is reverted. What took a scale to its floor, or past 0, is not known.
LEAST_FACTOR = 2.0**-10


def relative(direction: Direction) -> bool:
    """Whether a direction moves values by a fraction of themselves."""
    return direction.scaling is not None and direction.scaling.relative


def take_back(
    theta: Tensor,
    direction: Direction,
    decay: float,
    move: Callable[[Tensor, int, int], Tensor] | None = None,
    away: Callable[[Tensor, int, int], None] | None = None,
) -> None:
    """``theta = round((theta - s) / decay)``, in place: reverts ``theta = round(decay * theta + s)``.

    Relative scales are divided by ``decay + s`` instead. 16-bit weights that were rounded stochastically come back
    exactly, unless they have changed their sign or exponent in between. Elements that a mask by magnitude (``sparse``)
    leaves out now stay as they are, including those that have left the mask by this very move.

    Args:
        theta: the weights after the move.
        direction: the direction of the move.
        decay: the factor for the weights, as it was applied.
        move: called with the direction's s and where it starts and stops; returns what was added to the weights
            instead of s. It may overwrite its argument.
        away: called first with the weights and where they start and stop; reverts in place a pull to an anchor that
            came after the move. Not for relative scales.
    """
    divides = relative(direction)

    def change(weights: Tensor, s: Tensor, start: int, stop: int) -> None:
        added = s if move is None else move(s, start, stop)
        if divides:  # the weights are ones here, to be multiplied by what this leaves
            weights.mul_(decay).add_(added).clamp_(min=LEAST_FACTOR).reciprocal_()
            return
        if away is not None:
            away(weights, start, stop)
        weights.sub_(added)
        if decay != 1.0:
            weights.div_(decay)

    rewrite(theta, direction, change, back=True)

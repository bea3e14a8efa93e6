"""What processes have to know of each other's data: when it ends, and with "points" whether it is the same."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from .errors import RanksError
from .exchange import Exchange
from .probing import difference
from .targets import Slot

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")


def while_all_have(batches: Iterable[Batch], exchange: Exchange) -> Iterator[Batch]:
    """Yields the batches of this process as long as every process has one; all of them end at the same batch.

    Raises:
        RanksError: another process could not read its next batch.
        Exception: whatever reading the next one raises.
    """
    own, none = iter(batches), object()
    for count in itertools.count():
        try:
            batch = next(own, none)
        except BaseException as error:
            exchange.fail(error)
            raise
        without = [rank for rank, has in enumerate(exchange.everywhere(batch is not none)) if not has]
        if without:
            if len(without) < exchange.size:
                names = ", ".join(f"rank {rank}" for rank in without)
                logger.warning("%s has no batch left after %d of them: this loop ends in all processes", names, count)
            return
        yield batch  # type: ignore[misc]


def check_same(loss: Tensor | None, exchange: Exchange, slots: Sequence[Slot], eps: float) -> bool:
    """Compares the loss at one point, which all processes have measured, except for those whose query failed (None).

    Returns:
        Whether all of them have a loss; the same on every process.

    Raises:
        RanksError: they differ by more than rounding; on every process.
    """
    losses = exchange.everywhere(None if loss is None else loss.detach().cpu())
    if any(each is None for each in losses):
        return False
    other = next((rank for rank, each in enumerate(losses) if each.item() != losses[0].item()), None)
    if other is None or not all(math.isfinite(each.item()) for each in losses):
        return True
    said = f"{losses[0].item():.7g} on rank 0, and {losses[other].item():.7g} on rank {other}"
    if any(difference([losses[0]], [each], slots) for each in losses):
        raise RanksError(
            f"ranks='points' needs the same batch in every process, and at the same weights the first loss is {said}; "
            "give all of them the same batches (no distributed sampler, the same seed for shuffling and for dropout), "
            "or write ranks='directions', with which each has batches of its own"
        )
    logger.warning(
        "ranks='points': at the same weights the first loss is %s. Between devices of different kinds that is "
        "rounding, and changes projected gradients by up to %.2g; if all devices are of one kind, the batches differ",
        said,
        abs(losses[0].item() - losses[other].item()) / (2.0 * eps),
    )
    return True

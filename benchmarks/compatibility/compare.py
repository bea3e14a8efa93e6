"""Runs a case both ways and reports how closely they agree."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

import torch

from zo_core import ZOError

from .written_out import EPS, LR, Case, Run

EXACT, ROUNDING, REFUSED = "exact", "rounding", "refused"
WAYS = {"default": {}, "low_rank": {"noise": "low_rank"}, "offload": {"offload": "cpu"}}
#: A loss that a stop-gradient changes is off by about the gradient itself; curvature is far below this.
DETACHED = 0.02


@dataclass(frozen=True)
class Row:
    case: Case
    results: dict[str, str]
    said: str
    detached: float

    @property
    def fails(self) -> bool:
        wrong = [result for result in self.results.values() if result not in (EXACT, ROUNDING, REFUSED)]
        return bool(wrong) or (self.detached > DETACHED and not self.case.remark)


@contextmanager
def silence() -> Iterator[None]:
    """Suppresses what a trainer prints."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def row(case: Case, ways: list[str]) -> Row:
    """The case in some of the `WAYS`; defaults come first, they say how slots are called."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results, said = {}, ""
    run = None
    references: dict[str, Run] = {}
    for way in ways:
        settings = WAYS[way]
        try:
            with silence():
                mine = case.mine(**settings)
        except ZOError as error:
            results[way], said = REFUSED, said or str(error)
            continue
        except Exception as error:
            results[way] = f"{type(error).__name__}: {error}"
            continue
        run = run or mine
        noise = settings.get("noise", "rademacher")
        if noise not in references:
            with silence():
                references[noise] = case.written_out(noise, run.keys)
        results[way] = agreement(mine, references[noise])
    return Row(case, results, said, max((each.detached for each in references.values()), default=0.0))


def agreement(mine: Run, wanted: Run) -> str:
    """How closely two runs agree."""
    if wanted.untrained:
        return f"does not train {', '.join(wanted.untrained[:3])}"
    wanted_grads = wanted.grads[-len(mine.grads) :]  # without those of a tuner's trial runs
    same = [name for name, value in wanted.weights.items() if torch.equal(mine.weights[name], value)]
    if mine.grads == wanted_grads and len(same) == len(wanted.weights):
        return EXACT
    # A loss is accurate to some units in its last place, whatever the order of the sums.
    unit = torch.finfo(torch.float32).eps * max(1.0, *map(abs, wanted.losses)) / (2 * EPS)
    if any(abs(a - b) > 16 * unit for a, b in zip(mine.grads, wanted_grads, strict=True)):
        return f"differs: {mine.grads} for {wanted_grads}"
    near = 1e-6 + 32 * unit * LR
    far = [n for n, value in wanted.weights.items() if not (mine.weights[n].double() - value).abs().max() <= near]
    return f"weights differ: {', '.join(far[:3])}" if far else ROUNDING

"""Runs a case both ways and says how far they agree."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import torch

from zo_core import ZOError

from . import hugging_face
from .hugging_face import Case
from .written_out import EPS, LR, Run

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


def row(case: Case) -> Row:
    """The case with defaults, with low-rank noise, and streamed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results, said = {}, ""
    run = None
    references: dict[str, Run] = {}
    for way, settings in WAYS.items():
        try:
            mine = hugging_face.with_mixin(case, **settings)
        except ZOError as error:
            results[way], said = REFUSED, said or str(error)
            continue
        except Exception as error:
            results[way] = f"{type(error).__name__}: {error}"
            continue
        run = run or mine
        noise = settings.get("noise", "rademacher")
        if noise not in references:
            references[noise] = hugging_face.written_out(case, noise, run.keys)
        results[way] = agreement(mine, references[noise])
    return Row(case, results, said, max((each.detached for each in references.values()), default=0.0))


def agreement(mine: Run, wanted: Run) -> str:
    """How far two runs agree."""
    if wanted.untrained:
        return f"does not train {', '.join(wanted.untrained[:3])}"
    if len(mine.grads) != len(wanted.grads):
        return f"{len(mine.grads)} steps for {len(wanted.grads)}"
    same = [name for name, value in wanted.weights.items() if torch.equal(mine.weights[name], value)]
    if mine.grads == wanted.grads and len(same) == len(wanted.weights):
        return EXACT
    # A loss is right to some units in its last place, whatever the order of the sums.
    unit = torch.finfo(torch.float32).eps * max(map(abs, wanted.losses)) / (2 * EPS)
    if any(abs(a - b) > 16 * unit for a, b in zip(mine.grads, wanted.grads, strict=True)):
        return f"differs: {mine.grads} for {wanted.grads}"
    near = 1e-6 + 32 * unit * LR
    far = [n for n, value in wanted.weights.items() if not (mine.weights[n].double() - value).abs().max() <= near]
    return f"weights differ: {', '.join(far[:3])}" if far else ROUNDING

"""Law: what watches torch's operations sees those of streamed models, too."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import torch
from models import closure, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from zo_core import ZeroOrder
from zo_core.dispatch import declare, watched_by, watchers


class Seen(TorchDispatchMode):
    """Counts operations from when it is entered."""

    def __enter__(self) -> Seen:
        self.counts: Counter[str] = Counter()
        self.entered = getattr(self, "entered", 0) + 1
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"num_probes": 2}, {"noise": "low_rank"}], ids=str)
def test_a_streamed_step_has_the_flops_of_a_resident_one(settings: dict[str, Any]) -> None:
    flops = []
    for place in ({}, {"offload": "cpu"}):
        model = tiny("llama")
        zo = ZeroOrder(model, lr=1e-3, **settings, **place)
        for index in range(3):
            with FlopCounterMode(display=False) as counter:
                zo.step(closure("llama", model, index))
            flops.append(counter.get_total_flops())
        zo.close()
    assert flops[:3] == flops[3:]
    assert min(flops) > 0


def test_every_copy_is_seen_once_and_no_mode_is_entered_twice() -> None:
    seen = {}
    for place in ({}, {"offload": "cpu"}):
        model = tiny("llama", layers=3)
        zo = ZeroOrder(model, lr=1e-3, **place)
        with Seen() as mode:
            zo.step(closure("llama", model))
            zo.step(closure("llama", model))
            zo.flush()
        seen["streamed" if place else "resident"] = mode
    assert zo.streaming is not None
    block = zo.streaming.blocks[0]  # they are alike
    moved = (zo.streaming.bytes_read + zo.streaming.bytes_written) // block.nbytes
    copies = {name: mode.counts["aten::copy_"] for name, mode in seen.items()}
    assert copies["streamed"] - copies["resident"] == moved * len(block.holders) > 0
    assert [mode.entered for mode in seen.values()] == [1, 1]
    assert not watchers()
    zo.close()


def test_modes_that_are_lent_are_taken_back_after_an_error() -> None:
    outer, inner = Seen(), Seen()
    with outer, inner:
        modes = watchers()
    inside = []
    with suppress(KeyError), watched_by(modes):
        inside = list(watchers())
        torch.ones(1)
        raise KeyError
    assert inside == [outer, inner]
    assert not watchers()
    assert outer.counts == inner.counts == Counter({"aten::ones": 1})


def test_kernels_say_what_they_touch_only_to_those_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = torch.ones(2), torch.ones(3)
    found = []

    class Schema(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            written = [
                argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
            ]
            found.append((args, written))
            return func(*args, **(kwargs or {}))

    with Schema():
        declare([reads], [writes])
    assert found == [(([reads], [writes]), [False, True])]
    monkeypatch.setattr(torch.ops.zo, "launched", None)
    declare([reads], [writes])

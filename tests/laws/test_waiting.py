"""Law: probes whose closures wait do so at the same time, with the bits of those that run one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from black_boxes import INPUTS, Around, equal, plain, service, state
from models import closure, tiny
from torch import Tensor, nn

from zo_core import StateError, ZeroOrder


async def waits(model: Around, ask: Callable[[list[list[float]]], Awaitable[list[list[float]]]]) -> Tensor:
    noisy = INPUTS + torch.rand(INPUTS.shape)
    answer = await ask(model["before"](noisy).tolist())
    return (model["after"](torch.tensor(answer)) + torch.rand(1)).square().mean()


async def directly(numbers: list[list[float]]) -> list[list[float]]:
    return service(numbers)


async def in_a_thread(numbers: list[list[float]]) -> list[list[float]]:
    def ask() -> list[list[float]]:
        time.sleep(0.002 * (1 + abs(hash(str(numbers))) % 5))  # they end in another order
        return service(numbers)

    return await asyncio.to_thread(ask)


@pytest.mark.parametrize(
    "settings", [{}, {"noise": "low_rank"}, {"estimator": "fzoo"}, {"stack_probes": True, "noise": "low_rank"}]
)
def test_probes_that_wait_at_the_same_time_are_those_that_run_one_by_one(settings: dict[str, Any]) -> None:
    found = []
    for ask in (None, directly, in_a_thread):
        model = Around()
        torch.manual_seed(5)
        zo = ZeroOrder(model, num_probes=4, lr=1e-2, eps=0.1, **settings)

        def loss(model: Around = model, ask: Any = ask) -> Any:
            return waits(model, ask) if ask is not None else asyncio.run(waits(model, directly))  # which does not wait

        losses = [float(zo.step(loss)) for _ in range(3)]
        zo.close()
        found.append((losses, state(model), torch.rand(1).item()))
    for losses, weights, random in found[1:]:
        assert losses == found[0][0]
        assert equal(weights, found[0][1])
        assert random == found[0][2]


def test_a_streamed_model_waits_for_one_probe_at_a_time() -> None:
    found = []
    for offload in (None, "cpu"):
        model = tiny("llama")
        zo = ZeroOrder(model, lr=1e-3, offload=offload)
        loss = closure("llama", model)

        async def waiting(loss: Callable[[], Tensor] = loss) -> Tensor:
            await asyncio.sleep(0)
            return loss()

        zo.step(waiting)
        zo.close()
        found.append(state(model))
    assert equal(*found)


def test_all_members_of_a_population_wait_together() -> None:
    model, here = Around(), set()
    zo = ZeroOrder(model, estimator="es", num_probes=8, lr=1e-2, eps=0.1)
    zo.first_steps = None
    zo.oracle._checked = True  # type: ignore[union-attr]

    async def closure() -> Tensor:
        numbers = model["before"](INPUTS)
        here.add(id(numbers))
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(here) == 8
        return numbers.square().mean()  # type: ignore[no-any-return]

    assert zo.step(closure).skipped is None


def test_it_works_inside_of_an_event_loop_too() -> None:
    """As in notebooks."""
    model, other = Around(), Around()

    async def cell() -> None:
        zo = ZeroOrder(model, lr=1e-2, num_probes=2)
        for _ in range(2):
            zo.step(lambda: waits(model, directly))

    torch.manual_seed(0)
    asyncio.run(cell())
    torch.manual_seed(0)
    zo = ZeroOrder(other, lr=1e-2, num_probes=2)
    for _ in range(2):
        zo.step(lambda: waits(other, directly))
    assert equal(state(model), state(other))


def test_an_error_in_one_ends_the_others_and_leaves_everything_as_it_was() -> None:
    model, ended = Around(), []
    before, calls = state(model), iter(range(20))
    zo = ZeroOrder(model, estimator="es", num_probes=4, lr=1e-2)

    async def fails() -> float:
        call = next(calls)
        try:
            await asyncio.sleep(0 if call == 3 else 5)
            if call == 3:
                raise ValueError("a wrong answer")
        finally:
            ended.append(call)
        return 0.0

    zo.first_steps = None
    zo.oracle._checked = True  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="a wrong answer"):
        zo.step(fails)
    assert sorted(ended) == [0, 1, 2, 3]
    assert equal(state(model), before)
    zo.step(lambda: plain(model))


class Counts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize("case", ["autocast", "state"])
def test_what_others_would_see_while_a_closure_waits_is_an_error(case: str) -> None:
    model = Counts(3, 1) if case == "state" else nn.Linear(3, 1)
    before = state(model)

    async def closure() -> Tensor:
        if case == "state":
            loss = model(INPUTS).mean()
            await asyncio.sleep(0)
            return loss  # type: ignore[no-any-return]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(INPUTS).mean()
            await asyncio.sleep(0)
        return loss  # type: ignore[no-any-return]

    with pytest.raises(StateError, match="torch.autocast" if case == "autocast" else "changes buffers or attributes"):
        ZeroOrder(model).step(closure)
    assert equal(state(model), before)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("how", "layers", "offload"),
    [
        ("gather", False, None),
        ("create_task", False, None),
        ("create_task", True, None),
        ("to_thread", False, None),
        ("to_thread", True, "cpu"),
    ],
)
def test_a_model_that_is_called_in_a_task_or_thread_of_its_own_is_an_error(
    how: str, layers: bool, offload: str | None
) -> None:
    """Another probe may be computing there at that moment."""
    model = tiny("llama") if layers else Around()["after"]
    loss = closure("llama", model) if layers else lambda: model(torch.ones(2, 4)).square().mean()
    before = state(model)

    async def part() -> Tensor:
        await asyncio.sleep(0)
        return loss()

    async def whole() -> Tensor:
        loss()
        if how == "gather":
            return sum(await asyncio.gather(part(), part()))  # type: ignore[return-value]
        return await (asyncio.create_task(part()) if how == "create_task" else asyncio.to_thread(loss))

    zo = ZeroOrder(model, lr=1e-3, num_probes=2, offload=offload)
    for _ in range(2):  # of which the first probe of all waits by itself
        with pytest.raises(StateError, match="await a coroutine that calls it directly"):
            zo.step(whole)
        assert equal(state(model), before)
        zo.step(loss)
        before = state(model)
    zo.close()

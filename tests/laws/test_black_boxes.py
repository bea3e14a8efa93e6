"""Law: a loss may come from anywhere, and a query that fails costs its step and nothing else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from black_boxes import INPUTS, Around, equal, plain, state
from models import closure, tiny
from processes import together
from torch import Tensor, nn

from zo_core import ConfigError, ModelError, QueryError, SeedLog, ZeroOrder, retrying
from zo_core.seedlog import SeedLogWriter, replay

# Several modules


def test_parts_on_both_sides_of_a_black_box_learn() -> None:
    model = Around()
    before = state(model)
    zo = ZeroOrder(model, estimator="es", num_probes=8, eps=0.1, lr=0.02)
    losses = [float(zo.step(lambda: plain(model))) for _ in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("several", [[nn.Linear(1, 1)], (nn.Linear(1, 1),), {"a": nn.Linear(1, 1)}])
def test_several_modules_come_in_a_module(several: Any) -> None:
    with pytest.raises(ModelError, match=r"model is a (list|tuple|dict); pass torch.nn.ModuleList\(\[\.\.\.\]\)"):
        ZeroOrder(several)


# Queries that fail


def test_a_query_is_repeated_and_then_skips() -> None:
    calls: list[int] = []

    def ask(number: int, fails: int) -> int:
        calls.append(number)
        if len(calls) <= fails:
            raise TimeoutError("no answer in 2 s")
        return number

    assert retrying(ask, retries=2, pause=0)(7, fails=2) == 7
    assert calls == [7, 7, 7]
    calls.clear()
    with pytest.raises(QueryError, match="ask failed 2 times, the last time with TimeoutError: no answer in 2 s"):
        retrying(ask, retries=1, pause=0)(7, fails=2)
    with pytest.raises(TypeError):  # no failure of the service
        retrying(ask, pause=0)()  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"2 problems.*\n.*retries=-1 must.*\n.*pause='1' must"):
        retrying(ask, retries=-1, pause="1")  # type: ignore[arg-type]


def test_an_asynchronous_query_is_repeated_too() -> None:
    calls: list[int] = []

    class Service:
        async def ask(self, fails: int) -> int:
            calls.append(fails)
            await asyncio.sleep(0)
            if len(calls) <= fails:
                raise TimeoutError("no answer in 2 s")
            return 7

        async def __call__(self, fails: int) -> int:
            return await self.ask(fails)

    for query in (Service().ask, Service(), partial(Service().ask)):
        calls.clear()
        assert asyncio.run(retrying(query, retries=2, pause=0)(fails=2)) == 7
        assert len(calls) == 3
        calls.clear()
        with pytest.raises(QueryError, match="failed 2 times, the last time with TimeoutError: no answer in 2 s"):
            asyncio.run(retrying(query, retries=1, pause=0)(fails=2))


@pytest.mark.parametrize("estimator", ["spsa", "es", "conservative"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_query_that_fails_skips_the_step_and_leaves_no_trace(estimator: str, offload: str | None) -> None:
    settings: dict[str, Any] = {"estimator": estimator, "lr": 1e-3, "offload": offload, "dropout": True}
    settings["num_probes"] = 2 if estimator == "es" else 1
    found = []
    for failing in (True, False):
        model = tiny("llama")
        zo = ZeroOrder(model, **settings)
        zo.first_steps = None
        torch.manual_seed(3)
        loss = closure("llama", model)
        zo.step(loss)
        before, calls = state(model), iter(range(9))

        def fails(loss: Callable[[], Tensor] = loss, calls: Any = calls) -> Tensor:
            torch.rand(1)
            if next(calls) == 1:
                raise QueryError("the service is down")
            return loss()

        if failing:
            record = zo.step(fails)
            assert record.skipped == "the service is down"
            assert equal(state(model), before)
        else:
            zo.skip("the same without a query")
        zo.step(loss)
        zo.close()
        found.append((state(model), torch.rand(1).item()))
    assert equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_query_that_fails_in_the_second_round_skips_the_step() -> None:
    model = Around()
    before, calls = state(model), iter(range(9))
    zo = ZeroOrder(model, estimator="conservative", lr=1e-2)
    zo.first_steps = None

    def fails() -> float:
        if next(calls) == 3:
            raise QueryError("down")
        return model["before"](INPUTS).square().mean()  # type: ignore[no-any-return]

    assert zo.step(fails).skipped == "down"
    assert equal(state(model), before)


def test_all_processes_skip_the_step_whose_query_failed_in_one(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[bool], dict[str, Tensor]]:
        model, skipped = Around(), []
        zo = ZeroOrder(model, estimator="es", num_probes=4, lr=1e-2, eps=0.1)
        for step in range(3):

            def ask(step: int = step) -> float:
                if (rank, step) == (1, 1):
                    raise QueryError("down")
                return plain(model)

            skipped.append(zo.step(ask).skipped is not None)
        return skipped, state(model)

    (skipped, weights), (others, other) = together(work, tmp_path)
    assert skipped == others == [False, True, False]
    assert equal(weights, other)


def asking(model: Around, step: int, fails: Callable[[int], bool]) -> Callable[[], float]:
    """A closure that draws a random number, and whose query fails in some steps."""

    def ask() -> float:
        drawn = torch.rand(()).item()
        if fails(step):
            raise QueryError("down")
        return plain(model) + drawn

    return ask


def test_queries_that_fail_say_nothing_to_the_brake_of_a_run_or_of_one_that_repeats_it(tmp_path: Path) -> None:
    model, path = Around(), tmp_path / "log"
    zo = ZeroOrder(model, lr=1e-3, brake="rollback")
    log = SeedLogWriter.attach(zo, path)
    for step in range(12):
        record, failed = zo.step(asking(model, step, lambda step: 4 <= step < 10)), 4 <= step < 10
        assert (record.skipped, record.failed, record.rollback) == ("down" if failed else None, failed, None)
    log.close()
    assert zo.optimizer.factor == 1.0
    assert zo.braking.brake.infinite == 0
    whole, parsed = path.read_bytes(), SeedLog.read(path).parsed
    assert [entry.failed for entry in parsed.steps] == [4 <= step < 10 for step in range(12)]
    assert parsed.steps[5].why == "skipped without a loss"
    for cut in (12, 6):
        again = Around()
        other = ZeroOrder(again, lr=1e-3, brake="rollback")
        path.write_bytes(whole[: parsed.offsets[cut]] if cut < 12 else whole)  # the change-record of step 6 is there
        log = SeedLogWriter.attach(other, path, follow=True)
        while (entry := log.logged()) is not None:
            entry.repeat(other)
            assert other.apply().failed == entry.failed
        assert other.step_count == cut
        if cut == 12:
            assert equal(state(model), state(again))
            assert other.braking.saved() == zo.braking.saved()
        else:  # what was not done is not in the log that continues
            assert not other.step(asking(again, cut, lambda step: False)).failed
        log.close()
        assert not SeedLog.read(path).steps[6].failed or cut == 12


def test_steps_that_are_left_out_say_nothing_to_the_brake_of_a_run_or_of_one_that_repeats_it(tmp_path: Path) -> None:
    model, path, out = Around(), tmp_path / "log", range(4, 8)
    zo = ZeroOrder(model, lr=1e-3, brake="rollback")
    log = SeedLogWriter.attach(zo, path)
    for step in range(12):
        if step not in out:
            zo.step((lambda: plain(model) * math.nan) if step == 8 else asking(model, step, lambda step: False))
        else:
            before = zo.braking.brake.saved()
            with log.watching():
                zo.measure(asking(model, step, lambda step: False))
            record = zo.skip("no data")
            assert (record.skipped, record.failed) == ("no data", True)
            assert zo.braking.brake.saved() == before
    log.close()
    assert zo.optimizer.factor == 1.0
    entries = SeedLog.read(path).steps
    assert [entry.rollback for entry in entries] == [None] * 12
    assert [entry.failed for entry in entries] == [step in out for step in range(12)]
    assert [entry.draws for entry in entries] == [step in out for step in range(12)]  # and so has to be measured again
    resumed, replayed = (Around() for _ in range(2))
    other = ZeroOrder(resumed, lr=1e-3, brake="rollback")
    for entry in entries:
        entry.repeat(other)
        other.apply()
    replay(replayed, path)
    assert equal(state(model), state(resumed))
    assert equal(state(model), state(replayed))
    assert other.braking.saved() == zo.braking.saved()


class Remembers(Around):
    """Has a buffer, an attribute and a list that forwards change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(()))
        self.calls, self.seen = 0, list[float]()

    def forward(self) -> Tensor:
        drawn = torch.rand(INPUTS.shape)
        noisy = self["before"](INPUTS + drawn + self.center)
        self.center += drawn.mean()
        self.calls += 1
        self.seen.append(self.center.item())
        return (self["after"](noisy) - self.calls).square().mean()  # type: ignore[no-any-return]


def skips(rank: int | None, call: int, settings: dict[str, Any]) -> tuple[list[Any], dict[str, Tensor], Any]:
    """Three steps of two micro-batches; a call fails in step 1 on rank 1, and alone (None) the step is skipped."""
    model, grads = Remembers(), []
    torch.manual_seed(7)
    zo = ZeroOrder(model, lr=1e-3, **settings)
    for step in range(3):
        for part in range(2):
            calls = count(1)

            def ask(step: int = step, part: int = part, calls: Iterator[int] = calls) -> Tensor:
                loss = model()
                if next(calls) == call and (rank, step, part) == (1, 1, 1):
                    raise QueryError("down")
                return loss  # type: ignore[no-any-return]

            if rank is not None or step != 1:
                zo.measure(ask)
        record = zo.skip("down") if rank is None and step == 1 else zo.apply()
        grads.append((record.projected_grad, record.failed) if step != 1 else record.skipped is not None)
    return grads, state(model), (torch.rand(1).item(), model.calls, model.seen)


@pytest.mark.parametrize(("estimator", "call"), [("spsa", 1), ("conservative", 1), ("conservative", 2)])
def test_a_failed_query_leaves_no_trace_in_the_other_processes(estimator: str, call: int, tmp_path: Path) -> None:
    """With "points", all of them do what one process does that skips the step."""
    alone = skips(None, call, {"estimator": estimator})
    for grads, weights, beside in together(
        lambda rank: skips(rank, call, {"estimator": estimator, "ranks": "points"}), tmp_path
    ):
        assert grads == alone[0]
        assert equal(weights, alone[1])
        assert beside == alone[2]


@pytest.mark.parametrize("estimator", ["spsa", "conservative"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_query_that_fails_in_the_first_step_leaves_its_checks_to_the_next_one(
    estimator: str, call: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Call 1 is the one made in advance, call 2 the first of the step."""

    def work(rank: int) -> tuple[list[bool], list[str], dict[str, Tensor]]:
        model, calls = Around(), count(1)
        zo = ZeroOrder(model, lr=9.0, ranks="points", estimator=estimator)
        skipped = []
        for _ in range(3):
            changing = count()

            def ask(changing: Iterator[int] = changing) -> float:
                if next(calls) == call and rank == 1:
                    raise QueryError("down")
                return plain(model) + next(changing)

            zo.measure_all([ask, ask])
            skipped.append(zo.apply().failed)
        return skipped, [record.getMessage() for record in caplog.records], state(model)

    (failed, said, weights), (others, _, other) = together(work, tmp_path)
    assert failed == others == [True, False, False]
    assert equal(weights, other)
    assert sum("two different losses" in line or "returned the losses" in line for line in said) == 1
    assert sum("is far above the rates that work" in line for line in said) == (estimator == "spsa")


@pytest.mark.parametrize("call", [1, 2, 100])
@pytest.mark.parametrize("ranks", [False, True])
def test_a_query_that_fails_ends_the_search_for_a_rate(
    call: int, ranks: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run takes the rate that it has without a search, and one line says so."""

    def work(rank: int) -> tuple[list[bool], float, list[str], dict[str, Tensor]]:
        model, calls = Around(), count(1)
        torch.manual_seed(3)
        zo = ZeroOrder(model, lr="auto", ranks="points")

        def ask() -> float:
            if next(calls) == call and rank == 1:
                raise QueryError("down")
            return plain(model) + torch.rand(()).item()

        failed = [zo.step(ask).failed for _ in range(2)]
        return failed, zo.lr, [record.getMessage() for record in caplog.records], state(model)

    results = together(work, tmp_path) if ranks else [work(1)]
    for failed, lr, said, weights in results:
        assert failed == [False, False]
        assert lr == ZeroOrder(Around(), ranks="points").lr
        assert equal(weights, results[0][3])
        if said is results[0][2]:
            assert sum("a query failed during the search" in line for line in said) == 1

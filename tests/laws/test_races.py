"""Law: whatever a device does at the same time, no operation touches memory that another one is still using."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import batch, tiny
from race_scenarios import LIVES, OTHERS, dropped, engine, live, loaded, loss_of, misses, on_disk, whole_life
from simulated_device import CALLER, DEFAULT, POOL, Device
from simulated_streaming import simulated
from torch import nn

from zo_core import ambient
from zo_core.dispatch import declare

#: The streams on which `Copies` fetches and sends.
INCOMING, OUTGOING = DEFAULT + 1, DEFAULT + 2


def check(run: Callable[[], object], **how: Any) -> Device:
    with simulated(**how) as device:
        run()
        device.finish()
    return device


def assert_no_races(device: Device) -> None:
    assert not device.races, "\n".join(sorted(set(device.races))[:5])
    lines = (DEFAULT, INCOMING, OUTGOING) if device.streams else (CALLER, POOL)
    assert all(device.accesses[line] >= 4 for line in lines), "the device has not seen what it was there to see"


@pytest.mark.parametrize("life", LIVES, ids=str)
def test_a_life_without_races(life: tuple[str, str, str, int]) -> None:
    assert_no_races(check(lambda: live(*life, "cpu"), here=True))


@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_live_without_races(name: str) -> None:
    assert_no_races(check(lambda: OTHERS[name]("cpu"), here=True))


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "threads"])
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_threads_and_files_have_no_races(tier: str, streams: bool, tmp_path: Path) -> None:
    settings = on_disk(tmp_path) if tier == "disk" else {}
    assert_no_races(check(lambda: whole_life("cpu", 2, "llama", rule="momentum", **settings), streams=streams))


# The checker finds what is wrong

#: Waits without which no run has a race, and why.
REDUNDANT = {
    "_start_fetch: after += self._moments(block)": "its slot has another owner, who waited for the same copies",
}
#: On a CPU, too, because one thread makes all copies, one after another.
REDUNDANT_IN_ONE_THREAD = {**REDUNDANT, "_start_fetch: after += self._moments(oldest)": "see above"}

Life = Callable[..., None]


def short(**settings: Any) -> None:
    whole_life("cpu", 2, rule="momentum", **settings)


def jumpy(**settings: Any) -> None:
    misses("cpu", rule="momentum", **settings)


def replaced(**settings: Any) -> None:
    loaded("cpu", **settings)


def unnoticed(lives: tuple[Life, ...], folder: Path | None = None, **how: Any) -> tuple[set[str], set[str]]:
    """The lines that record an event or wait for one, and those that no life misses if they are left out."""
    settings = {} if folder is None else on_disk(folder)
    sites: set[str] = set()
    noticed: set[str] = set()
    for life in lives:
        found = check(lambda life=life: life(**settings), **how)
        assert not found.races
        sites |= found.sites
        for site in sorted(found.sites - noticed):
            if check(lambda life=life: life(**settings), without=site, **how).races:
                noticed.add(site)
    return sites, sites - noticed


@pytest.mark.parametrize(
    "here",
    [pytest.param(True, id="begun by the caller", marks=pytest.mark.slow), pytest.param(False, id="begun by a thread")],
)
def test_every_wait_and_every_event_is_missed_if_it_is_left_out(here: bool) -> None:
    sites, quiet = unnoticed((short, replaced, jumpy), here=here)
    assert len(sites) >= 11, sites  # or the checker does not see the code that it mutates
    assert quiet == set(REDUNDANT)


def test_every_wait_for_a_thread_is_missed_if_it_is_left_out() -> None:
    sites, quiet = unnoticed((short, jumpy), streams=False)
    assert len(sites) >= 6, sites
    assert quiet == set(REDUNDANT_IN_ONE_THREAD)


@pytest.mark.slow
def test_every_wait_for_a_file_is_missed_if_it_is_left_out(tmp_path: Path) -> None:
    sites, quiet = unnoticed((short,), tmp_path, streams=False)
    assert len(sites) >= 4, sites
    assert not quiet


def test_memory_that_is_not_lent_to_the_copies_is_missed_when_nobody_closes_the_engine() -> None:
    sites = check(lambda: dropped("cpu")).sites
    site = next(site for site in sites if "copies.lend" in site)
    races = check(lambda: dropped("cpu"), without=site).races
    assert any("the allocator" in race for race in races)


@pytest.mark.parametrize("carried", [True, False], ids=["carried", "forgotten"])
def test_probes_run_on_the_callers_stream(carried: bool) -> None:
    forgotten = nullcontext() if carried else patch.object(ambient, "torch", torch)
    with simulated() as device, forgotten, device.stream(device.Stream()):
        whole_life("cpu", 3)
    assert bool(device.races) is not carried


def test_a_kernel_that_torch_does_not_launch_is_seen_if_it_says_what_it_touches() -> None:
    def launch(model: nn.Module, says: bool) -> None:
        """On a stream of its own, which waits for nothing."""
        with torch.no_grad():
            model(**batch("llama"))
        if says:
            with torch.no_grad(), device.stream(device.Stream()):
                zo.streaming.copies.now()
                arena = next(iter(zo.streaming.loaded.values()))[0]
                declare([], [arena])

    for says in (True, False):
        with simulated() as device:
            model = tiny("llama")
            zo: Any = engine(model, "cpu")
            zo.step(loss_of(model, batch("llama"), "cpu"))
            launch(model, says)
        assert any("zo::launched" in race for race in device.races) is says

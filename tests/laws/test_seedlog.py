"""Law: a seed log gives back what was put into it, or says what is wrong; never anything else."""

from __future__ import annotations

import itertools
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logged_run import LR, STEPS, LoggedRun, logged_run
from models import closure, tiny
from torch import nn
from traces import same_bits, weights

from zo_core import SeedLog, SeedLogWriter, StateError, StepRecord, ZeroOrder, replay
from zo_core.seedlog.format import Settings, encode_header, encode_step, parse


def train(path: Path, steps: int = STEPS, **changes: Any) -> ZeroOrder:
    zo = ZeroOrder(tiny("mlp"), **{"lr": LR, **changes})
    log = SeedLogWriter.attach(zo, path)
    for index in range(steps):
        zo.step(closure("mlp", zo.model, index))
    log.close()
    return zo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoggedRun:
    return logged_run(tmp_path_factory.mktemp("run") / "log")


# What is written


def test_a_step_is_24_bytes_and_is_read_as_it_was_done(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR, seed=3)
    records: list[StepRecord] = []
    zo.listeners.append(records.append)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    sizes = []
    for index in range(STEPS):
        zo.step(closure("mlp", zo.model, index))
        sizes.append((tmp_path / "log").stat().st_size)  # while the log is open: nothing is held back
        assert SeedLog.read(tmp_path / "log").next_step == index + 1
    log.close()
    assert {b - a for a, b in itertools.pairwise(sizes)} == {24}
    for entry, record in zip(SeedLog.read(tmp_path / "log").steps, records, strict=True):
        assert (entry.step, entry.probes, entry.lrs) == (record.step, record.probes, (record.lr,))
        assert entry.loss == pytest.approx(record.loss, rel=1e-7)


def test_a_probes_coefficient_is_a_float32() -> None:
    for changes in ({}, {"num_probes": 3}, {"clip": 0.01}, {"estimator": "fzoo"}):
        zo = ZeroOrder(tiny("mlp"), lr=LR, **changes)
        for probe in zo.step(closure("mlp", zo.model)).probes:
            assert struct.unpack("<f", struct.pack("<f", probe.coefficient))[0] == probe.coefficient


def test_twenty_thousand_steps_are_under_half_a_megabyte(tmp_path: Path) -> None:
    path = tmp_path / "log"
    train(path, 1)
    data = bytearray(path.read_bytes())
    chain = struct.unpack("<I", data[-4:])[0]
    for step in range(1, 20_000):
        record = encode_step(step, [0.5], 1.0, [LR], chain)
        chain = struct.unpack("<I", record[-4:])[0]
        data += record
    path.write_bytes(data)
    log = SeedLog.read(path)
    assert (len(log.steps), log.corrupt, log.torn) == (20_000, None, 0)
    assert 20_000 * 24 < len(data) < 481_000


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e39, -1e39, 1e-50])
def test_any_loss_can_be_written(loss: float, tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=0.0)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    zo.repeat((), loss)
    zo.optimizer.step()
    log.close()
    (entry,) = SeedLog.read(tmp_path / "log").steps
    assert entry.skipped
    assert math.isnan(entry.loss) == math.isnan(loss)


@pytest.mark.parametrize("estimator", ["spsa", "conservative"])
@pytest.mark.parametrize("normalise", [False, "curvature"])
def test_a_step_that_a_log_could_not_have_is_skipped(normalise: bool | str, estimator: str, tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)  # with a rate of 0: the measured curvature is exactly 0
    zo = ZeroOrder(model, lr=0.0, clip=math.inf, num_probes=4, normalise=normalise, estimator=estimator)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    records, states = [], []
    for slope in (1e-3, 8e38, 1e-3):  # coefficients of 2e38 are float32, and their sum is none
        records.append(zo.step(lambda slope=slope: slope * model.weight.double().sum()))  # type: ignore[misc]
        states.append((weights(model), zo.normaliser and zo.normaliser.saved()))
    log.close()
    read = SeedLog.read(tmp_path / "log")
    assert read.corrupt is None
    assert [entry.skipped for entry in read.steps] == [False, True, False]
    assert records[1].skipped is not None
    assert "a coefficient does not fit float32 (" in records[1].skipped
    assert same_bits(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_the_steps_from_one_on_bring_older_weights_forward(run: Any) -> None:
    log = SeedLog.read(run[0])
    assert [entry.step for entry in log.since(3)] == [3, 4]
    assert log.since(STEPS) == ()
    for step in (-1, STEPS + 1):
        with pytest.raises(StateError, match="which do not continue weights that are at step"):
            log.since(step)


def test_a_step_count_that_jumps_is_in_the_log(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    zo.step(closure("mlp", zo.model))
    zo.step_count = 10
    zo.step(closure("mlp", zo.model))
    log.close()
    assert [entry.step for entry in SeedLog.read(tmp_path / "log").steps] == [0, 10]
    again = tiny("mlp")
    assert replay(again, tmp_path / "log") == 11
    assert same_bits(weights(again), weights(zo.model))


def test_a_run_that_goes_back_is_told_to_begin_a_new_log(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    SeedLogWriter.attach(zo, tmp_path / "log")
    zo.step(closure("mlp", zo.model))
    zo.step_count = 0
    with pytest.raises(StateError, match="has step 0 before this log was opened"):
        zo.step(closure("mlp", zo.model))


@pytest.mark.parametrize("written", [0, 7, None])
def test_a_full_disk_is_a_clear_error_and_costs_no_earlier_step(
    written: int | None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    log = SeedLogWriter.attach(zo, path)
    zo.step(closure("mlp", zo.model, 0))
    before, write = path.read_bytes(), os.write

    def full(descriptor: int, data: bytes) -> int:
        if written is None:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:written])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StateError, match=r"could not be written .* and ends before this step"):
            zo.step(closure("mlp", zo.model, 1))
    assert path.read_bytes() == before
    log.close()


def test_closing_ends_the_logging(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    log.close()
    log.close()
    zo.step(closure("mlp", zo.model))
    assert SeedLog.read(tmp_path / "log").steps == ()
    assert zo.listeners == []


def test_following_repeats_the_steps_without_measuring(tmp_path: Path) -> None:
    whole = train(tmp_path / "log", rule="momentum")
    data = (tmp_path / "log").read_bytes()
    zo = ZeroOrder(tiny("mlp"), lr=LR, rule="momentum")
    log = SeedLogWriter.attach(zo, tmp_path / "log", follow=True)
    records = []
    while (entry := log.logged()) is not None:
        zo.repeat(entry.probes, entry.loss)
        records.append(zo.optimizer.step())
    assert [record.step for record in records] == list(range(STEPS))
    assert same_bits(weights(zo.model), weights(whole.model))
    assert (tmp_path / "log").read_bytes() == data
    zo.step(closure("mlp", zo.model))
    log.close()
    assert len(SeedLog.read(tmp_path / "log").steps) == STEPS + 1


def test_following_refuses_steps_that_are_measured_differently(tmp_path: Path) -> None:
    train(tmp_path / "log")
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    SeedLogWriter.attach(zo, tmp_path / "log", follow=True)
    zo.step(closure("mlp", zo.model, 0))  # measured again: the same
    with pytest.raises(StateError, match=r"has step 1 with the coefficients .* and now it was done with"):
        zo.step(closure("mlp", zo.model, 99))


# What is damaged


def assert_is_a_prefix(data: bytes, path: Path, run: Any, *, exact: int | None = None) -> None:
    """Either an error that says what is wrong, or the steps of the run from its first on, and their weights."""
    original = SeedLog.read(run[0])
    path.write_bytes(data)
    model = tiny("mlp")
    try:
        at = replay(model, path)
    except StateError:
        assert same_bits(weights(model), run[1][0])
        return
    assert exact is None or at == exact
    assert SeedLog.read(path).steps == original.steps[:at]
    assert same_bits(weights(model), run[1][at])


fuzz = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.data())
def test_a_truncated_log_is_a_shorter_run_or_an_error(run: Any, tmp_path: Path, data: st.DataObject) -> None:
    whole = run[0].read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    parsed = parse(whole, "log")
    complete = sum(offset + 24 <= size for offset in parsed.offsets)
    assert_is_a_prefix(whole[:size], tmp_path / "log", run, exact=complete)


@fuzz
@given(st.data())
def test_a_flipped_bit_is_noticed(run: Any, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(run[0].read_bytes())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "log"
    path.write_bytes(whole)
    model = tiny("mlp")
    with pytest.raises(StateError, match="seed log"):
        replay(model, path)
    assert same_bits(weights(model), run[1][0])


@fuzz
@given(st.data())
def test_a_damaged_stretch_is_never_a_wrong_model(run: Any, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(run[0].read_bytes())
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    whole[start:stop] = data.draw(st.one_of(st.binary(max_size=60), st.just(bytes(stop - start)), st.just(b"")))
    assert_is_a_prefix(bytes(whole), tmp_path / "log", run)


@fuzz
@given(st.binary(max_size=200))
def test_a_foreign_file_is_no_log(run: Any, tmp_path: Path, content: bytes) -> None:
    assert_is_a_prefix(content, tmp_path / "log", run)


def test_records_of_another_log_are_noticed(run: Any, tmp_path: Path) -> None:
    train(tmp_path / "other", seed=9)
    whole, other = run[0].read_bytes(), (tmp_path / "other").read_bytes()
    for mixed in (whole[:-24] + other[-24:], whole[:-48] + whole[-24:], whole + whole[-24:], other[:-24] + whole[-24:]):
        (tmp_path / "log").write_bytes(mixed)
        with pytest.raises(StateError, match="is corrupt at byte"):
            replay(tiny("mlp"), tmp_path / "log")


def test_the_steps_before_the_damage_can_be_had(run: Any, tmp_path: Path) -> None:
    whole = bytearray(run[0].read_bytes())
    whole[parse(bytes(whole), "log").offsets[3] + 5] ^= 1
    (tmp_path / "log").write_bytes(whole)
    with pytest.raises(StateError, match=r"is corrupt at byte \d+, after step 2: .*; until=3 or less"):
        replay(tiny("mlp"), tmp_path / "log")
    model = tiny("mlp")
    assert replay(model, tmp_path / "log", 3) == 3
    assert same_bits(weights(model), run[1][3])


@pytest.mark.parametrize("tail", [b"\0" * 24, b"\0" * 4096, b"\xff" * 100, b"x"])
def test_a_run_that_goes_on_drops_what_a_power_failure_left_at_the_end(run: Any, tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(run[0].read_bytes() + tail)
    zo = ZeroOrder(tiny("mlp"), lr=LR)
    log = SeedLogWriter.attach(zo, path, follow=True)
    assert log.next_step == STEPS
    log.close()
    assert path.read_bytes() == run[0].read_bytes()


def test_a_run_does_not_go_on_over_damage_in_the_middle(run: Any, tmp_path: Path) -> None:
    whole = bytearray(run[0].read_bytes())
    whole[parse(bytes(whole), "log").offsets[1]] ^= 1
    (tmp_path / "log").write_bytes(whole)
    with pytest.raises(StateError, match="is corrupt at byte"):
        SeedLogWriter.attach(ZeroOrder(tiny("mlp"), lr=LR), tmp_path / "log", follow=True)
    assert (tmp_path / "log").read_bytes() == bytes(whole)


def test_a_newer_format_and_a_missing_file_are_clear_errors(tmp_path: Path) -> None:
    data = bytearray(encode_header({}))
    data[8] = 7
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(StateError, match="is a seed log of format 7; this version of zo_core reads formats up to 3"):
        SeedLog.read(tmp_path / "log")
    (tmp_path / "log").write_bytes(encode_header({"settings": Settings(0, (), (), (), ()).to_dict()}))
    with pytest.raises(StateError, match="has a header that cannot be read: there is no 'zo'"):
        SeedLog.read(tmp_path / "log")
    with pytest.raises(StateError, match="cannot be read: No such file"):
        SeedLog.read(tmp_path / "missing")


def test_a_fingerprint_waits_for_the_device_before_its_threads_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read on streams of their own, which are not ordered after that of the caller."""
    module = sys.modules["zo_core.seedlog.fingerprint"]
    events: list[Any] = []
    digest, wait_for = module.digest, module.wait_for
    monkeypatch.setattr(module, "digest", lambda tensor: events.append("read") or digest(tensor))
    monkeypatch.setattr(module, "wait_for", lambda devices: events.append(set(devices)))
    module.fingerprint(ZeroOrder(tiny("mlp"), lr=1e-3))
    assert events[0] == {torch.device("cpu")}
    assert set(events[1:]) == {"read"}
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    wait_for([torch.device("cpu"), torch.device("cuda:1")])
    assert waited == [torch.device("cuda:1")]

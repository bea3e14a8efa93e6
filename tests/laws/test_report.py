"""Law: the curves of a run say what its steps said, in the same memory for any length, on a page that needs nothing."""

from __future__ import annotations

import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from models import closure, tiny

from zo_core import SeedLogWriter, ZeroOrder
from zo_core.charts import bar_chart, line_chart
from zo_core.curves import POINTS, Curves
from zo_core.seedlog import __main__ as command


def test_a_short_run_is_shown_step_by_step() -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-3)
    records = [zo.step(closure("mlp", zo.model, index)) for index in range(5)]
    assert zo.curves.losses() == [(r.step, r.loss) for r in records]
    assert zo.curves.grads() == [(r.step, pytest.approx(abs(r.projected_grad))) for r in records]
    assert zo.curves.lrs() == [(r.step, r.lr) for r in records]
    assert len(zo.curves.memory()) == (5 if sys.platform == "linux" else 0)


def test_forwards_and_times_are_those_of_the_run() -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-3, num_probes=2)
    for index in range(3):
        zo.measure(closure("mlp", zo.model, index))
        zo.measure(closure("mlp", zo.model, index + 1))
        zo.optimizer.step()
    clock = zo.curves.clock
    assert clock.forwards == 3 * 2 * 2 * 2  # steps, micro-batches, directions, sides
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert sum(clock.seconds.values()) <= clock.total


def test_a_second_round_counts() -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-3, estimator="conservative")
    zo.step(closure("mlp", zo.model))
    assert zo.curves.clock.forwards == 2 + len(zo.estimator.multiples)


def test_a_long_run_takes_no_more_memory_and_loses_nothing() -> None:
    curves, steps = Curves(), 5 * POINTS + 7
    for step in range(steps):
        curves.add(step, float(step), 2.0, 1.0 / (step + 1), "a reason" if step % 10 == 3 else None)
    assert len(curves.buckets) <= POINTS
    assert (curves.steps, curves.skipped, sum(curves.reasons.values())) == (steps, *[len(range(3, steps, 10))] * 2)
    assert math.fsum(bucket.loss for bucket in curves.buckets) == sum(range(steps))
    assert {grad for _, grad in curves.grads()} == {2.0}
    assert [b.step for b in curves.buckets] == list(range(0, steps, curves.width))
    assert curves.lrs()[-1][1] == 1.0 / steps


def test_what_is_not_finite_is_left_out() -> None:
    curves = Curves()
    for step, value in enumerate((math.nan, math.inf, 1.0, -math.inf, 1e200)):
        curves.add(step, value, value, value, None)
    assert curves.losses() == [(2, 1.0), (4, 1e200)]
    assert curves.grads() == [(2, 1.0)]


def test_a_run_that_goes_back_begins_again() -> None:
    curves = Curves()
    for step in (0, 1, 2, 0):
        curves.add(step, 1.0, 1.0, 1.0, None)
    assert (curves.steps, curves.next_step) == (1, 1)


class Page(HTMLParser):
    """What a page would fetch or run, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.foreign: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe") or any(name in ("src", "href") for name, _ in attrs):
            self.foreign.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_holds_all_it_needs_and_shows_texts_as_texts(tmp_path: Path) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-3)
    for index in range(3):
        zo.step(closure("mlp", zo.model, index))
    zo.skip("<script>alert('no')</script>")
    page = Page(zo.report(tmp_path / "report.html", title="A & B").read_text(encoding="utf-8"))
    assert page.foreign == []
    for words in ("A & B", "4, of which 1 moved nothing", "<script>alert", "Where the time went", "per second"):
        assert words in page.text
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("log", [False, True])
def test_charts_are_pictures_for_any_points(log: bool) -> None:
    for points in ([], [(0, 1.0)], [(0, 0.0)], [(0, -1.0), (1, -1.0)], [(3, 1e-30), (9, 1e30)], [(0, 2.0), (1, 2.0)]):
        drawn = line_chart(points, "a <b> & c", log=log)
        ElementTree.fromstring(drawn)
        assert all(abs(float(number)) < 1000 for number in re.findall(r'[xy]="([-\d.e+]+)"', drawn))
    ElementTree.fromstring(bar_chart([("one", 0.0, "none"), ("two", 3.0, "3")], "bars"))
    ElementTree.fromstring(bar_chart([], "bars"))


@pytest.mark.parametrize("ending", ["html", "png"])
def test_a_log_is_drawn(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-3)
    writer = SeedLogWriter.attach(zo, tmp_path / "log")
    for index in range(3):
        zo.step(closure("mlp", zo.model, index))
    zo.skip("a reason")
    writer.close()
    drawn = tmp_path / f"run.{ending}"
    assert command.main(["show", str(tmp_path / "log"), "--plot", str(drawn)]) == 0
    assert f"{drawn} has the curves" in capsys.readouterr().out
    begins = drawn.read_bytes()[:15]
    assert begins == b"<!doctype html>" if ending == "html" else begins.startswith(b"\x89PNG")
    if ending == "html":
        assert "4, of which 1 moved nothing" in drawn.read_text(encoding="utf-8")


def test_what_a_picture_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zo = ZeroOrder(tiny("mlp"), lr=1e-3)
    SeedLogWriter.attach(zo, tmp_path / "log").close()
    assert command.main(["show", str(tmp_path / "log"), "--plot", str(tmp_path / "run.txt")]) == 1
    assert "run.txt cannot be drawn" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command.main(["show", str(tmp_path / "log"), "--plot", str(tmp_path / "run.png")]) == 1
    assert "pip install 'zo-trainer[plot]'" in capsys.readouterr().err

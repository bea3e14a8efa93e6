"""Law: the numbers of the marked tables in README and docs are those of the files in benchmarks/results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_measured", ROOT / "docs" / "measured.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULT = {"speed-cpu": {"title": "Speed", "columns": ["", "s"], "rows": [["a", "1.25"], ["b", "1250"]]}}
TABLE = "| | s |\n| --- | --- |\n| a | {} |\n| b | {} |\n"


def test_every_page_is_current(
    measured: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["measured.py", "--check"])
    assert measured.main() == 0, capsys.readouterr().out


def test_a_marked_table_has_the_rows_of_its_result(measured: ModuleType) -> None:
    text = "<!-- table speed-cpu -->\n\n" + TABLE.format("1.00", "7") + "\nafter\n"
    assert measured.current(text, RESULT, "page") == (text.replace("1.00", "1.25").replace("| 7 |", "| 1250 |"), [])


@pytest.mark.parametrize(("number", "is_known"), [("1.25", True), ("1,250 MB", True), ("1.26", False), ("text", True)])
def test_a_table_put_together_by_hand_has_numbers_of_its_results(
    measured: ModuleType, number: str, is_known: bool
) -> None:
    text = "<!-- from speed-cpu -->\n\n" + TABLE.format(number, "1.25")
    new, problems = measured.current(text, RESULT, "page")
    assert new == text
    assert bool(problems) != is_known


def test_a_mark_without_a_result_or_a_table_is_a_problem(measured: ModuleType) -> None:
    for text in ("<!-- from gone-cpu -->\n\n" + TABLE.format("1", "1"), "<!-- table speed-cpu -->\n\nno table\n"):
        assert measured.current(text, RESULT, "page")[1]


def test_tables_in_lists_are_indented_and_count_as_well(measured: ModuleType) -> None:
    for kind, given, wanted in (("table", "1.00", ("1.25", False)), ("from", "1.26", ("1.26", True))):
        text = f"<!-- {kind} speed-cpu -->\n\n" + TABLE.format("{}", "1250")
        page = "\n".join(f"  {line}" if line else "" for line in text.splitlines()) + "\n"
        new, problems = measured.current(page.format(given), RESULT, "page")
        assert (new, bool(problems)) == (page.format(wanted[0]), wanted[1])


def test_a_header_with_another_number_of_columns_than_its_result_is_a_problem(measured: ModuleType) -> None:
    text = "<!-- table speed-cpu -->\n\n" + TABLE.format("1.25", "1250")
    problem = "page:1: the header has another number of columns than speed-cpu"
    assert measured.current(text.replace("| | s |", "| s |"), RESULT, "page")[1] == [problem]


def test_every_result_is_on_the_page_and_only_the_newest_one_of_a_name_is_kept(measured: ModuleType) -> None:
    found = measured.results()
    assert {path.name for path in measured.RESULTS.glob("*.json")} == {one["file"] for one in found.values()}
    assert {path.stem for path in measured.RESULTS.glob("*.md")} == {
        path.stem for path in measured.RESULTS.glob("*.json")
    }
    assert "## Others" not in measured.page(found)
    assert "## Others\n\n### Odd" in measured.page({**found, "odd": {**found["learning-cpu"], "title": "Odd"}})

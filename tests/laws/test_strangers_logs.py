"""Law: a seed log or a shared folder from a stranger gives a model other weights, or an error of this library.

Damage that checksums notice is in `test_seedlog`. Here every checksum is right: the file was made on purpose.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import closure, tiny
from traces import same_bits, weights

from zo_core import SeedLog, SeedLogWriter, StateError, ZeroOrder, ZOError, replay
from zo_core.seedlog import __main__ as command
from zo_core.seedlog import load_adapter, save_adapter
from zo_core.seedlog.format import CRC, encode_change, encode_header, encode_step

ROOT = Path(__file__).parents[2]
STEPS = 3


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> SeedLog:
    """A log of a few steps with momentum, which is the rule whose settings may change in mid-run."""
    path = tmp_path_factory.mktemp("run") / "seedlog.zo"
    zo = ZeroOrder(tiny("mlp"), lr=1e-2, rule="momentum")
    writer = SeedLogWriter.attach(zo, path)
    for index in range(STEPS):
        zo.step(closure("mlp", zo.model, index))
    writer.close()
    return SeedLog.read(path)


def forged(
    log: SeedLog, header: dict[str, Any], change: Any = None, numbers: tuple[float, ...] = (0.5, 1.0, 1e-3)
) -> bytes:
    """A log with any header, change-record and step, whose checksums are right."""
    data = encode_header(header)
    chain = CRC.unpack(data[-4:])[0]
    if change is not None:
        data += (record := encode_change(change, chain))
        chain = CRC.unpack(record[-4:])[0]
    coefficient, loss, lr = numbers
    return data + encode_step(log.first_step, [coefficient], loss, [lr], chain)


def use(data: bytes, folder: Path) -> None:
    """Does all that can be done with a log; errors that this library raises on purpose are fine."""
    folder.mkdir(exist_ok=True)
    path = folder / "seedlog.zo"
    path.write_bytes(data)
    before = weights(model := tiny("mlp"))
    try:
        replay(model, path, progress=False)
    except ZOError:
        assert same_bits(weights(model), before)
    with contextlib.suppress(ZOError):
        command.summary(SeedLog.read(path))
    with contextlib.suppress(ZOError):
        load_adapter(tiny("mlp"), save_adapter(path, folder / "shared"))


#: Values to put anywhere.
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 10**30, 1 << 40, 0.5, -1.0, 1e308, float("nan"), float("inf")),
    *("", "x", "sgd", "torch", "gaussian", "\x1b[2J", "__import__('os').system('false')", "../../etc/passwd"),
    *([], [[]], [0], [1e300], {}, {"name": "momentum", "beta": "x"}, {"name": "momentum", "nesterov": 1}),
    *({"name": "low_rank", "rank": 1 << 40}, {"name": "sampled", "of": {"name": "sampled"}}, {"name": []}),
    {"to": 0, "factor": 0.5},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values in nested lists and dictionaries."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in places(inner, (*path, key)))]


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def test_any_header_is_a_run_or_an_error(log: SeedLog, tmp_path: Path) -> None:
    generator = random.Random(0)
    for path in places(log.header)[1:]:
        for value in generator.sample(ODD, 3):
            use(forged(log, with_value(log.header, path, value)), tmp_path / "folder")


@pytest.mark.parametrize("key", ["settings", "rule", "num_probes", "draws", "merged", "next_step", "rollback", "new"])
def test_any_change_is_a_run_or_an_error(key: str, log: SeedLog, tmp_path: Path) -> None:
    for value in ODD:
        use(forged(log, log.header, {key: value}), tmp_path / "folder")
    use(forged(log, log.header, [key]), tmp_path / "folder")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(*[st.floats(width=32)] * 2, st.floats()))
def test_any_numbers_are_a_run_or_an_error(log: SeedLog, tmp_path: Path, numbers: tuple[float, float, float]) -> None:
    use(forged(log, log.header, numbers=numbers), tmp_path / "folder")


def test_a_header_that_inflates_beyond_measure_is_an_error(
    log: SeedLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_core.seedlog.checked.MAX_HEADER", 500)
    (tmp_path / "log").write_bytes(encode_header(log.header))
    with pytest.raises(StateError, match="larger than 500 bytes"):
        SeedLog.read(tmp_path / "log")


@pytest.mark.parametrize("text", ["[" * 100_000, "", "null", "[]", "{}", '{"format": [1]}', '{"format": 1}', "\ud800"])
def test_any_description_of_a_folder_is_an_error(text: str, log: SeedLog, tmp_path: Path) -> None:
    folder = save_adapter(log, tmp_path / "folder")
    (folder / "zo_adapter.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(StateError):
        load_adapter(tiny("mlp"), folder)


@pytest.mark.parametrize("key", ["base_model", "steps", "trained_weights"])
def test_any_entry_of_the_description_is_a_run_or_an_error(key: str, log: SeedLog, tmp_path: Path) -> None:
    folder = save_adapter(log, tmp_path / "folder")
    entries = json.loads((folder / "zo_adapter.json").read_text())
    for value in ODD:
        (folder / "zo_adapter.json").write_text(json.dumps({**entries, key: value}))
        with contextlib.suppress(ZOError):
            load_adapter(tiny("mlp"), folder)


def test_nothing_in_the_packages_unpickles_or_evaluates() -> None:
    """`torch.load` and `pickle` run code from a file; none of it is used, not even where files are one's own."""
    forbidden = {"eval", "exec", "load", "loads", "Unpickler", "pickle", "marshal", "shelve", "dill", "cloudpickle"}
    allowed = {("json", "loads"), ("json", "load")}
    for path in (file for package in ("zo_core", "hf_zo", "lightning_zo") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not forbidden & set(names), f"{path}: {names}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, f"{path}:{node.lineno}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                assert owner not in {"torch", "pickle"} or node.func.attr not in forbidden, f"{path}:{node.lineno}"
                assert (owner, node.func.attr) in allowed or node.func.attr != "loads", f"{path}:{node.lineno}"

"""Law: the learning rates of the examples are among those that work, so nothing is said about them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zo_core import ZeroOrder, engine
from zo_core.learning_rate.advice import lr_advice, useful_rates

FOLDER = Path(__file__).parents[2] / "examples"

#: What makes each example short: its first step ends it.
SHORT: dict[str, list[list[str]]] = {
    "accelerate_loop": [["--cpu"]],
    "bare_loop": [[]],
    "black_box": [[]],
    "diffusion": [
        ["--pretraining-steps=1", f"--model={model}", f"--methods={method}"]
        for model, method in (("unet", "full"), ("transformer", "lora"), ("transformer", "scales"), ("unet", "word"))
    ],
    "federated_flower": [[]],
    "int4_scales": [["--pretraining-steps", "1"]],
    "lightning_digits": [[]],
    "lightning_hf": [[]],
    "offload_from_disk": [["--layers", "2"]],
    "peft_adapters": [[f"--method={method}", "--pretraining-steps=1"] for method in ("lora", "prefix", "activations")],
    "quickstart": [["--pretraining-steps", "1"]],
    "rewards": [[f"--method={how}", "--pretraining-steps=1"] for how in ("full", "lora", "activations", "scales")],
    "several_processes": [[]],
    "share_adapter": [[]],
    "tensor_parallel": [[]],
    "text_classification": [["--pretraining-steps", "1"], ["--pretraining-steps", "1", "--all-weights"]],
    "trl_sft": [[]],
}

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries that examples use


class Reached(BaseException):
    """The first step."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, list[str]], ZeroOrder]]:
    """A function that runs an example up to its first step; returns the engine."""

    def stop(zo: Any) -> None:
        reached.append(zo)
        raise Reached

    def until(name: str, options: list[str]) -> ZeroOrder:
        monkeypatch.setattr(sys, "argv", [name, *options])
        module = importlib.import_module(name)
        if hasattr(module, "in_a_process_of_its_own"):
            monkeypatch.setattr(module, "in_a_process_of_its_own", lambda function, *args: function(*args))
        with pytest.raises(Reached):
            module.main()
        return reached[-1]

    reached: list[ZeroOrder] = []
    monkeypatch.setattr(engine, "advise", stop)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield until
    for name in (set(sys.modules) - before) & set(SHORT):
        del sys.modules[name]


def test_every_example_is_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize(("name", "options"), [(name, each) for name in SHORT for each in SHORT[name]])
def test_its_learning_rate_is_one_that_works(ends: Any, name: str, options: list[str]) -> None:
    if name == "federated_flower":
        pytest.importorskip("flwr")  # in no extra: it needs older versions of packages that others need
    zo = ends(name, options)
    assert useful_rates(zo) is not None
    assert lr_advice(zo) is None

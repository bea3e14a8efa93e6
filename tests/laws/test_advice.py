"""Law: a learning rate that is far from all that work is said once, with the range of what moves; others never are."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import batch, tiny
from torch import nn

from zo_core import ESTIMATORS, RULES, Momentum, Scaling, ZeroOrder, ZOConfig, ZOOptimizer
from zo_core.checkpoint import FrontEnd
from zo_core.defaults import default_lr
from zo_core.learning_rate.advice import lr_advice, useful_rates
from zo_core.normaliser import Curvature, Gradient, normaliser_of

ROOT = Path(__file__).parents[2]


def run(lr: float, moved: int, total: int = 0, n: int | None = None, method: str = "spsa", **changes: Any) -> Any:
    """What advice reads of an engine with ``moved`` of ``total`` weights; none of them takes memory."""
    estimator = ESTIMATORS.resolve(method)
    tensors = [nn.Parameter(torch.empty(count, device="meta")) for count in (moved, max(0, total - moved))]
    values: dict[str, Any] = {
        "estimator": estimator,
        "rule": RULES.resolve("sgd"),
        "num_probes": estimator.default_num_probes if n is None else n,
        "slots": [SimpleNamespace(tensor=tensors[0], shape=tensors[0].shape, scaling=changes.pop("scaling", None))],
        "model": nn.ParameterList(tensors),
        "optimizer": SimpleNamespace(param_groups=[{"lr": lr, "eps": changes.pop("eps", 1e-3)}]),
        "config": ZOConfig(lr=lr, maximize=changes.pop("maximize", False)),
        "continuity": SimpleNamespace(front=FrontEnd()),
        "normaliser": None,
        "step_count": 0,
    }
    return SimpleNamespace(**{**values, **changes})


#: Runs that are known to learn: measured here, or in the papers of the methods.
WORKING: dict[str, Any] = {
    "linear": run(0.25, 650),
    "head of BERT": run(3e-2, 258, 800_000),
    "BERT": run(1.8e-3, 830_402),
    "BERT, slowly": run(2.5e-4, 830_402),
    "LoRA, Llama": run(4.6e-2, 12_288, 1_000_000),
    "LoRA, OPT-13B": run(5e-5, 6_500_000, 13_000_000_000),
    "prefix, OPT-13B": run(1e-2, 2_000_000, 13_000_000_000),
    "RoBERTa-large": run(1e-6, 355_000_000),
    "OPT-13B": run(1e-7, 13_000_000_000),
    "OPT-13B, faster": run(1e-6, 13_000_000_000),
    "fzoo, OPT-1.3B": run(5e-5, 1_300_000_000, method="fzoo"),
    "fzoo, small steps": run(1e-4, 100_000, method="fzoo"),
    "rewards of Qwen2.5-0.5B": run(5e-4, 494_000_000, method="es", maximize=True),
    "rewards, with a large eps": run(5e-3, 494_000_000, method="es", maximize=True, eps=1e-2),
    "a black box": run(0.2, 153, n=8, method="es", maximize=True, eps=0.03),
    "nf4": run(1e-1, 3_000, 250_000, scaling=Scaling()),
    "nf4, MeZO's rate": run(2.5e-3, 100_000_000, scaling=Scaling()),
    "nothing is to move": run(0.0, 1_000),
    "normalised by the curvature": run(0.25, 830_402, normaliser=Curvature()),
    "nf4, normalised by the curvature": run(0.25, 3_000, 250_000, scaling=Scaling(), normaliser=Curvature()),
    "normalised by the gradient": run(4 / 830_402**0.5, 830_402, normaliser=Gradient()),
}
#: Rates for backpropagation, and those of models of another size.
FAR: dict[str, tuple[Any, str]] = {
    "BERT-base with Trainer's default": (run(5e-5, 109_000_000), "above"),
    "OPT-13B with Trainer's default": (run(5e-5, 13_000_000_000), "above"),
    "a small BERT with MeZO's rate": (run(1e-6, 830_402), "below"),
    "LoRA with the default for all weights": (run(1e-6, 1_728, 35_472), "below"),
    "a head": (run(1e-6, 258, 830_402), "below"),
    "an MLP with momentum": (run(0.1, 9_610, rule=Momentum(0.9)), "above"),
    "fzoo": (run(1.0, 35_000, method="fzoo"), "above"),
    "fzoo, a small model": (run(1e-6, 35_000, method="fzoo"), "below"),
    "rewards with GRPO's rate": (run(1e-6, 494_000_000, method="es", maximize=True), "below"),
    "normalised by the curvature, with MeZO's rate": (run(1e-6, 13_000_000_000, normaliser=Curvature()), "below"),
    "normalised by the gradient": (run(0.25, 830_402, normaliser=Gradient()), "above"),
    "nf4 with MeZO's rate": (run(1e-6, 3_000, 250_000, scaling=Scaling()), "below"),
}
#: The number of weights that move in the tasks of `benchmarks.suggest_lr`, and of all.
TASKS = {
    "mlp": (9_610, 0), "cnn": (10_058, 0), "marker": (9_508, 0), "bert": (35_000, 0), "lm": (35_472, 0),
    "bert-lora": (866, 35_000), "lm-lora": (1_728, 35_472),
}  # fmt: skip
ROW = re.compile(r"^\| ([\w-]+) \| (spsa|spsa momentum|fzoo) \| (\S+) \| (\S+) \|", re.MULTILINE)
PAGE = (ROOT / "docs" / "learning-rate.md").read_text(encoding="utf-8")
FOUND = [row for row in ROW.findall(PAGE) if row[0] in TASKS]


@pytest.mark.parametrize("engine", WORKING.values(), ids=WORKING.keys())
def test_a_rate_that_works_is_not_mentioned(engine: Any) -> None:
    assert lr_advice(engine) is None


@pytest.mark.parametrize(("task", "method", "suggested", "ratio"), FOUND, ids=[" ".join(row[:2]) for row in FOUND])
def test_the_rates_that_a_search_finds_are_not_mentioned(task: str, method: str, suggested: str, ratio: str) -> None:
    name, *momentum = method.split()
    rule = Momentum(0.9) if momentum else RULES.resolve("sgd")
    for lr in (float(suggested), float(suggested) / float(ratio)):  # the second one is the best of a grid
        assert lr_advice(run(lr, *TASKS[task], method=name, rule=rule)) is None


def test_the_page_has_rates_that_a_search_found() -> None:
    assert FOUND


def test_the_rates_in_the_code_of_the_pages_suit_models_as_people_have_them() -> None:
    """As they stand there, for a model of a hundred million weights or more; not those of scales."""
    call = re.compile(r"(?:ZeroOrder\((?!adapted)[^)\n]*?lr|learning_rate)=([\d.e-]+)([^)\n]*)")
    found = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for lr, rest in call.findall(page.read_text(encoding="utf-8")):
            if page.name not in ("int4.md", "extending.md"):
                directions = re.search(r"num_probes=(\d+)", rest)
                assert lr_advice(run(float(lr), 100_000_000, n=int(directions[1]) if directions else 1)) is None, page
                found += 1
    assert found >= 4


@pytest.mark.parametrize(("engine", "where"), FAR.values(), ids=FAR.keys())
def test_a_rate_that_cannot_work_is_named_with_what_to_write(engine: Any, where: str) -> None:
    low, high = useful_rates(engine) or (0.0, 0.0)
    message = lr_advice(engine) or ""
    lr = engine.optimizer.param_groups[0]["lr"]
    assert message.startswith(f"lr={lr:g} is far {where} the rates that work for {engine.slots[0].tensor.numel():,} ")
    assert message.endswith(f"; write one of {low:.0e} to {high:.0e}, or leave it out")


def test_the_range_grows_with_directions_and_shrinks_with_size_and_momentum() -> None:
    def rates(*args: Any, **settings: Any) -> tuple[float, float]:
        return useful_rates(run(1.0, *args, **settings)) or (0.0, 0.0)

    sizes = [rates(10**power) for power in range(2, 11)]
    for ends in zip(*sizes, strict=True):
        assert sorted(ends, reverse=True) == list(ends)
    assert rates(10**6, n=4) == tuple(4 * rate for rate in rates(10**6))
    assert rates(10**6, rule=Momentum(0.5)) == tuple(rate / 2 for rate in rates(10**6))
    assert rates(10**6, n=32, method="fzoo") == tuple(2 * rate for rate in rates(10**6, n=8, method="fzoo"))


def test_where_nothing_is_known_nothing_is_said() -> None:
    for rule in ("sign", "torch"):
        assert lr_advice(run(1e3, 1_000, rule=RULES.resolve(rule))) is None
    assert lr_advice(run(1e3, 1_000, scaling=Scaling(relative=False))) is None


def test_a_rate_that_is_found_or_said_before_is_not_mentioned() -> None:
    assert lr_advice(run(1e-6, 1_000)) is not None
    assert lr_advice(run(1e-6, 1_000, config=ZOConfig(lr="auto"))) is None
    assert lr_advice(run(1e-6, 1_000, step_count=1)) is None


@pytest.mark.parametrize("size", [10**power for power in range(2, 11)])
@pytest.mark.parametrize(
    "settings", [{}, {"normalise": "gradient"}, {"estimator": "fzoo"}, {"rule": "momentum"}, {"num_probes": 8}]
)
def test_a_rate_that_was_left_out_is_one_that_works(size: int, settings: dict[str, Any]) -> None:
    known = ZOConfig(**settings).resolve()
    method, n, rule = known.estimator.name, known.num_probes, known.rule
    engine = run(0.0, size, n=n, method=method, rule=rule, normaliser=normaliser_of(known.normaliser, size))
    lr = default_lr(engine.slots, rule, known.normaliser, n)
    assert lr_advice(run(lr, size, n=n, method=method, rule=rule, normaliser=engine.normaliser)) is None


def test_a_front_end_has_its_own_words() -> None:
    front = SimpleNamespace(front=FrontEnd({"lr": "learning_rate"}, without_lr="do that"))
    message = lr_advice(run(1e-6, 1_000, continuity=front)) or ""
    assert message.startswith("learning_rate=1e-06 is far below ")
    assert message.endswith(", or do that")


# In a loop


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("zo_core")]


@pytest.mark.parametrize("lr", [1e-7, 50.0])
def test_a_bare_loop_gets_one_line_at_its_first_step(caplog: pytest.LogCaptureFixture, lr: float) -> None:
    model, data = tiny("llama"), batch("llama")
    zo = ZeroOrder(model, lr=lr)
    assert said(caplog) == []
    for _ in range(3):
        zo.step(lambda: model(**data).loss)
    (message,) = said(caplog)
    assert message.startswith(f"lr={lr:g} is far ")


def test_a_bare_loop_with_a_rate_that_works_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny("llama"), batch("llama")
    for settings in ({"lr": 1e-3}, {}, {"estimator": "fzoo"}, {"optimizer": ZOOptimizer(model.parameters())}):
        zo = ZeroOrder(model, **settings)  # type: ignore[arg-type]
        zo.step(lambda: model(**data).loss)
    assert [message for message in said(caplog) if "rates that work" in message] == []


def test_the_largest_rate_of_the_groups_counts_without_its_schedule(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny("mlp"), batch("mlp")
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 1e-9}, {"params": others, "lr": 1e-2}]
    zo = ZeroOrder(model, optimizer=ZOOptimizer(groups))
    torch.optim.lr_scheduler.LambdaLR(zo.optimizer, lambda step: 1e-6 * step)  # a warmup from 0
    zo.step(lambda: model(**data))
    assert said(caplog) == []

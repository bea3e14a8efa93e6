"""Law: hooks around the optimizer do what they do elsewhere; a step that would train nothing is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import Weights, differing, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_helpers import QUIET, TIERS, Wrapped, batches, fitted, loader, sgd, trainer
from models import tiny

from zo_core import ConfigError, SeedLog, ZeroOrder, ZOConfig, ZOOptimizer
from zo_core.rules import torch_rule

pytestmark = QUIET

LR, BLOCKS = 1e-2, ("model.inner",)
Hook = Callable[[Any, int, int, Any, Any], None]
OPTIMIZERS: dict[str, Any] = {
    "sgd": sgd(LR),
    "momentum": sgd(LR, momentum=0.9),
    "adamw": lambda module: torch.optim.AdamW(module.parameters(), lr=LR),
    "zo": lambda module: ZOOptimizer(module.parameters(), lr=LR),
}


def module(hook: Hook, optimizer: str = "sgd") -> L.LightningModule:
    return type("Hooked", (Wrapped,), {"optimizer_step": hook})("mlp", optimizer=OPTIMIZERS[optimizer])


def run(path: Path, hook: Hook, optimizer: str = "sgd", strategy: Any = "zo", **settings: Any) -> Weights:
    return fitted(path, module(hook, optimizer), strategy, data=loader("mlp", 4), **settings)


def bare(steps: list[tuple[int, list[int], float]], optimizer: str = "sgd", accumulated: int = 1) -> Weights:
    """The weights after steps, each an index, the batches that it measures, and its learning rate."""
    model = tiny("mlp")
    given = None if optimizer in ("sgd", "momentum", "zo") else OPTIMIZERS[optimizer](model)
    settings: dict[str, Any] = {"rule": "momentum"} if optimizer == "momentum" else {}
    if given is None:
        settings["lr"] = LR
    zo, data = ZeroOrder(model, ZOConfig(**settings), optimizer=given), batches("mlp", 4)
    for step, indices, lr in steps:
        zo.step_count = step
        for group in zo.optimizer.param_groups:
            group["lr"] = lr
        for index in indices:
            zo.measure(lambda index=index: model(**data[index]) / accumulated)
        zo.optimizer.step()
    return weights(model)


def nothing(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
    pass


def forgets(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
    optimizer.step()


def on_some(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
    if batch_idx % 2 == 0:
        optimizer.step(closure=closure)


@pytest.mark.parametrize("strategy", ["zo", {"offload": "cpu", "blocks": BLOCKS}, "auto"], ids=["zo", "cpu", "auto"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "zo"])
@pytest.mark.parametrize("hook", [nothing, forgets, on_some])
def test_a_closure_that_nobody_runs_is_an_error(hook: Hook, optimizer: str, strategy: Any, tmp_path: Path) -> None:
    if (optimizer == "zo" and strategy == "auto") or (optimizer == "adamw" and isinstance(strategy, dict)):
        pytest.skip("not together")
    with pytest.raises(MisconfigurationException, match="The closure hasn't been executed"):
        run(tmp_path, hook, optimizer, strategy)


class Forgetful(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step()


class Written(torch.optim.Optimizer):
    """An optimizer from scratch that does not know closures."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad * group["lr"])


class Right(Written):
    """The same, with what all optimizers have."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        super().step()
        return loss


class Again(Right):
    """Wants gradients at two places."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


@pytest.mark.parametrize("strategy", ["zo", "auto"])
@pytest.mark.parametrize("cls", [Forgetful, Written])
def test_an_optimizer_that_does_not_run_its_closure_is_an_error(cls: Any, strategy: str, tmp_path: Path) -> None:
    wrong = Wrapped("mlp", optimizer=lambda m: cls(m.parameters(), lr=LR))
    with pytest.raises(MisconfigurationException, match="The closure hasn't been executed"):
        fitted(tmp_path, wrong, strategy, data=loader("mlp", 4))


def test_an_optimizer_that_calls_the_one_of_its_base_class_is_refused_before_anything_moves(tmp_path: Path) -> None:
    wrong = Wrapped("mlp", optimizer=lambda m: Forgetful(m.parameters(), lr=LR))
    with pytest.raises(MisconfigurationException):
        fitted(tmp_path, wrong, data=loader("mlp", 4))
    assert not differing(weights(wrong.model), weights(tiny("mlp")))


def test_an_optimizer_of_ones_own_gets_a_closure_with_the_loss(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Seeing(Right):
        def step(self, closure: Any = None) -> Any:
            seen.append(super().step(closure))

    mine = fitted(tmp_path, Wrapped("mlp", optimizer=lambda m: Seeing(m.parameters(), lr=LR)), data=loader("mlp", 4))
    model = tiny("mlp")
    zo = ZeroOrder(model, optimizer=Right(model.parameters(), lr=LR))
    losses = [float(zo.step(lambda batch=batch: model(**batch))) for batch in batches("mlp", 4)]
    assert not differing(mine, weights(model))
    assert [float(loss) for loss in seen] == pytest.approx(losses, abs=1e-6)


def test_an_optimizer_that_wants_two_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="calls its closure more than once"):
        fitted(tmp_path, Wrapped("mlp", optimizer=lambda m: Again(m.parameters(), lr=LR)), data=loader("mlp", 4))


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_past_the_strategy_is_an_error(optimizer: str, closure: bool, tmp_path: Path) -> None:
    def past(self: Any, epoch: int, batch_idx: int, optimizer: Any, given: Any) -> None:
        optimizer.optimizer.step(closure=given) if closure else optimizer.optimizer.step()

    wrong = module(past, optimizer)
    with pytest.raises(
        ConfigError, match=r"called directly, not through the strategy.*optimizer.step\(closure=optimizer_closure\)"
    ):
        fitted(tmp_path, wrong, data=loader("mlp", 4))
    assert not differing(weights(wrong.model), weights(tiny("mlp")))


def test_the_optimizer_is_free_again_afterwards(tmp_path: Path) -> None:
    kept = Wrapped("mlp", optimizer=sgd(LR))
    fit = trainer(tmp_path)
    fit.fit(kept, loader("mlp", 2))
    optimizer = fit.strategy.optimizers[0]
    before = weights(kept.model)
    kept.loss(batches("mlp", 1)[0]).backward()
    optimizer.step()
    assert differing(weights(kept.model), before)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "zo"])
def test_a_warm_up_acts_on_the_step_that_it_is_set_for(optimizer: str, tier: str | None, tmp_path: Path) -> None:
    """The pattern of Lightning's documentation, before the step; and on the way, in a closure of one's own."""
    if optimizer == "adamw" and tier is not None:
        pytest.skip("not together")

    def before(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (self.trainer.global_step + 1) / 3)
        optimizer.step(closure=closure)

    def within(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        def wrapped() -> Any:
            loss = closure()
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, (batch_idx + 1) / 3)
            return loss

        optimizer.step(closure=wrapped)

    expected = bare([(i, [i], LR * min(1.0, (i + 1) / 3)) for i in range(4)], optimizer)
    for hook in (before, within):
        how = {"offload": tier, "blocks": BLOCKS if tier else None}
        assert not differing(run(tmp_path / hook.__name__, hook, optimizer, how), expected)
        log = SeedLog.read(tmp_path / hook.__name__ / "seedlog.zo")
        assert [step.lrs[0] for step in log.steps] == [LR * min(1.0, (i + 1) / 3) for i in range(4)]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "zo"])
def test_a_batch_whose_step_is_left_out_counts_for_nothing(optimizer: str, tmp_path: Path) -> None:
    def every_other(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure) if batch_idx % 2 else closure()

    mine = run(tmp_path, every_other, optimizer)
    assert not differing(mine, bare([(1, [1], LR), (3, [3], LR)], optimizer))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "zo"])
def test_a_closure_that_runs_twice_counts_once(optimizer: str, tmp_path: Path) -> None:
    def twice(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        optimizer.step(closure=closure)

    assert not differing(run(tmp_path, twice, optimizer), bare([(i, [i], LR) for i in range(4)], optimizer))


def test_a_closure_that_runs_twice_at_the_end_of_an_accumulation_counts_twice(tmp_path: Path) -> None:
    """As elsewhere: gradients are dropped before the first batch of an accumulation only."""

    def twice(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        optimizer.step(closure=closure)

    mine = run(tmp_path, twice, accumulate_grad_batches=2)
    assert not differing(mine, bare([(0, [0, 1, 1], LR), (1, [2, 3, 3], LR)], accumulated=2))


def test_a_closure_may_run_before_the_step(tmp_path: Path) -> None:
    def first(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        optimizer.step()

    assert not differing(run(tmp_path, first), bare([(i, [i], LR) for i in range(4)]))


def test_two_steps_for_one_batch_are_an_error(tmp_path: Path) -> None:
    def twice(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        optimizer.step(closure=closure)

    with pytest.raises(ConfigError, match=r"twice for one batch.*global_step"):
        run(tmp_path, twice)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_toggled_optimizer_trains_what_it_holds(optimizer: str, tmp_path: Path) -> None:
    def toggled(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.step(closure=closure)
        self.untoggle_optimizer(optimizer)

    def in_context(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        with optimizer.toggle_model():
            optimizer.step(closure=closure)

    for hook in (toggled, in_context):
        mine = run(tmp_path / hook.__name__, hook, optimizer)
        assert not differing(mine, bare([(i, [i], LR) for i in range(4)], optimizer))


def test_hooks_around_zero_grad_and_schedulers_run_as_elsewhere(tmp_path: Path) -> None:
    class Counting(Wrapped):
        def __init__(self) -> None:
            super().__init__("mlp", optimizer=sgd(LR))
            self.seen: list[str] = []

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.seen.append("zero_grad")

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.seen.append("scheduler")
            scheduler.step()

        def configure_optimizers(self) -> Any:
            optimizer = self.optimizer(self)
            halved = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [{"scheduler": halved, "interval": "step"}]

    counting, elsewhere = Counting(), Counting()
    mine = fitted(tmp_path, counting, data=loader("mlp", 4))
    fitted(tmp_path, elsewhere, "auto", data=loader("mlp", 4))
    assert counting.seen == elsewhere.seen == ["zero_grad", "scheduler"] * 4
    assert not differing(mine, bare([(i, [i], LR * 0.5**i) for i in range(4)]))


def test_what_has_no_effect_is_said(tmp_path: Path, caplog: Any) -> None:
    class Overriding(Wrapped):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("not called")

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("not called")

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            pass

    mine = fitted(tmp_path, Overriding("mlp", optimizer=sgd(LR)), data=loader("mlp", 4))
    for name in ("backward", "configure_gradient_clipping", "optimizer_zero_grad"):
        assert f"Overriding.{name} has no effect" in caplog.text
    assert not differing(mine, bare([(i, [i], LR) for i in range(4)]))
    caplog.clear()
    fitted(tmp_path, Wrapped("mlp"), data=loader("mlp", 2))
    assert "has no effect" not in caplog.text


def test_one_gradient_at_a_time_is_enough_under_the_strategy(tmp_path: Path, monkeypatch: Any) -> None:
    watched = Wrapped("mlp", optimizer=OPTIMIZERS["adamw"])
    alive: list[int] = []
    make = torch_rule._gradient

    def counting(*args: Any) -> torch.Tensor:
        alive.append(sum(p.grad is not None for p in watched.parameters()))
        return make(*args)

    monkeypatch.setattr(torch_rule, "_gradient", counting)
    fitted(tmp_path, watched, data=loader("mlp", 2))
    assert alive
    assert set(alive) == {0}

"""Law: a Lightning run that is killed and resumed is the uninterrupted one, and its log is the fine-tune."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import differing, weights
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_helpers import QUIET, Resumable, Tally, Wrapped, fitted, loader, sgd, trainer
from torch import nn

from lightning_zo import ZOStrategy
from zo_core import ConfigError, SeedLog, ZeroOrder, replay
from zo_core.seedlog import load_adapter, save_adapter

pytestmark = QUIET

LOG = "seedlog.zo"


class Killed(Exception):
    """Nobody handles it."""


class Die(L.Callback):
    """Stops the run as if the process had died, when so many steps are done."""

    def __init__(self, after: int):
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            raise Killed


def stepped(module: nn.Module) -> Any:
    """Momentum, weight decay, and a schedule by step."""
    optimizer = sgd(momentum=0.9, weight_decay=0.1)(module)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Counting(Wrapped):
    """Counts its forwards, and keeps what the loop is given of each batch."""

    def __init__(self, name: str = "llama", optimizer: Any = stepped, factor: Any = None):
        super().__init__(name, optimizer)
        self.tally, self.seen, self.factor = Tally(), [], factor

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.tally.next()
        loss = super().training_step(batch, batch_idx)
        return loss if self.factor is None else loss * self.factor()

    @property
    def forwards(self) -> int:
        """Without the one with which the first measured step looks at a point twice."""
        return self.tally.count - 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.trainer.global_step, float(outputs["loss"]), batch["input_ids"].sum().item()))


def run(
    path: Path,
    module: Wrapped | None = None,
    ckpt: Any = None,
    die: int = 0,
    every: int = 0,
    strategy: Any = None,
    **settings: Any,
) -> tuple[Wrapped, Any]:
    """Twelve micro-batches in two epochs; a checkpoint in ``every`` so many steps."""
    torch.manual_seed(0)
    module = module or Counting()
    callbacks = [*settings.pop("callbacks", []), *([Die(die)] if die else [])]
    if every:
        callbacks.append(ModelCheckpoint(path, save_last=True, save_top_k=-1, every_n_train_steps=every))
    data = settings.pop("data", None) or Resumable()
    settings = {"max_epochs": 2, "enable_checkpointing": bool(every), **settings}
    made = trainer(path, strategy or {}, callbacks=callbacks, **settings)
    with suppress(Killed):
        made.fit(module, data, ckpt_path=ckpt)
    return module, made


def same(a: nn.Module, b: nn.Module) -> bool:
    return not differing(weights(a), weights(b))


def steps(path: Path) -> list[Any]:
    return [(entry.step, entry.coefficients, entry.loss, entry.lrs) for entry in SeedLog.read(path).steps]


def losses(seen: list[Any], micro_batches: int) -> list[float]:
    """The mean loss of each step, which is what the log has."""
    return torch.tensor([loss for _, loss, _ in seen]).view(-1, micro_batches).mean(1).tolist()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, 2 directions": {"accumulate_grad_batches": 2, "strategy": {"num_probes": 2}},
    "streamed, bfloat16": {"strategy": {"offload": "cpu"}, "precision": "bf16-true"},
}
FIRST = (("plain", 2), ("accumulation, 2 directions", 0))


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available")
@pytest.mark.parametrize(
    ("variant", "every"),
    [
        pytest.param(
            variant,
            every,
            id=f"{name}, {'checkpoints' if every else 'log alone'}",
            marks=[] if (name, every) in FIRST else pytest.mark.slow,
        )
        for name, variant in VARIANTS.items()
        for every in (0, 2)
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, variant: dict[str, Any], every: int) -> None:
    whole, _ = run(tmp_path / "whole", **variant)
    path = tmp_path / "killed"
    run(path, die=3, every=every, **variant)
    run(path, die=5, every=every, ckpt="last", **variant)
    again, last = run(path, every=every, ckpt="last", **variant)
    assert same(whole, again)
    accumulated = variant.get("accumulate_grad_batches", 1)
    total = 12 // accumulated
    done = 4 if every else 0  # the checkpoint; the step beyond it is repeated
    rest = whole.seen[done * accumulated :]
    assert [(step, batch) for step, _, batch in again.seen] == [(step, batch) for step, _, batch in rest]
    assert losses(again.seen, accumulated) == pytest.approx(losses(rest, accumulated), rel=1e-6)
    assert again.forwards == (total - 5) * accumulated * 2 * (2 if "num_probes" in str(variant) else 1)
    assert steps(path / LOG) == steps(tmp_path / "whole" / LOG)
    assert last.strategy.log_path == path / LOG
    base = Wrapped()
    replay(base.to(weights(whole)["model.lm_head.weight"].dtype), path / LOG)
    assert same(base, whole)


# Which log is gone on with


def test_a_named_checkpoint_goes_on_with_the_tail_if_it_is_the_newest(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    run(tmp_path, die=9, every=4)
    before = (tmp_path / LOG).read_bytes()
    newest, _ = run(tmp_path, ckpt=next(tmp_path.glob("*step=8.ckpt")), every=4)
    assert newest.forwards == 2 * (12 - 9)
    assert same(whole, newest)
    assert (tmp_path / LOG).read_bytes().startswith(before)
    older, _ = run(tmp_path, ckpt=next(tmp_path.glob("*step=4.ckpt")), every=4, data=Resumable(count=7))
    assert older.forwards == 2 * 10
    assert not same(whole, older)
    assert (tmp_path / "seedlog-1.zo").read_bytes().startswith(before)
    base = Wrapped()
    replay(base, tmp_path / LOG)
    assert same(base, older)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_with_versioned_folders_the_log_beside_the_checkpoint_goes_on_in_the_new_one(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    made = []
    for die, ckpt in ((9, None), (0, "version_0/checkpoints/last.ckpt")):
        saving = ModelCheckpoint(save_last=True, every_n_train_steps=4)
        path = None if ckpt is None else tmp_path / "lightning_logs" / ckpt
        made.append(
            run(tmp_path, ckpt=path, die=die, callbacks=[saving], enable_checkpointing=True, logger=CSVLogger(tmp_path))
        )
    (_, first), (resumed, second) = made
    assert first.strategy.log_path == tmp_path / "lightning_logs" / "version_0" / "checkpoints" / LOG
    assert second.strategy.log_path == tmp_path / "lightning_logs" / "version_1" / "checkpoints" / LOG
    assert len(steps(first.strategy.log_path)) == 9
    assert steps(second.strategy.log_path) == steps(tmp_path / "whole" / LOG)
    assert resumed.forwards == 2 * 3
    assert same(whole, resumed)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_fresh_fit_keeps_the_old_log_and_what_is_no_run_has_none(tmp_path: Path) -> None:
    fitted(tmp_path)
    before = (tmp_path / LOG).read_bytes()
    made = trainer(tmp_path, max_epochs=2)
    module = Wrapped()
    made.fit(module, loader(), loader(count=1))
    assert (tmp_path / "seedlog-1.zo").read_bytes() == before
    assert len(steps(tmp_path / LOG)) == 12
    made.fit_loop.max_epochs = 3
    made.fit(module, loader())
    assert [entry[0] for entry in steps(tmp_path / LOG)] == list(range(12, 18))
    assert len(steps(tmp_path / "seedlog-2.zo")) == 12
    for number, (strategy, settings) in enumerate(
        [("zo", {"fast_dev_run": True}), ("zo", {"barebones": True}), (ZOStrategy(log=False), {})]
    ):
        folder = tmp_path / str(number)
        quiet = {"logger": None, "enable_checkpointing": None, "log_every_n_steps": None} if number == 1 else {}
        made = trainer(folder, strategy, **quiet, **settings)
        made.fit(Wrapped("mlp"), loader("mlp"), loader("mlp"))
        assert made.strategy.log_path is None
        assert not list(folder.rglob("*.zo"))
    made = trainer(tmp_path / "evaluated")
    made.validate(Wrapped("mlp"), loader("mlp"), verbose=False)
    assert not list((tmp_path / "evaluated").rglob("*.zo"))


def test_the_path_of_the_log_may_be_given(tmp_path: Path) -> None:
    made = []
    for log in (tmp_path / "a.zo", str(tmp_path)):
        made.append(trainer(tmp_path / "elsewhere", ZOStrategy(log=log)))
        made[-1].fit(Wrapped("mlp"), loader("mlp"))
    assert [each.strategy.log_path for each in made] == [tmp_path / "a.zo", tmp_path / LOG]
    assert len(steps(tmp_path / "a.zo")) == len(steps(tmp_path / LOG)) == 6
    for wrong in ("", 1, None):
        with pytest.raises(ConfigError, match=r"log=.* must be True, False or a path"):
            ZOStrategy(log=wrong)


def test_checkpoints_on_another_machine_leave_the_log_with_the_trainer(tmp_path: Path) -> None:
    saving = ModelCheckpoint("memory://checkpoints", save_last=True)
    made = trainer(tmp_path, callbacks=[saving], enable_checkpointing=True)
    made.fit(Wrapped("mlp"), loader("mlp"))
    assert made.strategy.log_path == tmp_path / LOG
    assert len(steps(tmp_path / LOG)) == 6


# A log that does not fit never stops a run


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available")
def test_a_log_of_another_run_is_kept_aside_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, die=4)
    before = (tmp_path / LOG).read_bytes()
    other, _ = run(tmp_path, Counting(optimizer=sgd(1e-3)), ckpt="last")  # another rule
    assert "is of a run with rule='momentum', and this one has rule='sgd'" in caplog.text
    assert other.forwards == 24
    assert (tmp_path / "seedlog-1.zo").read_bytes() == before
    seeded, _ = run(tmp_path, Counting(optimizer=sgd(2e-3)), ckpt="last")  # another learning rate
    assert "has step 0 with" in caplog.text
    assert "The whole log is kept aside" in caplog.text
    assert seeded.forwards == 24
    base = Wrapped()
    replay(base, tmp_path / LOG)
    assert same(base, seeded)
    (tmp_path / LOG).write_bytes(b"nothing of ours")
    run(tmp_path, ckpt="last")
    assert "is not a seed log" in caplog.text
    for number in (1, 2, 3):
        assert (tmp_path / f"seedlog-{number}.zo").exists()


@pytest.mark.slow
def test_a_log_that_is_gone_or_shorter_begins_again_at_the_checkpoint(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", Counting(optimizer=sgd()))
    run(tmp_path, Counting(optimizer=sgd()), die=9, every=4)
    checkpoint = next(tmp_path.glob("*step=8.ckpt"))
    (tmp_path / LOG).unlink()
    resumed, _ = run(tmp_path, Counting(optimizer=sgd()), ckpt=checkpoint, every=4)
    assert same(resumed, whole)
    assert [entry[0] for entry in steps(tmp_path / LOG)] == [8, 9, 10, 11]
    base = Wrapped()
    base.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    replay(base, tmp_path / LOG)
    assert same(base, whole)


# What callbacks and schedulers need


class Plateau(Counting):
    """A schedule that watches what ``training_step`` logs."""

    def configure_optimizers(self) -> Any:
        optimizer = sgd()(self)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)
        watching = {"scheduler": schedule, "monitor": "train_loss", "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": watching}


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available")
def test_what_is_watched_is_logged_in_repeated_steps_too(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        return {"callbacks": [EarlyStopping("train_loss", patience=9, check_on_train_epoch_end=True)], "max_epochs": 3}

    whole, full = run(tmp_path / "whole", Plateau(), **settings())
    run(tmp_path, Plateau(), die=14, **settings())
    again, last = run(tmp_path, Plateau(), ckpt="last", **settings())
    assert same(whole, again)
    rates = {made.optimizers[0].param_groups[0]["lr"] for made in (full, last)}
    assert rates == {0.001 * 0.5**3}
    assert again.forwards == 36  # measured again, for what it logs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available")
def test_a_loss_that_draws_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    def drawing() -> Counting:
        return Counting(factor=lambda: 0.5 + torch.rand(()))

    whole, _ = run(tmp_path / "whole", drawing())
    run(tmp_path, drawing(), die=5)
    again, _ = run(tmp_path, drawing(), ckpt="last")
    assert same(whole, again)
    assert again.forwards == 24


def one_cycle(module: nn.Module) -> Any:
    optimizer = sgd(momentum=0.9)(module)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=13)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("strategy", [{}, pytest.param({"offload": "cpu"}, marks=pytest.mark.slow)], ids=str)
def test_a_cycled_momentum_is_in_the_log(tmp_path: Path, strategy: dict[str, Any]) -> None:
    whole, _ = run(tmp_path / "whole", Counting(optimizer=one_cycle), strategy=strategy)
    run(tmp_path, Counting(optimizer=one_cycle), die=9, every=4, strategy=strategy)
    again, _ = run(tmp_path, Counting(optimizer=one_cycle), ckpt="last", every=4, strategy=strategy)
    assert again.forwards == 2 * 3
    assert same(whole, again)
    betas = [entry.rule["beta"] for entry in SeedLog.read(tmp_path / LOG).steps if isinstance(entry.rule, dict)]
    assert len(set(betas)) > 9
    for engine in (Wrapped(), ZeroOrder(Wrapped(), rule={"name": "momentum", "beta": betas[0]})):
        replay(engine, tmp_path / LOG)
        assert same(getattr(engine, "model", engine) if isinstance(engine, ZeroOrder) else engine, whole)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.model.model.layers[0])

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.model.model.layers[0], optimizer, lr=1e-3)


def test_layers_that_are_unfrozen_begin_a_second_log(tmp_path: Path) -> None:
    def free(module: nn.Module) -> Any:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    module, _ = run(tmp_path, Wrapped(optimizer=free), callbacks=[Unfreeze()])
    assert [len(steps(tmp_path / name)) for name in ("seedlog-1.zo", LOG)] == [6, 6]
    base = Wrapped()
    for name in ("seedlog-1.zo", LOG):
        replay(base, tmp_path / name)
    assert same(base, module)


class Tunable(Wrapped):
    def __init__(self) -> None:
        super().__init__("mlp")
        self.lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_a_learning_rate_finder_has_a_log_of_its_own(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None, update_attr=False)
    module, _ = run(tmp_path, Tunable(), callbacks=[finder], data=loader("mlp"))
    base = Wrapped("mlp")
    replay(base, tmp_path / LOG)
    assert same(base, module)
    assert len(steps(tmp_path / LOG)) == 12


def test_a_run_is_shared_without_transformers(tmp_path: Path) -> None:
    module = Wrapped("mlp")
    made = trainer(tmp_path)
    made.fit(module, loader("mlp"))
    folder = save_adapter(made.strategy.log_path, tmp_path / "shared", base_model="somebody/mlp")
    assert "load_adapter(model" in (folder / "README.md").read_text()
    assert not differing(weights(load_adapter(Wrapped("mlp").model, folder)), weights(module.model))
    assert not differing(weights(load_adapter(Wrapped("mlp"), folder, until=0)), weights(Wrapped("mlp")))

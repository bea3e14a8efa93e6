"""Law: a Lightning run goes on with checkpoints of its own settings, in one process too, and refuses others."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import differing, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_helpers import QUIET, Resumable, Wrapped, loader, sgd, trainer

from zo_core import SeedLog, StateError, ZeroOrder, ZOOptimizer, replay

pytestmark = QUIET

LOG = "seedlog.zo"
DATA = Path(__file__).parents[1] / "data" / "v0_1"
LOW_RANK = {"name": "low_rank", "refresh": 3}


def own(lr: float = 1e-3, **settings: Any) -> Any:
    return lambda module: ZOOptimizer(module.parameters(), lr=lr, **settings)


def adamw(module: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def adam_8bit_like(module: Any) -> torch.optim.Optimizer:
    """Keeps what bitsandbytes keeps, under its names."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    for group in optimizer.param_groups:
        group.update(betas=(0.9, 0.999), eps=1e-8, alpha=0.0, t_alpha=None, t_beta3=None)
    return optimizer


def checkpoint(path: Path, optimizer: Any, strategy: Any) -> Path:
    run = trainer(path, strategy, max_steps=2)
    module = Wrapped("mlp", optimizer)
    file = path / "x.ckpt"
    module.on_train_end = lambda: run.save_checkpoint(file)
    run.fit(module, loader("mlp"))
    return file


def resume(path: Path, file: Path, optimizer: Any, strategy: Any = "zo") -> Wrapped:
    module = Wrapped("mlp", optimizer)
    trainer(path / "resumed", strategy, max_epochs=2).fit(module, Resumable("mlp"), ckpt_path=file)
    return module


FOREIGN: dict[str, tuple[Any, Any, str]] = {
    "AdamW into SGD": (adamw, sgd(), "written by AdamW or Adam, and this run has SGD"),
    "AdamW into our own": (
        adamw,
        own(),
        "written by AdamW or Adam, and zeroth-order.*return the optimizer of that run",
    ),
    "SGD into our own": (sgd(momentum=0.9), own(), "written by SGD, and zeroth-order training has a ZOOptimizer"),
    "SGD into AdamW": (sgd(momentum=0.9), adamw, "written by SGD, and this run has AdamW or Adam"),
    "bitsandbytes into SGD": (adam_8bit_like, sgd(), "written by bitsandbytes, and this run has SGD"),
}


@pytest.mark.parametrize("case", list(FOREIGN))
def test_the_state_of_another_optimizer_is_refused_with_its_name(case: str, tmp_path: Path) -> None:
    before, after, words = FOREIGN[case]
    file = checkpoint(tmp_path, before, "auto")
    with pytest.raises(StateError, match=words):
        resume(tmp_path, file, after)


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [(sgd(momentum=0.9), "zo"), (sgd(momentum=0.9), "auto"), (adamw, "zo"), (adamw, "auto"), (own(), "zo")],
    ids=["SGD", "SGD, backpropagation", "AdamW", "AdamW, backpropagation", "our own"],
)
def test_the_state_of_the_same_optimizer_is_taken(optimizer: Any, strategy: str, tmp_path: Path) -> None:
    file = checkpoint(tmp_path, optimizer, strategy)
    before = torch.load(file, weights_only=True)["state_dict"]
    assert differing(before, weights(resume(tmp_path, file, optimizer)))


def test_our_own_state_is_not_the_one_of_an_sgd(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, own(), "zo")
    with pytest.raises(StateError, match="written by ZOOptimizer, and this run has SGD"):
        resume(tmp_path, file, sgd())
    other = checkpoint(tmp_path, sgd(), "zo")
    with pytest.raises(StateError, match="written by SGD, and zeroth-order training has a ZOOptimizer"):
        resume(tmp_path, other, own())


CHANGED: dict[str, tuple[Any, Any, str]] = {
    "estimator": (sgd(), {"estimator": "fzoo"}, "estimator='spsa'.* estimator='fzoo'"),
    "noise": (sgd(), {"noise": "gaussian"}, "noise='rademacher'.* noise='gaussian'"),
    "rule": (sgd(momentum=0.5), {}, "rule='sgd'.* rule={'name': 'momentum', 'beta': 0.5}"),
    "eps": (sgd(), {"eps": 1e-2}, " eps=0.001, and this one has eps=0.01;.* fit without ckpt_path"),
    "num_probes": (sgd(), {"num_probes": 3}, "num_probes=1.* num_probes=3"),
    "seed": (sgd(), {"seed": 3}, "seed=0.* seed=3"),
    "rounding": (sgd(), {"stochastic_rounding": False}, "stochastic_rounding=True.* stochastic_rounding=False"),
    "weight_decay": (sgd(weight_decay=0.2), {}, "weight_decay=0.0.* weight_decay=0.2"),
}


@pytest.mark.parametrize("case", list(CHANGED))
def test_other_settings_are_an_error_that_names_both_sides(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    optimizer, settings, words = CHANGED[case]
    file = checkpoint(tmp_path, sgd(), "zo")
    with pytest.raises(StateError, match=words):
        resume(tmp_path, file, optimizer, settings)


def test_groups_and_torch_optimizers_have_an_eps_that_is_compared_too(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, own(eps=1e-3), "zo")
    with pytest.raises(StateError, match=r"eps=0.001, and this one has eps=0.01"):
        resume(tmp_path, file, own(eps=1e-2))
    file = checkpoint(tmp_path, adamw, "zo")
    with pytest.raises(StateError, match=r"eps=0.001, and this one has eps=0.01"):
        resume(tmp_path, file, adamw, {"eps": 1e-2})


def test_a_run_without_a_seed_takes_that_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    file = checkpoint(tmp_path, sgd(momentum=0.9), {"seed": 5})
    named, unnamed = (resume(tmp_path, file, sgd(momentum=0.9), s) for s in ({"seed": 5}, {}))
    assert not differing(weights(named), weights(unnamed))


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available")
def test_a_log_with_other_settings_is_kept_aside_and_both_sides_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for settings, words in (
        ({}, ""),
        ({"eps": 1e-2}, "is of a run with eps=0.001, and this one has eps=0.01;"),
        ({"eps": 1e-2, "estimator": "fzoo"}, "estimator='spsa', num_probes=1"),
    ):
        trainer(tmp_path, settings, max_steps=2).fit(Wrapped("mlp"), loader("mlp"), ckpt_path="last")
        assert words in caplog.text
    assert len(list(tmp_path.glob("seedlog-*.zo"))) == 2


OLD = {"sgd": sgd(0.0, momentum=0.9), "own": own(lr=0.0)}


@pytest.mark.parametrize("name", list(OLD))
def test_checkpoints_of_version_0_1_load_and_go_on(name: str, tmp_path: Path) -> None:
    file = DATA / f"lightning_{name}.ckpt"
    old = torch.load(file, weights_only=True)
    assert "zo" not in old["optimizer_states"][0]
    module = Wrapped("mlp", OLD[name])
    seen: list[Any] = []
    run = trainer(tmp_path, {"seed": 5}, max_epochs=2)
    module.on_train_start = lambda: seen.append(
        (run.global_step, weights(module), copy.deepcopy(run.strategy.optimizer_state(run.optimizers[0])))
    )
    run.fit(module, Resumable("mlp"), ckpt_path=file)
    step, found, state = seen[0]
    assert step == 2
    assert not differing(found, old["state_dict"])
    assert state.pop("zo")["settings"]["seed"] == 5
    assert state["param_groups"] == old["optimizer_states"][0]["param_groups"]
    for index, kept in old["optimizer_states"][0]["state"].items():
        assert torch.equal(state["state"][index]["momentum_buffer"], kept["momentum_buffer"])
    assert run.global_step > 2
    if name == "own":  # its groups have the eps, and SGD's do not
        with pytest.raises(StateError, match=r"eps=0.001, and this one has eps=0.01"):
            resume(tmp_path, file, own(eps=1e-2), {"seed": 5})


# In one process


class Stop(L.Callback):
    """Ctrl-C, once, after so many steps."""

    def __init__(self, after: int, error: type[BaseException]):
        self.after, self.error = after, error

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            self.after = -1
            raise self.error


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": (sgd(momentum=0.9), {}),
    "low rank": (own(), {"rule": "momentum", "noise": LOW_RANK}),
    "streamed": (sgd(momentum=0.9), {"offload": "cpu"}),
}


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Lightning ignores the signal from the first one on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("run", [pytest.param(value, id=name) for name, value in RUNS.items()])
def test_an_interrupted_fit_goes_on_from_its_checkpoint(run: Any, error: type[BaseException], tmp_path: Path) -> None:
    optimizer, settings = run

    def made(path: Path, *callbacks: Any) -> L.Trainer:
        saving = ModelCheckpoint(path, save_last=True, save_top_k=-1, every_n_train_steps=2)
        return trainer(path, settings, max_epochs=2, enable_checkpointing=True, callbacks=[saving, *callbacks])

    whole, stopped = Wrapped(optimizer=optimizer), Wrapped(optimizer=optimizer)
    made(tmp_path / "whole").fit(whole, Resumable())
    again = made(tmp_path / "stopped", Stop(5, error))
    data = Resumable()
    with pytest.raises((error, SystemExit)):
        again.fit(stopped, data)
    again.fit(stopped, data, ckpt_path="last")
    assert again.global_step == 12
    assert not differing(weights(whole), weights(stopped))


@pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available")
def test_without_a_checkpoint_the_rest_has_a_log_of_its_own(tmp_path: Path) -> None:
    """The optimizer of a second fit is a new one, so its momentum begins again, and the logs say what was done."""
    module = Wrapped(optimizer=sgd(momentum=0.9))
    run = trainer(tmp_path, max_epochs=2, callbacks=[Stop(6, RuntimeError)])
    with pytest.raises(RuntimeError):
        run.fit(module, loader())
    run.fit(module, loader(), ckpt_path="last")
    base = Wrapped()
    steps = []
    for name in ("seedlog-1.zo", LOG):
        log = SeedLog.read(tmp_path / name)
        steps += [entry.step for entry in log.steps]
        replay(ZeroOrder(base, rule={"name": "momentum", "beta": 0.9}), log)
    assert steps == sorted(set(steps))
    assert not differing(weights(base), weights(module))

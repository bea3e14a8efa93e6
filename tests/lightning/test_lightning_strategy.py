"""What Lightning expects of a strategy, and what a user is told where something cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hf_helpers import differing, weights
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from lightning_helpers import QUIET, TIERS, Wrapped, fitted, loader, sgd, trainer
from torch import nn

import lightning_zo
from lightning_zo import ZOStrategy
from zo_core import ConfigError, ZeroOrder, ZOConfig

pytestmark = QUIET


def test_both_names_are_registered_and_importing_again_changes_nothing() -> None:
    assert {"zo", "zo_offload"} <= set(StrategyRegistry.available_strategies())
    lightning_zo.strategy.register()
    assert StrategyRegistry.get("zo").config == ZOConfig()
    assert StrategyRegistry.get("zo_offload").config == ZOConfig(offload="cpu")
    assert StrategyRegistry["zo"]["description"]


def test_the_trainer_takes_either_name_and_gives_the_device(tmp_path: Path) -> None:
    for name in ("zo", "zo_offload"):
        run = trainer(tmp_path, name, accelerator="auto" if not torch.cuda.is_available() else "cpu")
        assert isinstance(run.strategy, ZOStrategy)
        assert run.strategy.root_device == torch.device("cpu")
        assert (run.num_devices, run.world_size, run.num_nodes, run.is_global_zero) == (1, 1, 1, True)


def test_a_strategy_may_be_used_again(tmp_path: Path) -> None:
    strategy = ZOStrategy({"num_probes": 2})
    runs = []
    for _ in range(2):
        module = Wrapped("mlp")
        trainer(tmp_path, strategy, accelerator="auto").fit(module, loader("mlp"))
        runs.append(weights(module))
    assert not differing(*runs)


def test_a_model_is_as_ordinary_after_a_run_as_before(tmp_path: Path) -> None:
    variables, threads = dict(os.environ), set(threading.enumerate())
    module = Wrapped(optimizer=sgd(momentum=0.9))
    run = trainer(tmp_path, "zo_offload")
    run.fit(module, loader(), loader(count=2))
    assert dict(os.environ) == variables
    assert set(threading.enumerate()) == threads
    assert run.global_step == 6
    assert not any(torch.isnan(parameter).any() for parameter in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._state_dict_hooks for m in module.modules())
    assert module.training_step is not None
    assert "log" not in vars(module)
    assert weights(module).keys() == weights(Wrapped()).keys()
    assert not differing(
        weights(module), {f"model.{k}": v for k, v in fitted(tmp_path, Wrapped(optimizer=sgd(momentum=0.9))).items()}
    )


def test_threads_end_after_an_exception_in_validation_too(tmp_path: Path) -> None:
    class Failing(Wrapped):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                raise RuntimeError("in validation")

    threads = set(threading.enumerate())
    module = Failing()
    with pytest.raises(RuntimeError, match="in validation"):
        trainer(tmp_path, "zo_offload").fit(module, loader(), loader(count=2))
    assert set(threading.enumerate()) == threads
    assert {f"model.{name}" for name in fitted(tmp_path)} == set(weights(module))
    assert not differing({n.removeprefix("model."): v for n, v in weights(module).items()}, fitted(tmp_path))


@pytest.mark.parametrize("tier", [*TIERS, "disk"])
def test_evaluation_of_all_kinds_is_that_of_the_plain_model(tmp_path: Path, tier: str | None) -> None:
    settings = {"offload": "disk", "offload_dir": str(tmp_path / "blocks")} if tier == "disk" else {"offload": tier}
    module, data, threads = Wrapped(), loader(count=3), set(threading.enumerate())
    for strategy in (settings, "auto"):
        run = trainer(tmp_path, strategy)
        found = [run.validate(module, data, verbose=False), run.test(module, data, verbose=False)]
        found.append([float(value) for value in run.predict(module, data)])
        if strategy == settings:
            zo = found
    assert zo == found
    assert set(threading.enumerate()) == threads
    assert not differing(weights(module), weights(Wrapped()))


def test_validation_in_the_middle_sees_final_weights(tmp_path: Path) -> None:
    class Watching(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(float(self.loss(batch)))

    runs = [Watching(), Watching()]
    for module, name in zip(runs, ("zo", "zo_offload"), strict=True):
        trainer(tmp_path, name, val_check_interval=2).fit(module, loader(), loader(count=2))
    assert runs[0].seen == runs[1].seen
    assert len(set(runs[0].seen)) > 4


@pytest.mark.parametrize("tier", TIERS)
def test_callbacks_and_loggers(tmp_path: Path, tier: str | None) -> None:
    def scheduled(module: nn.Module) -> Any:
        optimizer = sgd()(module)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    callbacks = [
        ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=1),
        EarlyStopping("val_loss", patience=1, min_delta=10.0),
        LearningRateMonitor(),
    ]
    run = trainer(
        tmp_path,
        {"offload": tier},
        max_epochs=5,
        callbacks=callbacks,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path),
    )
    module = Wrapped(optimizer=scheduled)
    run.fit(module, loader(), loader(count=2))
    assert run.current_epoch == 2  # stopped early
    text = (Path(run.log_dir) / "metrics.csv").read_text()
    assert "lr-SGD" in text
    assert "val_loss" in text
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-3 * 0.5**2
    best = Wrapped.load_from_checkpoint(callbacks[0].best_model_path)
    assert differing(weights(best), weights(Wrapped()))


@pytest.mark.parametrize("name", ["zo", "zo_offload"])
def test_fast_dev_run(tmp_path: Path, name: str) -> None:
    run = L.Trainer(
        strategy=name,
        fast_dev_run=2,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    run.fit(Wrapped(), loader(), loader())
    assert run.global_step == 2


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clip_val_bounds_the_projected_gradient_and_says_so(
    tmp_path: Path, caplog: Any, algorithm: Any
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        mine = fitted(tmp_path, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    assert "gradient_clip_val=0.1 bounds the projected gradient" in caplog.text
    assert not differing(mine, fitted(tmp_path, strategy={"clip": 0.1}))
    assert differing(mine, fitted(tmp_path))


def test_16_mixed_has_no_scaler(tmp_path: Path) -> None:
    class Refusing(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            raise AssertionError("nothing is scaled")

        unscale_ = step = update = scale

    precision = MixedPrecision("16-mixed", "cpu", Refusing("cpu", enabled=True))
    module = Wrapped()
    mine = fitted(tmp_path, module, plugins=[precision])
    model = Wrapped().model
    zo = ZeroOrder(model, lr=1e-3)
    for batch in loader():
        with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
            zo.measure(lambda batch=batch: model(**batch).loss)
        zo.optimizer.step()
    assert not differing(mine, weights(model))


def test_the_seed_is_that_of_seed_everything_unless_the_config_has_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    plain = fitted(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that what seed_everything sets is taken back, too
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    seed_everything(7, verbose=False)
    seven = fitted(tmp_path)
    assert differing(plain, seven)
    assert not differing(seven, fitted(tmp_path, strategy={"seed": 7}))
    assert not differing(plain, fitted(tmp_path, strategy={"seed": 0}))


def test_a_compiled_module_trains_with_whole_copies(tmp_path: Path) -> None:
    compiled = torch.compile(Wrapped("mlp"), backend="eager")
    run = trainer(tmp_path)
    run.fit(compiled, loader("mlp"))
    mine = {n.removeprefix("model."): v for n, v in weights(run.lightning_module).items()}
    assert not differing(mine, fitted(tmp_path, Wrapped("mlp"), data=loader("mlp")))
    module = Wrapped()
    with pytest.raises(ConfigError, match="compiled"):
        trainer(tmp_path, "zo_offload").fit(torch.compile(module, backend="eager"), loader())
    assert not differing(weights(module), weights(Wrapped()))


class Manual(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Iterating(Wrapped):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


def two(module: nn.Module) -> Any:
    return [torch.optim.SGD([p], lr=1e-3) for p in list(module.parameters())[:2]]


PROBLEMS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "manual optimization": (Manual, "zo", {}, "automatic_optimization is False.*return the loss from training_step"),
    "several optimizers": (lambda: Wrapped(optimizer=two), "zo", {}, "several optimizers.*parameter group for each"),
    "no optimizer": (lambda: Wrapped(optimizer=lambda m: None), "zo", {}, "returned no optimizer"),
    "an optimizer that looks at gradients": (
        lambda: Wrapped(optimizer=lambda m: torch.optim.AdamW(m.parameters())),
        "zo_offload",
        {},
        "returned a AdamW.*ZOOptimizer",
    ),
    "clipping twice": (Wrapped, {"clip": 1.0}, {"gradient_clip_val": 1.0}, "clip=1 .* leave out one"),
    "lr twice": (Wrapped, {"lr": 1e-3}, {}, "lr=0.001 was given together with an optimizer"),
    "momentum and a rule": (
        lambda: Wrapped(optimizer=sgd(momentum=0.9)), {"rule": "sign"}, {}, "rule='sign' .* SGD.momentum=0.9"
    ),
    "averaging": (Wrapped, "zo_offload", {"callbacks": [WeightAveraging()]}, "WeightAveraging reads weights behind"),
    "a loader of its own": (Iterating, "zo", {}, "takes dataloader_iter"),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:.*configure_optimizers` returned `None`", "ignore:You are using the `dataloader_iter`"
)
@pytest.mark.parametrize(("make", "strategy", "settings", "message"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_what_cannot_work_is_said_before_the_run(
    tmp_path: Path, make: Any, strategy: Any, settings: dict[str, Any], message: str
) -> None:
    module = make()
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, strategy, **settings).fit(module, loader())
    assert not differing(weights(module), weights(Wrapped()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="two CPU processes: CUDA has its own number of devices")
def test_a_strategy_takes_the_devices_of_each_trainer(tmp_path: Path) -> None:
    strategy = ZOStrategy()
    several = trainer(tmp_path, strategy, devices=2, num_nodes=2, accelerator="auto")
    assert (several.num_devices, several.world_size, several.num_nodes) == (2, 4, 2)
    assert several.distributed_sampler_kwargs == {"num_replicas": 4, "rank": 0}
    assert not strategy.parallel_devices  # so that the next one sets its own
    one = trainer(tmp_path, strategy, devices=1, accelerator="auto")
    assert (one.num_devices, one.world_size, one.num_nodes) == (1, 1, 1)


def test_the_config_is_checked_at_once() -> None:
    assert ZOStrategy({"eps": 1e-2, "estimator": "fzoo"}).config == ZOConfig(eps=1e-2, estimator="fzoo")
    with pytest.raises(ConfigError, match="'epz' is not a setting"):
        ZOStrategy({"epz": 1e-2})
    with pytest.raises(ConfigError, match="must be a ZOConfig or a dict"):
        ZOStrategy(1e-3)  # type: ignore[arg-type]


SCRIPT = """
import os, sys
import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
import lightning_zo
from lightning_helpers import Wrapped, loader

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

class Model(Wrapped):
    def __init__(self, name: str = "llama"):
        super().__init__(name)

for folder in sys.argv[1:]:
    os.chdir(folder)
    sys.argv = ["script.py", "fit", "--config", "run.yaml"]
    cli = LightningCLI(Model, Data, seed_everything_default=False)
    print(cli.trainer.strategy.config)
"""

YAML = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  strategy:
    class_path: lightning_zo.ZOStrategy
    init_args:
      config: {eps: 0.01, estimator: fzoo, num_probes: 2}
      log: LOG
"""


@pytest.mark.slow
def test_lightning_cli_configures_the_strategy_from_yaml(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    short = YAML[: YAML.index("strategy")] + "strategy: zo_offload\n"
    runs = [  # what is written, the log, and what the strategy then has
        (YAML.replace("LOG", "run/steps.zo"), ["run/steps.zo"], "eps=0.01"),
        (YAML.replace("LOG", "false"), [], "eps=0.01"),
        (short, ["seedlog.zo"], "offload='cpu'"),
    ]
    (tmp_path / "script.py").write_text(SCRIPT)
    folders = [tmp_path / str(index) for index in range(len(runs))]
    for folder, (yaml, _, _) in zip(folders, runs, strict=True):
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml)
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here / 'helpers'}"}
    command = [sys.executable, "script.py", *map(str, folders)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    configs = [line for line in result.stdout.splitlines() if line.startswith("ZOConfig(")]
    for folder, config, (_, logs, setting) in zip(folders, configs, runs, strict=True):
        assert setting in config
        assert [str(path.relative_to(folder)) for path in folder.rglob("*.zo")] == logs

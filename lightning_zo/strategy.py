"""The strategy: Lightning's loops with only forward passes.

It uses Lightning's own seams and copies none of its loops: ``training_step`` runs the module's
``training_step`` once per probe, ``backward`` has nothing to do, and ``optimizer_step`` applies the
measurements.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from zo_core import ConfigError, ModelError, Summary, ZeroOrder, ZOConfig
from zo_core.following import take_over
from zo_core.placement import offload_model
from zo_core.seedlog import LoggedStep, can_log
from zo_core.streaming import Streaming, move_streamed
from zo_core.targets import check_values, keep_codes_plain

from .auto_lr import batches, length
from .closure import StepGuard, not_executed
from .decay import decay, kept
from .engine import FRONT_END, build, check, settings
from .journal import Journal, log_path
from .loaders import EndingTogether
from .logs import log_line
from .probes import Probes
from .processes import Processes
from .sgd import SGDFace

logger = logging.getLogger("lightning_zo")


class ZOStrategy(Processes):
    """Zeroth-order training of an unchanged `LightningModule`:

        Trainer(strategy="zo")                                       # or "zo_offload"
        Trainer(strategy=ZOStrategy(ZOConfig(estimator="fzoo")))

    ``training_step`` runs once per probe (twice, by default), in eval mode and without gradients;
    what it logs counts once per step, as the mean over the probes. Learning rate, weight decay and
    momentum are those of the optimizer from ``configure_optimizers``.

    Args:
        config: a `ZOConfig`, or a dict of its fields, as in YAML. None uses the defaults. If it has no
            ``seed``, that of ``seed_everything`` is used, else 0.
        log: whether to write every step to a seed log, ``seedlog.zo`` next to the checkpoints; or its path.

    Attributes:
        zo: the engine of the run, from the start of ``fit`` on.
        log_path: path of the run's seed log, from the start of ``fit`` on; None if it has none.

    Raises:
        ConfigError: settings are not valid, or the run has several optimizers, or manual optimization.
    """

    strategy_name = "zo"

    # dict comes first in the annotation, so that LightningCLI passes on plain YAML: our own check explains mistakes.
    def __init__(self, config: dict[str, Any] | ZOConfig | None = None, log: bool | str | os.PathLike[str] = True):
        super().__init__()
        if isinstance(config, Mapping):
            config = ZOConfig.from_dict(dict(config))
        elif config is not None and not isinstance(config, ZOConfig):
            raise ConfigError([f"config={config!r} must be a ZOConfig or a dict, for example ZOConfig(eps=1e-3)"])
        if not isinstance(log, (bool, str, os.PathLike)) or log == "":
            raise ConfigError([f"log={log!r} must be True, False or a path, for example 'run/seedlog.zo'"])
        self.config, self.log = config or ZOConfig(), log
        self.zo: ZeroOrder | None = None
        self.log_path: Path | None = None
        self._journal: Journal | None = None
        self._summary = Summary()
        self._settings = self.config
        self._streaming: Streaming | None = None
        self._trained: list[int] = []
        self._guard = StepGuard()
        self._runs = self._losses = 0
        self._partial = self._stepped = False

    def connect(self, model: LightningModule) -> None:
        """Connects a module; raises `ModelError` if a parameter has no values."""
        try:
            check_values(model, frozen=True)
        except ModelError:
            self._lightning_module = None  # teardown would move it to the CPU, and fail
            raise
        super().connect(model)

    def model_to_device(self) -> None:
        """Moves the model to the device; one that will be streamed is moved later, without its layers."""
        if self.model is not None and Streaming.of(self.model) is not None:
            move_streamed(self.model, self.root_device)
        elif self.config.offload is None or self.root_device.type == "cpu":
            assert self.model is not None
            self.model.to(self.root_device)

    # The run

    def setup(self, trainer: Trainer) -> None:
        """Does what every strategy does; a model that is only evaluated is also streamed."""
        super().setup(trainer)
        if self.config.offload is not None and trainer.state.fn != TrainerFn.FITTING:
            assert self.model is not None
            self._streaming = offload_model(self.model, self.config, [], self.root_device)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Calls ``configure_optimizers`` and makes the engine; raises `ConfigError` if these do not fit together."""
        module = self._module()
        check(trainer, module, self.config)
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" not in str(error):
                raise
            raise ConfigError(
                [
                    f"{type(module).__name__}.configure_optimizers returned several optimizers, but a zeroth-order "
                    "step measures one loss and moves all weights at once; return one optimizer with a parameter group "
                    "for each, which may have its own lr"
                ]
            ) from error
        if not self.optimizers[0].param_groups:
            raise ConfigError(
                [
                    f"{type(module).__name__}.configure_optimizers returned no optimizer, so nothing would be trained; "
                    "return zo_core.ZOOptimizer(self.parameters(), lr=1e-6), or the torch optimizer it has elsewhere"
                ]
            )
        self._settings = settings(trainer, self.config, self.root_device)
        self._summary = Summary()
        self._start().listeners.append(self._summary.add)
        if not self.lr_scheduler_configs:
            self.lr_scheduler_configs = decay(trainer, self.optimizers[0])
        path = log_path(trainer, self.log)
        self.log_path = path if path is not None and can_log(self.config) else None
        self._journal = None if self.log_path is None else Journal(trainer, self.log_path, self.launcher.ckpt_path)
        if self._journal is not None:
            self._journal.summary = self._summary

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the data a process takes: all of it with "points", which deals out points instead."""
        return {"num_replicas": 1, "rank": 0} if self.config.ranks == "points" else super().distributed_sampler_kwargs

    def process_dataloader(self, dataloader: Any) -> Any:
        """Makes the epoch end in all processes at once, where the length of their data is not known."""
        unknown = self.is_distributed and self._module().trainer.training and sized_len(dataloader) is None
        return EndingTogether(dataloader, lambda: self.zo) if unknown else dataloader

    def _start(self) -> ZeroOrder:
        """Makes an engine for the optimizer's current parameters; it takes over the state of a running engine."""
        module, optimizer, before = self._module(), self.optimizers[0], self.zo
        running = before is not None and getattr(before.optimizer, "inner", before.optimizer) is optimizer
        if running:
            assert before is not None
            if self._journal is not None:
                self._journal.end()  # another set of tensors moves from now on, with its own log
            before.close(torch.device("cpu"))
        zo = self.zo = build(module, optimizer, self._settings)  # set at once, so that teardown closes it
        if running and before is not None:
            take_over(zo, before)
        zo.around_second(self._second_round)
        if zo.backprop is not None:
            zo.backprop.bound(module.trainer.gradient_clip_val)
        zo.continuity.speak_as(FRONT_END)
        if getattr(module, "_compiler_ctx", None):
            zo.copy_whole()
        self._trained = self._trainable()
        self._guard.watch(optimizer)
        self._forget()
        return zo

    def _trainable(self) -> list[int]:
        groups = self.optimizers[0].param_groups
        return [id(tensor) for group in groups for tensor in group["params"] if tensor.requires_grad]

    def _module(self) -> LightningModule:
        assert self.lightning_module is not None, "Trainer connects the module before it sets up anything"
        return self.lightning_module

    def teardown(self) -> None:
        """Applies pending updates, and moves the model to host memory; one that was streamed before stays streamed."""
        if self._journal is not None:
            self._journal.end()
            self._journal = None
        self._guard.release()
        if self.zo is not None:
            self.zo.stop()
            if self.config.offload is not None:
                self.zo.close(torch.device("cpu"))
        if self._streaming is not None:
            self._streaming.close(torch.device("cpu"))
            self._streaming = None
        if self.model is not None and Streaming.of(self.model) is not None:
            move_streamed(self.model, torch.device("cpu"))
        super().teardown()

    # The step

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Measures one micro-batch: runs the module's ``training_step`` once per probe.

        Returns:
            The module's return value, with the mean loss over the probes. None if a probe had no loss.
        """
        run, module = super().training_step, self._module()
        if module.trainer.fit_loop._skip_backward:  # an epoch that only updates statistics
            return run(*args, **kwargs)
        zo = self._at_step(module.trainer.global_step)
        zo.agree_on({"batches in an epoch": module.trainer.num_training_batches})
        self._runs += 1
        schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
        steps = length(module.trainer) if zo.wants_lr else None
        zo.find_lr(partial(self._lr_batches, zo, run, args, kwargs), schedulers, steps)
        zo.look_back(partial(length, module.trainer))
        entry, journal = self._logged(zo), self._journal
        if entry is not None and journal is not None and not entry.draws and journal.measures_again is False:
            self._losses += 1
            entry.repeat(zo)
            return torch.tensor(entry.loss, device=self.root_device)
        probes = Probes(module, zo.point_count, module.trainer.accumulate_grad_batches, zo.streaming is not None)
        # Also around all probes: half precision sets the default dtype of the whole process, and probes of a
        # streamed model take turns.
        watching = nullcontext() if journal is None or entry is not None else journal.watching()
        with self.precision_plugin.train_step_context(), probes.recording(), watching:
            zo.measure(partial(probes.run, run, args, kwargs))
        probes.finish()
        if entry is not None and journal is not None:
            entry.repeat(zo)
            journal.saw(probes.names)
        probes.log()
        self._losses += not probes.without_loss
        self._partial |= 0 < probes.without_loss < len(probes.runs)
        output = probes.output()
        probes.runs.clear()  # the last step of a run may measure this batch again
        return output

    @contextmanager
    def _second_round(self) -> Iterator[None]:
        """Measures again what `training_step` has measured, now or in the first steps, without logging it."""
        assert self.zo is not None
        probes = Probes(self._module(), 0, 1, self.zo.streaming is not None)
        with self.precision_plugin.train_step_context(), probes.recording():
            yield

    def _logged(self, zo: ZeroOrder) -> LoggedStep | None:
        """Returns the step to repeat instead of measuring it, if there is one."""
        if isinstance(zo.optimizer, SGDFace):
            zo.optimizer.follow()  # the log has the learning rate of this step
        return None if self._journal is None else self._journal.logged(zo)

    @contextmanager
    def _lr_batches(
        self, zo: ZeroOrder, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[list[Callable[[], Any]]]:
        """Yields losses for the range test: of a few batches, or of the current one if no others are available."""
        module = self._module()
        probes = Probes(module, 0, 1, zo.streaming is not None)

        def closure(batch: Any) -> Any:
            probes.runs.clear()
            return probes.run(run, (batch, *args[1:]), kwargs)

        drawn = batches(module.trainer) or [args[0]]
        with self.precision_plugin.train_step_context(), probes.recording(), self._guard.stepping():
            yield [partial(closure, batch) for batch in drawn]

    def _at_step(self, step: int) -> ZeroOrder:
        """Returns the engine, ready to measure the step with this index."""
        assert self.zo is not None, "setup_optimizers makes the engine"
        zo = self.zo
        trainer = self._module().trainer
        if zo.step_count != step or trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            # The first micro-batch of a step. Earlier measurements that were not applied are dropped, as Lightning's
            # closure would drop the gradients of a batch whose step was left out, or that runs once more.
            zo.at(step)
            self._forget()
        if not self._losses and self._trained != self._trainable():  # a callback froze or unfroze layers
            zo = self._start()
            zo.at(step)
        return zo

    def _forget(self) -> None:
        self._runs = self._losses = 0
        self._partial = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Allows one step for the new batch."""
        super().on_train_batch_start(batch, batch_idx)
        self._stepped = False

    def backward(self, closure_loss: Tensor, optimizer: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Does nothing; hooks around a backward pass are not called."""
        return closure_loss

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Measures the last micro-batch and moves the weights, in any precision without a scaler."""
        result, trainer = closure(), self._module().trainer
        if trainer.fit_loop._skip_backward:
            return result
        if self._stepped:
            raise ConfigError(
                [
                    "optimizer.step was called twice for one batch, and the directions of a step derive from "
                    "trainer.global_step; call it once in optimizer_step"
                ]
            )
        if not self._runs:
            raise not_executed()
        call._call_callback_hooks(trainer, "on_before_optimizer_step", optimizer)
        call._call_lightning_module_hook(trainer, "on_before_optimizer_step", optimizer)
        assert self.zo is not None
        if self._partial or not self._losses:
            which = "some probes" if self._partial else "every probe"
            logger.warning(
                "step %d skipped, weights untouched: training_step returned None in %s", self.zo.step_count, which
            )
            self.zo.skip("training_step returned None")
        else:
            with self._guard.stepping(result):
                self.zo.optimizer.step()
        self._stepped = True
        self._forget()
        log_line(trainer, self._summary, self.zo)
        return result

    # Checkpoints and evaluation use final weights

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Does what every strategy does, and records the checkpoint in the seed log."""
        if self._journal is not None:
            self._journal.sync()
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self._journal is not None and "optimizer_states" in checkpoint:  # others only have the weights
            self._journal.note_checkpoint(checkpoint["global_step"])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Does what every strategy does; 4-bit layers also load their scales."""
        keep_codes_plain(self._module())
        super().load_model_state_dict(checkpoint, strict)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the weights, after applying pending updates."""
        self._flush()
        return super().lightning_module_state_dict()

    def on_validation_start(self) -> None:
        """Applies pending updates."""
        self._flush()

    def _flush(self) -> None:
        if self.zo is not None:
            self.zo.flush()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Returns the optimizer's state, in the format of its own class, with our mark."""
        if self.zo is None:
            return super().optimizer_state(optimizer)
        face = self.zo.optimizer
        return face.sgd_state_dict() if isinstance(face, SGDFace) else face.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the state of a checkpoint, which may come from a run of this optimizer with backpropagation.

        Raises:
            StateError: another optimizer or a run with other settings wrote it.
        """
        if self._trained != self._trainable():  # a callback restored its own parameter groups
            self._start()
        assert self.zo is not None, "setup_optimizers makes the engine"
        face, state = self.zo.optimizer, checkpoint["optimizer_states"][0]
        load = face.load_sgd_state_dict if isinstance(face, SGDFace) else face.load_state_dict
        load(state)
        self.lr_scheduler_configs = kept(self.lr_scheduler_configs, checkpoint)


def register() -> None:
    """Registers "zo" and "zo_offload" as names for ``Trainer(strategy=...)``."""
    names = {
        "zo": (None, "Zeroth-order training: forward passes only"),
        "zo_offload": (ZOConfig(offload="cpu"), "Zeroth-order training, layers streamed from host memory"),
    }
    for name, (config, description) in names.items():
        StrategyRegistry.register(name, ZOStrategy, description=description, override=True, config=config)

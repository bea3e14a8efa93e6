"""The mixin that turns a Hugging Face trainer into a forward-only one.

It uses three seams of `Trainer` and copies none of its loops: ``create_optimizer`` returns an
optimizer whose ``step`` applies what was measured; ``training_step`` runs the trainer's own
``training_step`` once per probe, with ``accelerator.backward`` switched off; and
``compute_loss_context_manager``, entered just before each loss, sets the modes of the probe.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_core import RULES, ConfigError, Point, StepRecord, ZeroOrder, ZOConfig, ZOOptimizer
from zo_core.checkpoint import begin_again
from zo_core.config import AUTO
from zo_core.modes import eval_mode, frozen_statistics
from zo_core.offload import LockstepOracle, Streaming
from zo_core.optimizer import param_groups
from zo_core.oracle.materialise import is_compiled
from zo_core.placement import offload_model
from zo_core.seedlog import LoggedStep

from .arguments import ZOArguments, front_end
from .auto_lr import samples, schedulers, unnoticed
from .checks import add_counters, check_arguments, counters, warn_about_numbers
from .journal import Journal, exit_on_sigterm
from .quantised import quantised_training

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class ZOTrainerMixin(_Trainer):
    """Put it before any `transformers.Trainer` subclass:

        class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer): ...

    Everything that the trainer does around a step stays its own: schedules, accumulation, label
    smoothing, callbacks, evaluation, checkpoints. What differs:

    * the loss is computed once per probe (twice by default), without gradients, with every submodule
      in eval mode; only the root keeps its ``training`` flag, which trainers read;
    * the logs have ``projected_grad`` (root mean square since the last log) and ``zo_clip_rate``
      instead of ``grad_norm``, and ``zo_skipped_steps`` if there were any;
    * directions derive from ``zo_config.seed``, else ``args.seed``, and the global step;
    * every step goes to ``seedlog.zo`` in the output folder (``zo_log=False`` leaves it out), and
      ``train(resume_from_checkpoint=True)`` takes the last complete checkpoint, or the model as it is if
      there is none, and repeats what the log has beyond it, also after an interrupt in the same process;
    * a second ``train()`` is a run of its own, which draws other directions.

    Args:
        zo_config: a `ZOConfig`. None takes the ``zo_*`` fields of `args`, if it has them, else the
            defaults. Its ``lr`` and ``weight_decay``, if set, go before those of ``args``.
    """

    def __init__(self, *args: Any, zo_config: ZOConfig | None = None, **kwargs: Any):
        self.zo: ZeroOrder | None = None
        self._zo_given = zo_config
        self._zo_running = threading.local()
        self._zo_together: list[Any] = []
        self._zo_losses: dict[int, Tensor] = {}
        self._zo_journal: Journal | None = None
        self._zo_records: deque[StepRecord] = deque(maxlen=10_000)
        with quantised_training(args, kwargs, zo_config):
            super().__init__(*args, **kwargs)
        check_arguments(self.args, is_model_parallel=self.is_model_parallel)
        self.zo_config = self._resolve_config(zo_config)

    def _resolve_config(self, config: ZOConfig | None) -> ZOConfig:
        if config is not None and not isinstance(config, ZOConfig):
            raise ConfigError([f"zo_config={config!r} must be a ZOConfig, for example ZOConfig(eps=1e-3)"])
        args = self.args if isinstance(self.args, ZOArguments) else ZOArguments()
        if config is None:
            return args.to_zo_config()
        if args.zo_settings():
            given = ", ".join(f"zo_{name}" for name in args.zo_settings())
            raise ConfigError([f"settings came twice, in zo_config and in args ({given}); write them in one place"])
        return config

    # The log

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; with True, steps that only the seed log has are repeated, not lost.

        Raises:
            StateError: the log is damaged, or of another run; it says which.
        """
        if self.zo is not None and not resume_from_checkpoint and self.model_init is None:
            begin_again(self.zo)
        if not getattr(self.args, "zo_log", True):
            self._zo_journal = None
            return super().train(resume_from_checkpoint, *args, **kwargs)
        folder, before = self._get_output_dir(kwargs.get("trial")), self._zo_journal
        if self.args.load_best_model_at_end and self.args.save_only_model:
            before = None  # checkpoints to choose from, and none to go on from: only the model as it began has them all
        with Journal(folder, resume_from_checkpoint, before) as journal, exit_on_sigterm():
            self._zo_journal = journal
            return super().train(journal.checkpoint, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._zo_behind():
            return  # it was saved when the step was measured, and the weights are those of a later one
        if self._zo_journal is not None:
            self._zo_journal.begin_checkpoint(self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`; a repeated step has the metrics of when it was measured."""
        output = super().evaluation_loop(*args, **kwargs)
        if self._zo_journal is not None and self._zo_journal.running:
            metrics: dict[str, float] = output.metrics or {}
            metrics.update(self._zo_journal.metrics(self.state.global_step, metrics, behind=self._zo_behind()))
        return output

    def _zo_behind(self) -> bool:
        """Whether the step is one that an interrupted run has done, whose weights are in memory."""
        if self.zo is None or self._zo_journal is None or not self._zo_journal.running:
            return False
        return self.state.global_step < self.zo.continuity.ahead

    # The optimizer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = None  # a GradScaler fails where there are no gradients

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """A model that is to be streamed never goes to the device as a whole."""
        config = self._resolve_config(self._zo_given)
        if config.offload is not None and device.type != "cpu" and Streaming.of(model) is None:
            offload_model(model, config, config.resolve().target.slots(model), device)
        super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The engine's `ZOOptimizer`, or one in front of the torch optimizer that was passed."""
        model = self._zo_model() if model is None else model
        self._zo_records.clear()  # a run before this one may have stopped between two logs
        if self._zo_journal is not None:
            self._zo_journal.end()  # this run may be another attempt, with a smaller batch
        given = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it on the first train()
        if isinstance(given, ZOOptimizer) and given.engine is not None and given.engine.model is model:
            given.engine.discard()  # or between two micro-batches
            return given
        self.zo_config = self._resolve_config(self._zo_given)  # a hyperparameter search changes the arguments
        config = self.zo_config.replace(seed=self.args.seed if self.zo_config.seed is None else self.zo_config.seed)
        if given is None and config.rule != "auto" and RULES.resolve(config.rule).wants_optimizer:
            given = super().create_optimizer(model)
        if given is None:
            given = self._grouped_optimizer(model, config)
            lr = AUTO if config.lr == AUTO else None
            config = config.replace(lr=lr, eps=None, weight_decay=0.0)  # its groups hold them now
        self.zo = ZeroOrder(model, config, optimizer=given)
        self.zo.continuity.front = front_end(self.args, self._zo_given)
        self.zo.listeners.append(self._zo_records.append)
        if isinstance(self.zo.oracle, LockstepOracle):
            self.zo.oracle.carried.append((lambda: counters(self), vars(self).update))
        warn_about_numbers(self.args, self.zo)
        self.optimizer = self.zo.optimizer
        return self.optimizer

    def _zo_model(self) -> nn.Module:
        assert self.model is not None, "Trainer makes the model in its constructor"
        return self.model

    def _grouped_optimizer(self, model: nn.Module, config: ZOConfig) -> ZOOptimizer:
        """Weight decay on the parameters that `Trainer` would decay, as one group or two."""
        settings = config.resolve()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed = set(self.get_decay_parameter_names(model))
        slots = settings.target.slots(model)
        decay = config.weight_decay or self.args.weight_decay
        split = [slot for slot in slots if names.get(id(slot.tensor)) in decayed]
        groups = [{**group, "weight_decay": decay} for group in param_groups(split)]
        still = [{**group, "weight_decay": 0.0} for group in param_groups(s for s in slots if s not in split)]
        # The first group's eps is the unit of the projected gradient, and scales are what it should be of.
        groups = [*still, *groups] if slots[0].scaling is not None else [*groups, *still]
        lr = self.args.learning_rate if config.lr in (None, AUTO) else settings.lr
        return ZOOptimizer(groups, lr=lr, eps=settings.eps)

    # The step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: the trainer's own ``training_step``, once per probe, without backward.

        Returns:
            The mean loss over the probes, float32 of shape ``[]``.
        """
        assert self.zo is not None, "create_optimizer makes the engine, and Trainer calls it first"
        self.zo.step_count = self.state.global_step
        if model is not self.model and any(map(is_compiled, model.modules())):
            self.zo.copy_whole()
        step = super().training_step
        if self.zo.wants_lr:
            self._find_lr(step, model, inputs, num_items_in_batch)
        run = partial(step, model, num_items_in_batch=num_items_in_batch)
        log = None if self._zo_journal is None else self._zo_journal.open(self.zo)
        entry = None if log is None else log.logged()
        if entry is not None:
            return self._repeat(entry, partial(run, inputs))
        if id(inputs) not in self._zo_losses:
            known = self.zo.streaming is not None and any(inputs is other for other in self._zo_together)
            together = self._zo_together if known else [inputs]
            with self._probing(), nullcontext() if log is None else log.watching():
                batches = [_MicroBatch(self) for _ in together]
                closures = [partial(b.run, partial(run, each)) for b, each in zip(batches, together, strict=True)]
                losses = self.zo.measure_all(closures)
            add_counters(self, batches[0].counters, [batch.counted for batch in batches])
            self._zo_losses = {id(each): loss for each, loss in zip(together, losses, strict=True)}
        return self._zo_losses.pop(id(inputs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, which share a sweep over a streamed model."""
        samples, count = super().get_batch_samples(*args, **kwargs)
        self._zo_together, self._zo_losses = samples, {}
        return samples, count

    def _repeat(self, entry: LoggedStep, run: Callable[[], Tensor]) -> Tensor:
        """A step that the log has: nothing is measured, unless that drew random numbers, which are drawn again."""
        assert self.zo is not None
        self._zo_model().train()
        if entry.draws:
            with self._probing():
                self.zo.oracle.losses((Point(0, 0.0),), partial(_MicroBatch(self).run, run))
        self.zo.follow(entry.probes, entry.loss)
        return torch.tensor(entry.loss / self.current_gradient_accumulation_steps, device=self.args.device)

    def _find_lr(self, run: Callable[..., Tensor], model: nn.Module, inputs: Any, items: Any) -> None:
        """The range test, on the data of a few steps; the batch at hand where no other can be had."""
        assert self.zo is not None
        count = self.current_gradient_accumulation_steps
        together = self._zo_together
        drawn = samples(self, count) or [([inputs], items)]
        self._zo_together = together  # of the step that is about to begin

        def closure(pairs: list[tuple[Any, _MicroBatch]], items: Any) -> Tensor:
            losses = []
            for raw, batch in pairs:
                losses.append(batch.run(partial(run, model, raw, items)))
            return torch.stack(losses).mean() * count

        with unnoticed(self), self._probing():
            steps = [([(raw, _MicroBatch(self)) for raw in batches], items) for batches, items in drawn]
            self.zo.find_lr([partial(closure, *step) for step in steps], schedulers(self))

    @contextmanager
    def _probing(self) -> Iterator[None]:
        self.accelerator.backward = _no_backward
        try:
            yield
        finally:
            del self.accelerator.backward

    @property
    def _zo_batch(self) -> _MicroBatch | None:
        """The micro-batch whose probe this thread runs."""
        return getattr(self._zo_running, "batch", None)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Runs once per micro-batch; each probe gets a shallow copy of its own, which it may change."""
        if self._zo_batch is None:
            return super()._prepare_inputs(inputs)
        return self._zo_batch.prepared(inputs, super()._prepare_inputs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.zo is None else self.zo.effective():
            return super().prediction_step(*args, **kwargs)

    def compute_loss_context_manager(self) -> ExitStack:
        stack: ExitStack = super().compute_loss_context_manager()
        if self._zo_batch is not None:
            if self.zo_config.dropout:
                stack.enter_context(frozen_statistics(self._zo_model()))
            else:
                stack.enter_context(eval_mode(self._zo_model(), keep_root=True))
        return stack

    # The logs

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._zo_records:
            logs.update(summary(self._zo_records))
            self._zo_records.clear()
            if not math.isfinite(logs["loss"]):
                self._tr_loss.zero_()  # Trainer subtracts the sum from itself, and NaN would stay for all later logs
        super().log(logs, *args, **kwargs)


class _MicroBatch:
    """What the probes of one micro-batch share, and what must happen only once for all of them."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.counters = self.counted = counters(trainer)
        self.raw: Any = None
        self.inputs: Any = None

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """One probe. The trainer's counters (tokens seen, say) start from the same values in each."""
        vars(self.trainer).update(self.counters)
        running = self.trainer._zo_running
        running.batch = self
        try:
            loss = step()
            self.counted = counters(self.trainer)
            return loss
        finally:
            running.batch = None

    def prepared(self, raw: Any, prepare: Callable[[Any], Any]) -> Any:
        """A copy of the prepared batch; other data that a loss has prepared on its way passes through."""
        if self.inputs is None:
            self.raw, self.inputs = raw, prepare(raw)
        return copy.copy(self.inputs) if raw is self.raw else prepare(raw)


def _no_backward(loss: Tensor, **kwargs: Any) -> None:
    """Stands in for ``Accelerator.backward`` while probes run."""


def summary(records: Collection[StepRecord]) -> dict[str, float]:
    """The steps since the last log, in numbers."""
    grads = [record.projected_grad for record in records if math.isfinite(record.projected_grad)]
    directions = sum(len(record.probes) for record in records)
    result = {
        "projected_grad": math.sqrt(math.fsum(g * g for g in grads) / len(grads)) if grads else float("nan"),
        "zo_clip_rate": sum(record.clipped for record in records) / directions if directions else 0.0,
    }
    skipped = sum(record.skipped is not None for record in records)
    return {**result, "zo_skipped_steps": float(skipped)} if skipped else result

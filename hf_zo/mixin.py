"""The mixin that turns a Hugging Face trainer into a forward-only one.

It overrides three seams of `Trainer` and copies none of its loops: ``create_optimizer`` returns an
optimizer whose ``step`` applies the measurements; ``training_step`` runs the trainer's own, in which
``compute_loss`` is called once per probe; ``accelerator.backward`` has nothing to do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_core import RULES, ConfigError, Point, Summary, ZeroOrder, ZOConfig, ZOOptimizer
from zo_core.config import AUTO
from zo_core.defaults import default_eps, default_lr
from zo_core.following import begin_again
from zo_core.learning_rate import set_lr
from zo_core.modes import rng_state, set_rng_state
from zo_core.normaliser import GRADIENT
from zo_core.optimizer import TorchOptimizerFace
from zo_core.placement import offload_model
from zo_core.probing import as_scalar, is_compiled
from zo_core.seedlog import LoggedStep, can_log
from zo_core.streaming import LockstepOracle, Streaming, move_streamed
from zo_core.targets import check_values

from .arguments import ZOArguments, front_end
from .attributes import Attributes, only_counts, take_over
from .auto_lr import samples, schedulers, unnoticed
from .checks import check_arguments, check_precision, check_processes, check_undivided, warn_about_numbers
from .journal import Journal, exit_on_sigterm
from .known_losses import check_loss
from .loss_calls import LossCall, LossCalls, numbers_allowed
from .optimizers import as_in_trainer, by_decay, chosen_by_user, grouped, numbers_of, whole
from .preparing import leave_state, leave_unwrapped, run_length, undivided
from .quantised import quantised_training

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger("hf_zo")


class ZOTrainerMixin(_Trainer):
    """A mixin to put before any `transformers.Trainer` subclass:

        class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer): ...

    Everything around a step is still the trainer's own: schedules, accumulation, label smoothing, callbacks,
    evaluation, checkpoints. The differences:

    * the loss is computed once per probe (twice by default), without gradients, with every submodule
      in eval mode; only the root keeps its ``training`` flag, which trainers read;
    * the logs have ``projected_grad`` instead of ``grad_norm``, and the running mean of the loss with its standard
      error, ``zo_loss_mean`` and ``zo_loss_se``; see `zo_core.Summary`;
    * with ``backprop``, the logs have ``grad_norm``, that of the weights that it names, whose gradient is clipped to
      ``args.max_grad_norm``; they move by AdamW with the ``adam_*`` arguments, and the run has no seed log;
    * directions derive from the global step and ``zo_config.seed``, or ``args.seed`` if that is None;
    * every step is written to ``seedlog.zo`` in the output folder (``zo_log=False`` disables it), and
      ``train(resume_from_checkpoint=True)`` starts from the last complete checkpoint, or from the current model if
      there is none (``backprop`` needs a checkpoint), and repeats the later steps of the log, also after an
      interrupt in the same process;
    * a second ``train()`` is a separate run, which draws other directions.

    Args:
        zo_config: a `ZOConfig`. None uses the ``zo_*`` fields of ``args``, if it has them, else the
            defaults. Its ``lr`` and ``weight_decay``, if set, take precedence over those of ``args``.

    Raises:
        ConfigError: settings are not valid, or the arguments or the loss cannot work.
        ModelError: parameters of the model have no values.
    """

    def __init__(self, *args: Any, zo_config: ZOConfig | None = None, **kwargs: Any):
        self.zo: ZeroOrder | None = None
        self._zo_given = zo_config
        self._zo_root: nn.Module | None = None
        self._zo_waiting: list[tuple[LossCall, list[Tensor] | None]] = []
        self._zo_losses: list[Tensor] = []
        self._zo_together, self._zo_left = True, False
        self._zo_journal: Journal | None = None
        self._zo_summary = Summary()
        with quantised_training(args, kwargs, zo_config):
            super().__init__(*args, **kwargs)
        check_arguments(self.args, is_model_parallel=self.is_model_parallel)
        self.zo_config = self._resolve_config(zo_config)
        check_processes(self.args, self.zo_config.ranks)
        check_precision(self.args, self.zo_config)
        streamed = self.zo_config.offload is not None and Streaming.of(self._zo_model()) is None
        check_values(self._zo_model(), frozen=streamed)
        self.create_optimizer = self._zo_finish_optimizer  # type: ignore[method-assign]
        check_loss(self)

    def _resolve_config(self, config: ZOConfig | None) -> ZOConfig:
        if config is not None and not isinstance(config, ZOConfig):
            raise ConfigError([f"zo_config={config!r} must be a ZOConfig, for example ZOConfig(eps=1e-3)"])
        args = self.args if isinstance(self.args, ZOArguments) else ZOArguments()
        if config is None:
            return args.to_zo_config()
        if args.zo_given():
            given = ", ".join(args.zo_given())
            raise ConfigError([f"settings came twice, in zo_config and in args ({given}); write them in one place"])
        return config

    # The log

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`; with True, steps that only the seed log has are repeated, not lost.

        Raises:
            StateError: the log is damaged or of another run; the message tells which.
        """
        if self.zo is not None and not resume_from_checkpoint and self.model_init is None:
            begin_again(self.zo)
        if not getattr(self.args, "zo_log", True) or not can_log(self._resolve_config(self._zo_given)):
            self._zo_journal = None
            return super().train(resume_from_checkpoint, *args, **kwargs)
        folder, before = self._get_output_dir(kwargs.get("trial")), self._zo_journal
        if self.args.load_best_model_at_end and self.args.save_only_model:
            before = None  # no checkpoint to continue from: only a run from the original model has all to choose from
        with Journal(folder, resume_from_checkpoint, before) as journal, exit_on_sigterm():
            self._zo_journal = journal
            return super().train(journal.checkpoint, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._zo_behind():
            return  # it was saved when the step was measured, and the weights are now those of a later step
        if self._zo_journal is not None:
            self._zo_journal.begin_checkpoint(self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.evaluation_loop`; a repeated step has the metrics from when it was measured."""
        output = super().evaluation_loop(*args, **kwargs)
        if self._zo_journal is not None and self._zo_journal.running:
            metrics: dict[str, float] = output.metrics or {}
            metrics.update(self._zo_journal.metrics(self.state.global_step, metrics, behind=self._zo_behind()))
        return output

    def _zo_behind(self) -> bool:
        """Whether the weights in memory, of an interrupted run, are already those of a later step."""
        if self.zo is None or self._zo_journal is None or not self._zo_journal.running:
            return False
        return self.state.global_step < self.zo.continuity.ahead

    # The optimizer

    def create_accelerator_and_postprocess(self) -> None:
        check_undivided(self.model)
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = None  # a GradScaler fails where there are no gradients
        leave_state(self.accelerator)
        if self.accelerator.num_processes > 1:
            leave_unwrapped(self.accelerator)

    def get_train_dataloader(self) -> Any:
        """Like `Trainer.get_train_dataloader`; with ``ranks="points"`` all processes have the same batches."""
        same = self.accelerator.num_processes > 1 and self._resolve_config(self._zo_given).ranks == "points"
        with undivided(self.accelerator) if same else nullcontext():
            return super().get_train_dataloader()

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Does nothing: a checkpoint of a run with backpropagation in fp16 has a scaler, and there is none here."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Moves the model; one that will be streamed is never on the device as a whole."""
        check_values(model, frozen=getattr(model, "hf_device_map", None) is None)  # with a map Trainer moves nothing
        config = self._resolve_config(self._zo_given)
        if config.offload is not None and device.type != "cpu" and Streaming.of(model) is None:
            offload_model(model, config, config.resolve().target.slots(model), device)
        if Streaming.of(model) is not None:
            move_streamed(model, device)
            return
        super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the engine's `ZOOptimizer`, or one in front of the torch optimizer that the user has chosen."""
        model = self._zo_model() if model is None else model
        given = self._zo_given_optimizer()
        if isinstance(given, ZOOptimizer) and given.engine is not None and given.engine is self.zo:
            return self._zo_engine(model, given)
        config = self._zo_settings()
        if given is None:
            self.optimizer = None
            built = super().create_optimizer(model)
            self.optimizer = None
            given = self._zo_choice(model, built, config)
        return self._zo_engine(model, given)

    def _zo_given_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it on the first train()

    def _zo_settings(self) -> ZOConfig:
        config = self._resolve_config(self._zo_given)  # a hyperparameter search changes the arguments
        return config.unattended().replace(seed=self.args.seed if config.seed is None else config.seed)

    def _zo_choice(self, model: nn.Module, built: torch.optim.Optimizer, config: ZOConfig) -> torch.optim.Optimizer:
        """Returns the trainer's optimizer if the user has chosen it, else a `ZOOptimizer` with the same groups."""
        self._zo_root = root = whole(self, model, built)
        how = chosen_by_user(self, built)
        if isinstance(built, ZOOptimizer):
            return built
        if RULES.resolve(config.rule).wants_optimizer if config.rule != "auto" else how is not None:
            if how is not None:
                logger.warning(
                    "updates are left to %s, as %s says; zo_rule='sgd' moves the weights without gradients instead",
                    type(built).__name__,
                    how,
                )
            return built
        settings = config.resolve(has_rates=config.lr != AUTO and not self._zo_left)
        slots = settings.target.chosen(root).slots(root)
        kind = settings.estimator, root, slots, settings.normaliser
        eps = default_eps(*kind) if settings.eps is None else settings.eps
        made = grouped(slots, built, float(self.args.learning_rate), eps)
        made.left = self._zo_left
        return made

    def _zo_engine(self, model: nn.Module, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Makes an engine for this optimizer, unless it has one; returns the optimizer for Trainer to step."""
        self._zo_summary = Summary()  # an earlier run may have stopped between two logs
        if self._zo_journal is not None:
            self._zo_journal.end()  # this run may be another attempt, with a smaller batch
            self._zo_journal.summary = self._zo_summary
        self._zo_waiting, self._zo_losses = [], []
        if self.zo is not None and self.zo.optimizer is given:
            self.zo.discard()  # it may also have stopped between two micro-batches
            return given
        root = self._zo_root or whole(self, model, given)
        self.zo_config = self._resolve_config(self._zo_given)
        config = self._zo_settings()
        if isinstance(given, ZOOptimizer):
            lr = AUTO if config.lr == AUTO else None
            config = config.replace(lr=lr, eps=None, weight_decay=0.0)  # its groups hold them
        elif self._zo_left:
            config = config.replace(normalise=GRADIENT if config.normalise is None else config.normalise)
            known = config.resolve(has_optimizer=True)
            slots = known.target.chosen(root).slots(root)
            set_lr(given, default_lr(slots, known.rule, known.normaliser, known.num_probes, known.noise.share))
        self.zo = ZeroOrder(root, config, optimizer=given)
        self.zo.continuity.speak_as(front_end(self.args, self._zo_given))
        self.zo.listeners.append(lambda record: self._zo_summary.add(record))
        if not isinstance(self.zo.optimizer, TorchOptimizerFace):
            self.zo.cover_new(partial(by_decay, self, root))
        self.zo.carry(lambda: Attributes(self), lambda found: found.put(self))
        self.zo.around_second(partial(unnoticed, self))
        as_in_trainer(self.zo, self.args)
        warn_about_numbers(self.args, self.zo)
        self.optimizer = self.zo.optimizer
        return self.optimizer

    def _zo_finish_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """`create_optimizer` as the trainer calls it: also accepts what a subclass returns without calling ours."""
        config = self._zo_settings()
        given = self._zo_given_optimizer() is not None
        self._zo_left = config.lr in (None, AUTO) and self.args.learning_rate is None and not given
        with numbers_of(self.args, config):
            made = type(self).create_optimizer(self, *args, **kwargs)
        if self.zo is None or self.zo.optimizer is not made:
            made = self._zo_engine(self._zo_model(), getattr(made, "optimizer", made))
        return made

    def _zo_model(self) -> nn.Module:
        assert self.model is not None, "Trainer makes the model in its constructor"
        return self.model

    # The step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs the trainer's own ``training_step`` on a micro-batch, with a loss that is measured by probes.

        Returns:
            The mean loss over the probes, as the trainer scales it, float32 of shape ``[]``: the sum over
            all micro-batches of a step at the last one (where those of a streamed model are measured
            together), and 0 at earlier ones.
        """
        step = partial(super().training_step, num_items_in_batch=num_items_in_batch)
        zo = self._zo_at_step(model)
        batches = partial(self._lr_batches, partial(super().training_step, model), inputs, num_items_in_batch)
        zo.find_lr(batches, schedulers(self), self.state.max_steps)
        zo.look_back(lambda: self.state.max_steps)
        entry = None if (log := self._zo_journal) is None else log.logged(zo)
        if entry is not None:
            return self._repeat(entry, partial(step, model, inputs))
        calls = LossCalls(self, partial(self._measure, zo, nullcontext if log is None else log.watching))
        with calls.answered():
            step(model, inputs)
        self._count(zo)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        losses, self._zo_losses = self._zo_losses, []
        return torch.stack(losses).cumsum(0)[-1].to(self.args.device)

    def _zo_at_step(self, model: nn.Module) -> ZeroOrder:
        """Returns the engine, ready to measure the next step with the weights that are trainable now."""
        assert self.zo is not None, "create_optimizer makes the engine, and Trainer calls it first"
        zo = self.zo
        if zo.step_count != self.state.global_step:
            self._zo_waiting, self._zo_losses = [], []
            zo.at(self.state.global_step)
        zo.agree_on(run_length(self))
        zo.keep_mode(self._zo_model())
        if model is not self.model and any(map(is_compiled, model.modules())):
            zo.copy_whole()
        return zo

    def _measure(self, zo: ZeroOrder, watching: Callable[[], Any], call: LossCall) -> Tensor:
        """Measures a loss, or postpones it until the step's last micro-batch, to measure all in one sweep."""
        self._zo_waiting.append((call, None))
        quiet = isinstance(zo.oracle, LockstepOracle) and zo.oracle.quiet
        if quiet and self._zo_together and not self.accelerator.sync_gradients:
            return torch.zeros(())
        calls = [each for each, found in self._zo_waiting if found is None]
        with watching():
            losses = zo.losses([each.loss for each in calls], [each.scaled for each in calls])
        changes = [(each.found, each.left) for each in calls]
        take_over(self, changes)
        self._zo_together = all(only_counts(*change) for change in changes)
        self._zo_waiting[-len(calls) :] = list(zip(calls, losses, strict=True))
        return torch.stack(losses[-1]).mean().float()

    def _count(self, zo: ZeroOrder) -> None:
        """Adds the measured losses to the step, scaled as ``training_step`` scales them."""
        for call, losses in self._zo_waiting:
            if losses is not None:
                scaled = [call.scaled(loss) for loss in losses]
                zo.add(scaled)
                self._zo_losses.append(torch.stack(scaled).mean().float())
        self._zo_waiting = [(call, losses) for call, losses in self._zo_waiting if losses is None]

    def _repeat(self, entry: LoggedStep, step: Callable[[], Tensor]) -> Tensor:
        """Repeats a step of the log. The loss runs only if measuring it drew random numbers, to draw them again."""
        assert self.zo is not None
        zo = self.zo

        def draw(call: LossCall) -> Tensor:
            if entry.draws:
                zo.oracle.losses((Point(0, 0.0),), call.loss)
                take_over(self, [(call.found, call.left)])
            return torch.tensor(entry.loss)

        with LossCalls(self, draw).answered():
            step()
        entry.repeat(zo)
        return torch.tensor(entry.loss if self.accelerator.sync_gradients else 0.0, device=self.args.device)

    @contextmanager
    def _lr_batches(self, step: Callable[..., Tensor], inputs: Any, items: Any) -> Iterator[list[Callable[[], Any]]]:
        """Yields losses for the range test: of a few steps' data, or of the current batch if no other is available."""
        random, count = rng_state(), self.current_gradient_accumulation_steps
        with unnoticed(self):
            closures: list[Callable[[], Any]] = []
            for batches, each in samples(self, count) or [([inputs], items)]:
                calls: list[LossCall] = []
                for raw in batches:
                    prepared = LossCalls(self, lambda call: torch.zeros(()))
                    with prepared.answered():
                        step(raw, num_items_in_batch=each)
                    calls += prepared.calls
                closures.append(partial(_sum, calls, count / len(batches)))
            set_rng_state(random)
            yield closures

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.zo is None else self.zo.effective(), numbers_allowed(self):
            return super().prediction_step(*args, **kwargs)

    # The logs

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._zo_summary.steps:
            logs.update(self._zo_summary.numbers())
            if self.zo is not None and self.zo.backprop is not None:
                logs["grad_norm"] = self.zo.backprop.norm
            if self.zo is not None and self.zo.rule.anchored:
                logs["zo_distance"] = self.zo.distance()
            if not math.isfinite(logs["loss"]):
                self._tr_loss.zero_()  # Trainer subtracts the sum from itself, and NaN would stay for all later logs
        super().log(logs, *args, **kwargs)


def _sum(calls: list[LossCall], factor: float) -> Tensor:
    """Returns the loss of a step: the sum over its micro-batches, as the trainer scales them, times ``factor``."""
    losses = [as_scalar(call.loss()) * call.scale for call in calls]
    return torch.stack(losses).sum() * factor

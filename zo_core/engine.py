"""The orchestrator: points, losses, probes, update. Everything else only knows its own part."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Continuity, check_checkpoint, resume_at
from .config import AUTO, ZOConfig
from .errors import LossError, ModelError, StateError
from .estimators import Estimate
from .first_steps import FirstSteps
from .following import follow_model, trainable
from .gradient_check import GradientCheck, check_gradient
from .homes import Homes, by_rule
from .lazy import LazyUpdates
from .live import LiveSettings
from .lr_range import LrSuggestion, check_replaceable, range_test, set_lr
from .measured import Measured, mean, probes_from
from .noise import Direction, direction_of, share_of
from .offload import Carried, LockstepOracle, Streaming
from .optimizer import TorchOptimizerFace, ZOOptimizer, number, param_groups
from .oracle import ResidentOracle, StackedOracle, realisation
from .placement import check_streamable, offload_model, resolve, slots_of
from .records import Point, Probe, StepRecord
from .rules import Torch
from .targets import Slot, Target, keep_codes_plain

logger = logging.getLogger(__name__)


class ZeroOrder(LiveSettings):
    """Trains a model with forward passes only.

        zo = ZeroOrder(model, lr=1e-6, eps=1e-3)
        for batch in loader:
            loss = zo.step(lambda: model(**batch).loss)

    One step measures the loss at a few perturbed copies of the weights (SPSA, as in MeZO, arXiv
    2305.17333, unless configured otherwise) and moves the weights along the same directions. The
    model is not changed: no wrapped modules, no renamed parameters, no hooks left behind.

    Args:
        model: any module; its trainable parameters are what moves.
        config: the settings; None takes the defaults.
        optimizer: a `ZOOptimizer` with parameter groups, or any ``torch.optim.Optimizer``, which
            then finds the gradient estimate in ``.grad``. None makes a `ZOOptimizer` over all slots.
        **overrides: fields of `ZOConfig`, taking precedence over ``config``.

    Attributes:
        optimizer: the `ZOOptimizer` to give to learning-rate schedulers.
        step_count: index of the next step; with the seed it determines the next directions.
        listeners: called with the `StepRecord` of every step.
        followers: called when weights were frozen, unfrozen, added or replaced, before the next step.
        regroup: puts slots that have become trainable into groups of the optimizer; for one that was passed it
            does nothing, and what that does not hold does not move.
        lr, eps, weight_decay: of the first parameter group; setting one sets that of all groups.
        merged: whether `close` has ended low-rank windows since the last step, which a log has to say.
        suggestion: with ``lr="auto"``, from the first step on: what the range test found.

    Raises:
        ConfigError: settings that cannot work; all of them are listed.
        ModelError: a model with nothing to train, or without values.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ZOConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        **overrides: Any,
    ):
        if not isinstance(model, nn.Module):
            raise ModelError(f"model is a {type(model).__name__}; pass the torch.nn.Module that the closure calls")
        self.model = model
        self.config = (config or ZOConfig()).replace(**overrides)
        settings = self._settings = resolve(self.config, optimizer)
        self.estimator, self.noise, self.rule = settings.estimator, settings.noise, settings.rule
        self.num_probes, self.backend = settings.num_probes, settings.backend
        self.seed = 0 if self.config.seed is None else self.config.seed
        self.step_count = 0
        self.suggestion: LrSuggestion | None = None
        self.first_steps: FirstSteps | None = FirstSteps()
        self._skips = 0
        self.merged = False
        self.listeners: list[Callable[[StepRecord], object]] = []
        self.followers: list[Callable[[], object]] = []
        self.carried: list[Carried] = []
        keep_codes_plain(model)
        slots = self.choose()
        self.clip = self.target.default_clip if self.config.clip is None else self.config.clip
        made = optimizer is None
        if optimizer is None:
            optimizer = ZOOptimizer(param_groups(slots), settings.lr, settings.eps, self.config.weight_decay)
        self.optimizer = optimizer if isinstance(optimizer, ZOOptimizer) else TorchOptimizerFace(optimizer)
        self.regroup: Callable[[list[Slot]], object] = self.optimizer.cover if made else list
        self.streaming: Streaming | None = None
        self._measured: Measured | None = None
        self._followed: tuple[tuple[Probe, ...], float] | None = None
        self.take(slots)
        self.continuity = Continuity(self)
        self.optimizer.engine = self
        self._made = True

    def choose(self) -> list[Slot]:
        """The slots of the model as it is now; once adapters were added, another target may find them."""
        self._target = self._settings.target.chosen(self.model)
        return self._target.slots(self.model)

    def take(self, slots: list[Slot]) -> None:
        """Makes everything that depends on which weights move."""
        foreign = isinstance(self.optimizer, TorchOptimizerFace)
        self.slots = slots_of(self.optimizer, slots, self.target.name, foreign=foreign)
        self.lazy = self._lazy()
        self.oracle = self._oracle()
        at_once = [slot for slot in self.slots if self.lazy is None or not self.lazy.takes(slot)]
        self.homes = Homes(at_once, self.optimizer, self.rule, self.streaming)
        self._group_of = self._groups()
        self.trainable = trainable(self.model)

    @property
    def target(self) -> Target:
        """What chose the slots; it may be another one once adapters were added."""
        return self._target

    def _oracle(self) -> ResidentOracle | LockstepOracle:
        config, streaming = self.config, Streaming.of(self.model)
        if streaming is None and config.offload is None:
            return self._resident()
        check_streamable(config, self.rule)
        if streaming is None:
            streaming = offload_model(self.model, config, self.slots)
        if streaming is None:
            return self._resident()
        self.streaming = streaming
        self.lazy = self._lazy()
        parts = self.model, self.slots, self._perturbation, streaming
        return LockstepOracle(*parts, **self._how(), carried=self.carried)

    def _resident(self) -> ResidentOracle:
        oracle = StackedOracle if self.config.stack_probes else ResidentOracle
        return oracle(self.model, self.slots, self._perturbation, **self._how())

    def _how(self) -> dict[str, Any]:
        return {"dropout": self.config.dropout, "realisation": realisation(self.noise)}

    def _lazy(self) -> LazyUpdates | None:
        parts = self.noise, self.rule, self.optimizer.state, self.streaming
        return LazyUpdates.make(self.model, self.slots, *parts, stochastic=self.config.stochastic_rounding)

    def saved_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A slot's state with what a checkpoint needs of it: values that are streamed, weights that are behind."""
        with self.hidden():
            return self.homes.whole(state if self.lazy is None else self.lazy.saved(state))

    def store_state(self) -> None:
        """Takes over what was loaded into the optimizer."""
        with self.hidden():
            if self.lazy is not None:
                self.lazy.loaded(self.optimizer.state)
            self.homes.store()

    def flush(self) -> None:
        """Applies the updates that wait for their block; nothing to do for a resident model."""
        if self.streaming is not None:
            with self.continuity.applying():
                self.streaming.flush()
            self._forget()

    def stop(self) -> None:
        """Applies what waits, and ends the threads of the probes; the next step starts them again."""
        self.flush()
        if isinstance(self.oracle, LockstepOracle):
            self.oracle.lockstep.close()

    def close(self, device: torch.device | None = None) -> None:
        """Brings a streamed model back as ordinary parameters, and ends the threads.

        Args:
            device: where the streamed parameters go; None takes the device they computed on.
        """
        if self.lazy is not None and self.lazy.merge():
            self.merged = True
        if self.streaming is not None:
            self.stop()
            self.homes.bring_back()
            self.streaming.close(device)
            self.streaming = None
            if self.lazy is not None:
                self.lazy.streaming = None
            self.oracle = self._resident()
        self._forget()

    def effective(self) -> AbstractContextManager[Any]:
        """A context in which weights count with the updates that wait for the end of a low-rank window.

        Forwards of the model's modules do by themselves; this is for code that computes with a parameter
        outside of them.
        """
        stack = ExitStack()
        if self.lazy is not None:
            stack.enter_context(self.lazy.hidden())
            stack.enter_context(self.lazy.mode())
        return stack

    def hidden(self) -> AbstractContextManager[Any]:
        """A context in which parameters whose updates wait show what is in memory, for the engine's own code."""
        return nullcontext() if self.lazy is None else self.lazy.hidden()

    def copy_whole(self) -> None:
        """From now on each probe copies all slots at once, for closures that run compiled code."""
        self.oracle.copy_whole()
        if self.lazy is not None:  # compiled code that evaluates could not be told of updates that wait
            self.lazy.merge()
            self.lazy = None

    def step(self, closure: Callable[[], Any]) -> StepRecord:
        """Measures the loss on both sides of the weights and moves them.

        Args:
            closure: runs the model and returns the loss, one number. It is called once per probe
                (twice, by default; in the first step once more, to see that it returns the same loss at the
                same weights) and has to use the same batch each time.

        Returns:
            What was done; as a float, the mean loss over the probes. The weights are final.

        Raises:
            LossError: the closure returned something that is not one number.
            Exception: whatever the closure raises; the weights are untouched.
        """
        self.measure(closure)
        return self.optimizer.step()

    def check(self, closure: Callable[[], Any], directions: int = 4) -> GradientCheck:
        """Compares measured directional derivatives with those of backpropagation, for a model small enough.

            print(zo.check(lambda: model(**batch).loss))

        Forward-only training sees values alone. A loss that uses ``detach()`` to define a gradient has another
        value, and training follows that. Weights, generators and buffers are as before afterwards.

        Args:
            closure: as for `step`; what it returns has to be differentiable.
            directions: how many are compared.

        Raises:
            ConfigError: streamed or quantised weights.
            LossError: the closure returns a number without a gradient.
        """
        return check_gradient(self, closure, directions)

    def direction(self, slot: Slot, seed: int) -> Direction:
        """The direction ``z(seed)`` of a slot, in the units of the step's eps."""
        return self._along(slot, ((seed, self._relative_eps(slot)),), None)

    def suggest_lr(self, closures: Sequence[Callable[[], Any]], steps: int | None = None) -> LrSuggestion:
        """A learning rate by trial runs, all of them undone; see `zo_core.suggest_lr`."""
        return range_test(self, closures, steps)

    @property
    def wants_lr(self) -> bool:
        """Whether the learning rate has still to be found; a run that goes on from a checkpoint has one."""
        return self.config.lr == AUTO and self.suggestion is None and self.step_count == 0 and self._measured is None

    def find_lr(self, closures: Sequence[Callable[[], Any]], schedulers: Sequence[Any] = ()) -> None:
        """Trains with the rate that `suggest_lr` finds, for ``lr="auto"``.

        Args:
            closures: one per batch.
            schedulers: those of the optimizer; what they have computed follows the new rate.
        """
        check_replaceable(self.optimizer, schedulers)
        self.suggestion = self.suggest_lr(closures)
        set_lr(self.optimizer, self.suggestion.lr, schedulers)
        logger.warning(
            "learning rate %.2g found by a range test of %d forwards", self.suggestion.lr, self.suggestion.forwards
        )

    def measure(self, closure: Callable[[], Any]) -> Tensor:
        """Measures one micro-batch; the losses of all calls before `apply` are summed.

        Returns:
            The mean loss over the probes, float32 of shape ``[]``, on the device of the loss.
        """
        return self.measure_all([closure])[0]

    def measure_all(self, closures: Sequence[Callable[[], Any]]) -> list[Tensor]:
        """As `measure` for each of some micro-batches, in one sweep over a streamed model."""
        for closure in closures:
            if not callable(closure):
                raise LossError(
                    f"a {type(closure).__name__} came instead of a closure, and the loss is needed at several weights; "
                    "write zo.step(lambda: model(**batch).loss)"
                )
        if self.wants_lr:
            self.find_lr(closures)
        found = self.losses(closures)
        for losses in found:
            self.add(losses)
        return [torch.stack(losses).mean().to(torch.float32) for losses in found]

    def losses(self, closures: Sequence[Callable[[], Any]]) -> list[list[Tensor]]:
        """The losses of some micro-batches at the points of the step, for callers that `add` them themselves.

        Returns:
            For each closure one float64 tensor of shape ``[]`` per point.
        """
        if self._measured is None:
            follow_model(self)
            seeds = tuple(self.noise.seed(self.seed, self.step_count, i) for i in range(self.num_probes))
            self._measured = Measured(seeds, self.estimator.points(seeds, self.eps))
            device = self.slots[0].tensor.device if self.streaming is None else self.streaming.device
            self.noise.prepare(seeds, [(slot.key, slot.tensor.shape) for slot in self.slots], device)
        self._group_of = self._groups()
        points = self._measured.points
        try:
            with self.hidden():
                return self._at(points, closures)
        except BaseException:
            self.discard()
            raise

    def _at(self, points: Sequence[Point], closures: Sequence[Callable[[], Any]]) -> list[list[Tensor]]:
        first = None if self.first_steps is None else self.first_steps.look(self.oracle, points, closures[0])
        found = self.oracle.together(points, closures)
        if self.first_steps is not None and first is not None:
            self.first_steps.compare(first[1], found[0][first[0]], self.slots)
        return found

    def add(self, losses: Sequence[Tensor]) -> None:
        """Counts the losses of a micro-batch, one per point, for the step in progress."""
        assert self._measured is not None, "losses() comes first"
        self._measured.add(list(losses))

    def discard(self) -> None:
        """Forgets what was measured since the last step."""
        self._measured = self._followed = None
        self._forget()

    def _forget(self) -> None:
        """A step is over, and with it the use of what its directions were made of, but for updates that wait."""
        seeds = [self.noise.seed(self.seed, self.step_count, i) for i in range(self.num_probes)]
        late = self.streaming is not None and any(block.pending for block in self.streaming.blocks)
        self.noise.forget(seeds, late)

    def follow(self, probes: tuple[Probe, ...], loss: float) -> None:
        """The next `apply` repeats a step that was measured before, instead of one that is measured now.

        Args:
            probes: as its `StepRecord` had them; empty if the step was skipped.
            loss: what its record reports.
        """
        self._measured, self._followed = None, (probes, loss)

    def apply(self) -> StepRecord:
        """Forms the probes from what was measured, moves the weights, and goes on to the next step.

        Called by ``optimizer.step()``.

        Raises:
            StateError: nothing was measured.
        """
        if self._followed is not None:
            follow_model(self)
            return self._repeat(*self._followed)
        if self._measured is None:
            raise StateError("optimizer.step() came before any loss was measured; call measure(closure) first")
        measured, self._measured = self._measured, None
        losses = measured.losses()
        if self.first_steps is not None:
            self.first_steps.see(losses, self.eps)
        estimate, probes, clipped = probes_from(self.estimator, self.eps, self.clip, measured.seeds, losses)
        if estimate.skip is None:
            self._update(probes)
        else:
            self._log_skip(estimate)
        grads = estimate.projected_grads
        projected_grad = math.fsum(grads) / len(grads) if grads else float("nan")
        return self._done(mean(losses), projected_grad, measured.seeds[0], probes, clipped, estimate.skip)

    def _repeat(self, probes: tuple[Probe, ...], loss: float) -> StepRecord:
        self.discard()
        self._group_of = self._groups()
        if probes and self.step_count >= self.continuity.ahead:
            self._update(probes)
        # A coefficient is g / n for the mean over n directions; other estimators do not keep g in it.
        two_sided = self.estimator.name == "spsa" and probes
        projected_grad = math.fsum(p.coefficient for p in probes) if two_sided else float("nan")
        seed = self.noise.seed(self.seed, self.step_count, 0)
        return self._done(loss, projected_grad, seed, probes, 0, None if probes else "the log has it as skipped")

    def _done(
        self,
        loss: float,
        projected_grad: float,
        seed: int,
        probes: tuple[Probe, ...],
        clipped: int,
        skipped: str | None,
    ) -> StepRecord:
        record = StepRecord(
            loss=loss,
            projected_grad=projected_grad,
            lr=number(self.optimizer.param_groups[0], "lr", math.nan),
            step=self.step_count,
            seed=seed,
            probes=probes,
            clipped=clipped,
            skipped=skipped,
        )
        self._forget()
        self.step_count += 1
        for listener in self.listeners:
            listener(record)
        self.merged = False
        return record

    def _log_skip(self, estimate: Estimate) -> None:
        said = f"step {self.step_count} skipped, weights untouched: {estimate.skip}"
        if estimate.projected_grads:  # losses that agree are what a converged model gives
            logger.info("%s", said)
            return
        self._skips += 1
        if self._skips & (self._skips - 1) == 0:  # a diverged run skips every step: said at powers of two
            logger.warning("%s%s", said, f" ({self._skips} steps skipped so far)" if self._skips > 1 else "")

    def _update(self, probes: tuple[Probe, ...]) -> None:
        self.optimizer.check_numbers()  # a scheduler may have been here since the probes were measured
        directions = [self._direction(slot, probes, self._relative_eps(slot)) for slot in self.slots]
        with torch.no_grad(), self.hidden():
            if isinstance(self.rule, Torch):
                assert isinstance(self.optimizer, TorchOptimizerFace)
                pairs = ((slot.tensor, d) for slot, d in zip(self.slots, directions, strict=True) if not d.still)
                self.rule.step(self.optimizer.inner, pairs)
            else:
                for slot, direction in zip(self.slots, directions, strict=True):
                    if direction.still:
                        continue
                    group = self._group_of[slot]
                    how = direction, float(group["lr"]), float(group["weight_decay"]) / share_of(self.noise)
                    if self.lazy is not None and self.lazy.takes(slot):
                        self.lazy.update(slot, direction.terms, *how[1:], direction.rounding_seed)
                    else:
                        self.homes.move(slot, partial(by_rule, self.rule, how))
        torch.clear_autocast_cache()

    def _groups(self) -> dict[Slot, dict[str, Any]]:
        return self.optimizer.groups_of(self.slots)

    def _relative_eps(self, slot: Slot) -> float:
        """The eps of the slot's group in units of the step's eps."""
        if isinstance(self.optimizer, TorchOptimizerFace):
            return 1.0  # what a torch optimizer calls eps is something else
        return float(self._group_of[slot]["eps"]) / self.eps

    def _perturbation(self, slot: Slot, *points: Point) -> Direction:
        relative = self._relative_eps(slot)
        terms = tuple((point.seed, point.scale * relative) for point in points)
        result = self._along(slot, terms, None)
        return result if self.lazy is None else self.lazy.added(slot, result)

    def _direction(self, slot: Slot, probes: tuple[Probe, ...], relative: float) -> Direction:
        # With m z perturbed in this group, the difference of the losses measures m z . grad, so the
        # estimate of this group's gradient is divided by m.
        terms = tuple((probe.seed, probe.coefficient / relative) for probe in probes)
        rounding = probes[0].seed if self.config.stochastic_rounding else None
        return self._along(slot, terms, rounding)

    def _along(self, slot: Slot, terms: tuple[tuple[int, float], ...], rounding: int | None) -> Direction:
        how = terms, rounding, self.backend, slot.scaling, self.optimizer.thresholds
        return direction_of(self.noise, slot.key, slot.tensor.shape, *how)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the model's weights."""
        self.flush()
        return {"step": self.step_count, "seed": self.seed, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where a run with this model was saved.

        Raises:
            StateError: ``state`` is not what `state_dict` returned for such a model.
        """
        check_checkpoint(state, self)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"this checkpoint's optimizer state does not fit the model: {error}") from error
        resume_at(self, state)
        self.discard()

"""The orchestrator: points, losses, probes, update. Every other module only knows its own part."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import agree
from .backprop import Backprop
from .brake import Braking
from .checkpoint import Continuity, check_checkpoint, resume_at
from .config import AUTO, ZOConfig, is_seed
from .curves import Curves, memory_now
from .defaults import NEWTON, NOISY, default_eps, default_lr, moving, said_default, scored_eps
from .directions import Directions
from .errors import ConfigError, LossError, ModelError, QueryError, SearchError, StateError
from .estimators import Estimate
from .exchange import Exchange
from .first_steps import FirstSteps
from .following import follow_model
from .forward_state import Carried
from .gradient_check import GradientCheck, check_gradient
from .last_look import LastLook, Worse
from .learning_rate import LrSuggestion, Snapshot, advise, base_rates, check_replaceable, range_test, set_lr
from .live import CHANGED_EPS
from .modes import rng_state, set_rng_state
from .normaliser import Curvature, normaliser_of
from .optimizer import TorchOptimizerFace, ZOOptimizer, number, param_groups
from .placement import backprop_of, resolve
from .ranks import exchange_of
from .records import Point, Probe, Rollback, Scores, StepRecord
from .second_round import SecondRound
from .shared_data import Batch, check_same, while_all_have
from .step import Skips, StepPlan, can_be_applied, chosen, mean, probes_from, times, too_much_decay, unfit
from .targets import Slot, check_dequantised, check_whole, group_of, keep_codes_plain, shapes_of
from .trained_model import TrainedModel
from .undoing import braked, note, repeated
from .updates import Places

logger = logging.getLogger(__name__)

#: How many steps a run can have: a seed log has 32 bits for the index of one, and one value has another meaning there.
MOST = 2**32 - 1


class ZeroOrder(TrainedModel):
    """Trains a model with forward passes only.

        zo = ZeroOrder(model, lr=1e-6, eps=1e-3)
        for batch in loader:
            loss = zo.step(lambda: model(**batch).loss)

    One step measures the loss at a few perturbed copies of the weights (SPSA, as in MeZO, arXiv
    2305.17333, unless configured otherwise) and moves the weights along the same directions. The
    model is not changed: no wrapped modules, no renamed parameters, no hooks left behind.

    Args:
        model: any module; its trainable parameters are what moves by default.
        config: the settings; None takes the defaults.
        optimizer: a `ZOOptimizer` with parameter groups, or any ``torch.optim.Optimizer``, which
            then finds the gradient estimate in ``.grad``. None makes a `ZOOptimizer` over all slots.
        **overrides: fields of `ZOConfig`, taking precedence over ``config``.

    Attributes:
        optimizer: the `ZOOptimizer` to give to learning-rate schedulers.
        step_count: index of the next step; with the seed it determines the next directions. `at` sets it.
        listeners: called with the `StepRecord` of every step.
        followers: called before the next step when weights were frozen, unfrozen, added or replaced.
        regroup: adds slots that have become trainable to the optimizer's groups. For an optimizer that was passed
            in it does nothing, and slots that it does not hold do not move. See `cover_new`.
        lr, eps, weight_decay: of the first parameter group; setting one sets it in all groups.
        num_probes, own_probes: directions of a step, and those of them that the setting ``num_probes`` counts: with
            several processes each may have its own.
        braking: what goes back when the loss has risen; see the setting ``brake``.
        merged: whether `close` has ended low-rank windows since the last step, which a log has to record.
        normaliser: the `zo_core.normaliser.Normaliser` of the steps; None without ``normalise``.
        curves: the course of the run, for `report`.
        backprop: the weights that backpropagation moves, see `zo_core.backprop.Backprop`; None without the setting.
        second: the second round of steps; None with an estimator that has none.
        around: returns the context in which closures run once more, see `around_second`.
        look: what the last step of the run compares with the first ones, see `look_back`; None if it does not.
        suggestion: result of the range test with ``lr="auto"``, from the first step on; None otherwise, and if the run
            is too short for one.

    Raises:
        ConfigError: some settings are not valid; all of them are listed.
        ModelError: the model has nothing to train, or its weights have no values.
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
            several = isinstance(model, (list, tuple, dict)) or hasattr(model, "__next__")
            how = "torch.nn.ModuleList([...]) of all modules that learn" if several else "the torch.nn.Module"
            raise ModelError(f"model is a {type(model).__name__}; pass {how} that the closure calls")
        check_whole(model)
        self.model = model
        self.config = (config or ZOConfig()).replace(**overrides)
        settings = self._settings = resolve(self.config, optimizer, model)
        self.estimator, self.noise, self.rule = settings.estimator, settings.noise, settings.rule
        self.exchange: Exchange = exchange_of(self.config.ranks, group_of(model))
        self.own_probes, self.backend = settings.num_probes, settings.backend
        self.num_probes = self.exchange.directions(self.own_probes)
        self.seed = 0 if self.config.seed is None else self.config.seed
        self.step_count = 0
        self.suggestion: LrSuggestion | None = None
        self._searched = False
        self.first_steps: FirstSteps | None = FirstSteps()
        self._skips = Skips()
        self.second = SecondRound() if self.estimator.multiples else None
        self.look: LastLook | None = None
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.curves = Curves()
        self.braking = Braking("warn" if self.config.brake == AUTO else self.config.brake)
        self.merged = False
        self.listeners: list[Callable[[StepRecord], object]] = []
        self.followers: list[Callable[[], object]] = []
        self._carried: list[Carried] = []
        self._kept: nn.Module | None = None
        self.backprop = backprop_of(self.config, self.exchange)
        keep_codes_plain(model)
        check_dequantised(model)
        slots = self.choose()
        self.clip = self.target.default_clip if self.config.clip is None else self.config.clip
        self._left = settings.lr is None if optimizer is None else isinstance(optimizer, ZOOptimizer) and optimizer.left
        self._left = self._left and self.config.lr != AUTO
        self.normaliser = normaliser_of(
            settings.normaliser, moving(slots, self.noise.share), two_sided=self.estimator.two_sided
        )
        kind = self.estimator, model, slots, settings.normaliser
        self._default_eps = default_eps(*kind) if settings.eps is None else settings.eps
        made = optimizer is None
        if optimizer is None:
            lr = self._default_lr(slots, self._default_eps) if settings.lr is None else settings.lr
            optimizer = ZOOptimizer(param_groups(slots), lr, self._default_eps, self.config.weight_decay)
        elif isinstance(optimizer, ZOOptimizer) and optimizer.left:
            self._set_default_lr(optimizer, slots)
        self.optimizer = optimizer if isinstance(optimizer, ZOOptimizer) else TorchOptimizerFace(optimizer)
        self.regroup: Callable[[list[Slot]], object] = self.optimizer.cover if made else list
        self.places = Places(self.optimizer)
        how = self.noise, self.backend, self.optimizer, lambda: self.eps, self._decaying
        self.directions = Directions(*how, stochastic=self.config.stochastic_rounding)
        self.facts: dict[str, Any] = {}
        self._repeated: Callable[[ZeroOrder], StepRecord] | None = None
        self.take(slots)
        self.continuity = Continuity(self)
        self.optimizer.engine = self
        self._made = True

    # A step

    def step(self, closure: Callable[[], Any]) -> StepRecord:
        """Measures the loss on both sides of the weights and moves them.

        Args:
            closure: runs the model and returns the loss, one number. It is called once per probe
                (twice, by default; in the first step once more, to check that it returns the same loss at the
                same weights; with ``reuse`` also where layers are skipped for the first time) and has to use the same
                batch each time.

        Returns:
            The record of the step; as a float, the mean loss over the probes. The weights are final.

        Raises:
            LossError: the closure returned something that is not one number.
            Exception: whatever the closure raises, except for `QueryError`, which skips the step; the weights are
                untouched.
        """
        self.measure(closure)
        return self.optimizer.step()

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches of a loader; with several processes, as long as every one of them has one.

            for batch in zo.batches(loader):
                zo.step(lambda: model(**batch).loss)

        A process that runs out of batches ends the loop in all of them after the same step, with one line of log; the
        others would wait for it. One that cannot read its next batch is an error in all of them.

        Raises:
            RanksError: another process could not read its next batch, or does not answer.
            Exception: whatever the loader raises.
        """
        return while_all_have(loader, self.exchange)

    def agree_on(self, facts: Mapping[str, Any]) -> None:
        """Names what else than settings and weights has to be the same in all processes when the first step begins.

        Args:
            facts: values by what the error calls them: the number of steps of a trainer's run, for example.
        """
        self.facts = dict(facts)

    def measure(self, closure: Callable[[], Any]) -> Tensor:
        """Measures one micro-batch; the losses of all calls before `apply` are summed.

        Returns:
            The mean loss over the probes, float32 of shape ``[]``, on the device of the loss.
        """
        return self.measure_all([closure])[0]

    def measure_all(self, closures: Sequence[Callable[[], Any]]) -> list[Tensor]:
        """Measures several micro-batches as `measure` does each, with a single sweep over a streamed model.

        Args:
            closures: one per micro-batch, as for `step`.

        Returns:
            For each closure the mean loss over the probes, float32 of shape ``[]``.

        Raises:
            LossError: a closure is not callable, or returned something that is not one number.
            ConfigError: a hyperparameter in the optimizer's groups is not a finite number.
            ModelError: no trainable weight is left.
            StateError: a block of a streamed model could not be read or written.
            Exception: whatever a closure raises; the weights are untouched, and the step's earlier
                measurements are discarded.
        """
        for closure in closures:
            if not callable(closure):
                raise LossError(
                    f"a {type(closure).__name__} was passed as the closure, and the loss is needed at several weights; "
                    "write zo.step(lambda: model(**batch).loss)"
                )
        self.find_lr(lambda: nullcontext(closures))
        found = self.losses(closures)
        for losses in found:
            self.add(losses)
        return [torch.stack(losses).mean().to(torch.float32) for losses in found]

    def losses(
        self, closures: Sequence[Callable[[], Any]], scaled: Sequence[Callable[[Tensor], Tensor]] | None = None
    ) -> list[list[Tensor]]:
        """The losses of several micro-batches at the points of the step, for callers that `add` them themselves.

        Args:
            closures: one per micro-batch.
            scaled: for each of them, how the caller scales its losses before it adds them. A second round calls it
                when the step is applied. None is not at all.

        Returns:
            For each closure one float64 tensor of shape ``[]`` per point.
        """
        random = rng_state()
        try:
            self.optimizer.check_numbers()
            if self._plan is None:
                self._plan, self._planned_eps = replace(self._planned(), random=random), self._group_eps()
                self.oracle.state.begin_step()
            plan = self._plan
            if self.look is not None:
                self.look.keep(plan, closures, scaled, random)
            with self.hidden():
                if self.backprop is not None:  # first: what the probes of a trainer record is that of the last ones
                    self._differentiate(self.backprop, plan, closures, scaled)
                if self.second is not None:
                    return self.second.first(self.oracle, closures, scaled, partial(self._at, plan.to_measure))
                return self._at(plan.to_measure, closures)
        except QueryError as error:
            plan.failed = str(error) or "a query failed"
            set_rng_state(random)
            self.oracle.state.rewind()
            return [[torch.full((), math.nan, dtype=torch.float64)] * len(plan.mine)] * len(closures)
        except BaseException as error:
            self.discard()
            self.exchange.fail(error)
            raise

    def _differentiate(
        self,
        backprop: Backprop,
        plan: StepPlan,
        closures: Sequence[Callable[[], Any]],
        scaled: Sequence[Callable[[Tensor], Tensor]] | None,
    ) -> None:
        """Measures the gradients of the named weights; if a query fails, the first step's checks have to wait."""
        try:
            with self.curves.clock.timed("forwards", len(closures)):
                backprop.measure(self.model, self.oracle, self.differentiated, closures, scaled)
        except QueryError:
            if self.first_steps is not None and not self.first_steps.looked:
                self.first_steps.looked = plan.looks_again = True
                if self.exchange.same_data:  # the other processes compare their losses now
                    check_same(None, self.exchange, self.slots, self.eps)
            raise

    def _default_lr(self, slots: list[Slot], eps: float) -> float:
        known = self._settings
        apart = scored_eps(self.estimator, self.rule, known.normaliser, eps, self.config.maximize)
        return default_lr(slots, self.rule, known.normaliser, self.num_probes, self.noise.share, apart)

    def _set_default_lr(self, optimizer: ZOOptimizer, slots: list[Slot]) -> None:
        """Sets the rate that was left to us, unless a scheduler has taken another one for its own by now."""
        group = optimizer.param_groups[0]
        lr = self._default_lr(slots, group["eps"])
        if "initial_lr" not in group:
            set_lr(optimizer, lr)
        elif group["initial_lr"] == NEWTON != lr and self.config.lr != AUTO:
            raise ConfigError(
                [
                    f"the optimizer has no learning rate, but a scheduler already, which took {NEWTON:g} for one, "
                    f"and the default here is {lr:.2g}; make the scheduler after the engine, or write a rate: "
                    f"ZOOptimizer(..., lr={lr:.2g})"
                ]
            )

    @property
    def scored(self) -> bool:
        """Whether records have the scores that closures return."""
        return self.estimator.compares or self.config.maximize

    @property
    def query_failed(self) -> str:
        """Why a query of the step in progress failed in this process; empty if none did."""
        return "" if self._plan is None else self._plan.failed

    @property
    def point_count(self) -> int:
        """Number of points at which this process measures the next step, or the step in progress."""
        return len(self.exchange.dealt(*self._points()[:2])[self.exchange.rank])

    @property
    def most_points(self) -> int:
        """As `point_count`, in the process that measures most of them."""
        return max(map(len, self.exchange.dealt(*self._points()[:2])))

    def _points(self) -> tuple[tuple[Point, ...], tuple[int, ...], int]:
        """The points of the next step, the seeds of its directions, and how many of the points are the normaliser's."""
        seeds = self._seeds()
        extra = () if self.normaliser is None else self.normaliser.extra(self.step_count, seeds, self.eps)
        return (*self.estimator.points(seeds, self.eps), *extra), seeds, len(extra)

    def _planned(self) -> StepPlan:
        """What the next step has to measure."""
        if self.step_count >= MOST:
            raise StateError(f"a run has at most {MOST} steps; make another engine, which begins a new one")
        follow_model(self)
        if not self._agreed:
            agree(self)
            self._agreed = True
        points, seeds, extra = self._points()
        self.noise.prepare(seeds, shapes_of(self.slots), self._device)
        ratios = self.directions.ratios(self.slots)
        mine = self.exchange.dealt(points, seeds)[self.exchange.rank]
        return StepPlan(self.step_count, seeds, points, mine, ratios, extra)

    def _at(self, points: Sequence[Point], closures: Sequence[Callable[[], Any]]) -> list[list[Tensor]]:
        if self.first_steps is not None and not self.first_steps.looked:
            return self._looking(self.first_steps, points, closures)
        with self.curves.clock.timed("forwards", len(points) * len(closures)):
            return self.oracle.together(points, closures)

    def _looking(
        self, checks: FirstSteps, points: Sequence[Point], closures: Sequence[Callable[[], Any]]
    ) -> list[list[Tensor]]:
        """As `_at` in the first step, with the checks of the closure; the next step has them if a query fails."""
        plan, same_data, error = self._plan, self.exchange.same_data, None
        assert plan is not None
        try:
            point, loss = checks.look(self.oracle, plan.points if same_data else points, closures[0])
            with self.curves.clock.timed("forwards", len(points) * len(closures)):
                found = self.oracle.together(points, closures)
        except QueryError as raised:
            error = raised
        plan.looks_again = error is not None
        if same_data:  # a process whose query has failed takes part
            plan.looks_again = not check_same(None if error else loss, self.exchange, self.slots, self.eps)
        if not plan.looks_again and point in points:
            checks.compare(loss, found[0][points.index(point)], self.slots)
        advise(self)
        if error is not None:
            raise error
        return found

    def add(self, losses: Sequence[Tensor]) -> None:
        """Adds the losses of a micro-batch, one tensor of shape ``[]`` per point, to the step in progress."""
        assert self._plan is not None, "losses() comes first"
        self._plan.add(losses)

    def complete(self) -> None:
        """Waits for the losses of other processes, and measures the second round of estimators that have one.

        `apply` does it if nobody has. ``optimizer.step()`` calls it first: an exception in a closure or in another
        process, and an interrupt while this one waits, come before anything has changed.

        Raises:
            RanksError: another process has failed, or does not answer.
            LossError: a closure of the second round reads a variable that has changed since it was measured.
            Exception: whatever a closure raises; the weights are untouched, and the step's measurements are discarded.
        """
        if self._plan is None:
            return
        try:
            self.optimizer.check_numbers()
            if self._group_eps() != self._planned_eps:
                raise StateError(CHANGED_EPS)
            with self.curves.clock.timed("forwards"):
                self._plan.gather(self.exchange)
                if self.backprop is not None and not self._plan.failed:
                    self.backprop.share(self.exchange)
                if self.second is not None and self._plan.tried is None:
                    self.second.measure(self, self._plan)
                    self.curves.clock.forwards += len(self._plan.tried or ()) * len(self.second.kept)
                if self.look is not None and self.look.due(self._plan.step) and not self._plan.failed:
                    self.look.look(self)
            if self._plan.failed and self._plan.random:  # in any process, and all micro-batches leave no trace
                set_rng_state(self._plan.random)
                self._plan.random = {}
                self.oracle.state.rewind_step()
                if self.first_steps is not None and self._plan.looks_again:
                    self.first_steps.looked = False
        except BaseException as error:
            self.discard()
            self.exchange.fail(error)
            raise

    def around_second(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Makes second rounds run in a context, in which what closures do besides computing a loss is not seen.

        The last look of a run does so, too; see `look_back`.
        """
        self.around = context

    def look_back(self, steps: Callable[[], int | None]) -> None:
        """Makes the last step of a run compare its weights with those of the first steps, for trainers.

        If they are worse, the brake goes back; see `zo_core.last_look`. It has to be called before the first step is
        measured, and does nothing later. Nothing is compared with ``brake=None``, with ``backprop``, and where the loss
        is a score, which depends on what is sampled.

        Args:
            steps: returns the length of the run; None if it is not known.
        """
        if self.step_count or self._plan is not None:
            return
        length = None if self.braking.mode is None or self.backprop is not None or self.scored else steps()
        self.look = None if length is None else LastLook(length, self.slots)

    def apply(self) -> StepRecord:
        """Forms the probes from what was measured, moves the weights, and advances to the next step.

        Called by ``optimizer.step()``.

        Raises:
            StateError: nothing was measured.
        """
        if self._repeated is not None:
            follow_model(self)
            return self._repeated(self)
        if self._plan is None:
            raise StateError("optimizer.step() was called before any loss was measured; call measure(closure) first")
        self.complete()
        plan, self._plan = self._plan, None
        with self.curves.clock.timed("forwards"):  # that have been queued on a GPU
            losses = plan.gather(self.exchange)
        if self.first_steps is not None:
            self.first_steps.see(losses, self.eps)
        how = self.estimator, self.eps, self.clip
        bent = isinstance(self.normaliser, Curvature)
        estimate, probes, clipped = probes_from(*how, plan.seeds, plan.own, self.exchange.populations, curvature=bent)
        scores = Scores.of(plan.own, maximize=self.config.maximize) if self.scored else None
        multiple = 1.0
        if plan.tried:
            estimate, multiple = chosen(self.estimator, estimate, plan.tried)
        if plan.failed:
            estimate = replace(estimate, skip=plan.failed)
        loss = mean(losses)  # of the normaliser's points, too: it is what a log has for a step that is repeated
        rollback = braked(self, None if plan.failed else loss, plan.own, self._looked_at(plan))
        if rollback is not None:
            return self._done(loss, math.nan, (), skipped="braked", rollback=rollback, scores=scores)
        if estimate.skip is None and self.backprop is not None and (reason := self.backprop.unfit()):
            estimate = Estimate((), (), reason)
        if estimate.skip is None:
            estimate, probes = self._as_applied(estimate, probes, multiple, losses)
        if estimate.skip is None:
            self.optimizer.thresholds.update(plan.thresholds)
            self._update(probes)
            if self.backprop is not None:
                self.backprop.step(self.optimizer)
        else:
            probes = ()  # of a step that only the second round has ruled out
            self._skips.log(self.step_count, estimate)
        grads = estimate.projected_grads
        projected_grad = math.fsum(grads) / len(grads) if grads else float("nan")
        failed = bool(plan.failed)
        return self._done(loss, projected_grad, probes, clipped, estimate.skip, scores=scores, failed=failed)

    def _looked_at(self, plan: StepPlan) -> Worse | None:
        """Lets the last look of the run see a step; returns what it has found in the last one."""
        look = self.look
        if look is None:
            return None
        look.measured(plan)
        if not look.due(plan.step):
            return None
        self.look = None
        return look.worse

    def _as_applied(
        self, estimate: Estimate, probes: tuple[Probe, ...], multiple: float, losses: Sequence[float]
    ) -> tuple[Estimate, tuple[Probe, ...]]:
        """The normalised probes, times a multiple; a skip if their update is not in the range of float32."""
        measured, before = probes, None if self.normaliser is None else self.normaliser.saved()
        try:
            if self.normaliser is not None:
                self.normaliser.see(self.step_count, probes, losses, self.eps)
                probes = self.normaliser.apply(probes)
            if multiple != 1.0:
                probes = tuple(times(probe, multiple) for probe in probes)
            coefficients = [probe.coefficient for probe in probes]
            mean_square = 0.0 if self.normaliser is None else self.normaliser.mean_square
            # A log with a step that this rules out could not be read.
            if can_be_applied(coefficients, self.directions.multipliers(self.slots), mean_square):
                taken = self.directions.taken_by_decay(len(probes))
                if taken < 1.0:
                    return estimate, probes
                return self._unfit(too_much_decay(taken), before)
        except OverflowError:  # of a coefficient that float32 cannot hold
            pass
        return self._unfit(unfit([probe.coefficient for probe in measured]), before)

    def _unfit(self, why: Estimate, before: dict[str, float | str] | None) -> tuple[Estimate, tuple[Probe, ...]]:
        """A skip; the normaliser has seen nothing."""
        if self.normaliser is not None and before is not None:
            self.normaliser.load(before)
        return why, ()

    def _decaying(self) -> float:
        return 1.0 if self.normaliser is None else self.normaliser.decaying(self.normaliser.mean_square)

    def _update(self, probes: tuple[Probe, ...]) -> None:
        with self.curves.clock.timed("updates"):
            self.updaters.apply(self.rule, self.directions.moves(self.slots, probes))

    def _done(
        self,
        loss: float,
        projected_grad: float,
        probes: tuple[Probe, ...],
        clipped: int = 0,
        skipped: str | None = None,
        rollback: Rollback | None = None,
        scores: Scores | None = None,
        failed: bool = False,
    ) -> StepRecord:
        """Every step ends here, whether it was measured, repeated or skipped."""
        record = StepRecord(
            loss=loss,
            projected_grad=projected_grad,
            lr=number(self.optimizer.param_groups[0], "lr", math.nan) * self.optimizer.factor,
            step=self.step_count,
            seed=self.noise.seed(self.seed, self.step_count, 0),
            probes=probes,
            clipped=clipped,
            skipped=skipped,
            normaliser=None if self.normaliser is None else self.normaliser.mean_square,
            rollback=rollback,
            scores=scores,
            failed=failed,
        )
        note(self, probes)
        self.curves.add(record.step, loss, projected_grad, record.lr, skipped, partial(memory_now, self._device))
        self.exchange.done(self.step_count, probes, [*self.directions.rates(), *self.directions.decays()])
        if self.backprop is not None:
            self.backprop.discard()
        self._forget()
        self.step_count += 1
        for listener in self.listeners:
            listener(record)
        self.merged = False
        if rollback is not None:
            self.optimizer.factor = rollback.factor
        return record

    # Other ways to continue

    def discard(self) -> None:
        """Forgets what was measured since the last step."""
        self._plan = self._repeated = None
        if self.backprop is not None:
            self.backprop.discard()
        self._forget()

    def _forget(self) -> None:
        """Drops what the directions of a finished step were computed from, unless pending updates need it."""
        self.noise.forget(self._seeds(), self.places.waits())

    def _seeds(self) -> tuple[int, ...]:
        return tuple(self.noise.seed(self.seed, self.step_count, i) for i in range(self.num_probes))

    @property
    def _plan(self) -> StepPlan | None:
        """The step in progress; None between steps."""
        return self.directions.plan

    @_plan.setter
    def _plan(self, plan: StepPlan | None) -> None:
        self.directions.plan = plan
        if plan is None and self.second is not None:
            self.second.forget()

    def at(self, step: int, seed: int | None = None) -> None:
        """Sets the next step, and discards what was measured for another one.

        Args:
            step: its index.
            seed: seed of the run that it belongs to; None keeps the current one.

        Raises:
            StateError: ``step`` is no index of a step, or ``seed`` no whole number.
        """
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MOST:
            raise StateError(f"step={step!r} must be a whole number from 0 to {MOST}: how many steps the run has done")
        if seed is not None and not is_seed(seed):
            raise StateError(f"seed={seed!r} must be a whole number of at most 128 bits, or None for that of the run")
        self.discard()
        self.step_count = step
        if seed is not None:
            object.__setattr__(self, "seed", seed)  # a setting, which users choose when they make the engine

    def skip(self, reason: str) -> StepRecord:
        """Ends the step in progress without moving a weight; the next one has new directions.

        It has no loss, so the brake learns nothing from it. Generators and the state of the model stay as they are.

        Args:
            reason: for the record and its listeners.
        """
        self.discard()
        repeated(self, None, None)
        return self._done(math.nan, math.nan, (), skipped=reason, failed=True)

    def repeat(
        self,
        probes: tuple[Probe, ...],
        loss: float,
        normaliser: float | None = None,
        rollback: Rollback | None = None,
        scores: Scores | None = None,
        failed: bool = False,
    ) -> None:
        """Makes the next `apply` repeat an earlier step, instead of applying one that is measured now.

        Args:
            probes: the probes in its `StepRecord`; empty if the step was skipped.
            loss: the loss to report in the new record.
            normaliser: that of its record.
            rollback: that of its record, which is done again.
            scores: those to report in the new record.
            failed: that of its record.

        Raises:
            StateError: only one of the engine and the step has a normaliser, or the engine has ``backprop``.
        """
        if self.backprop is not None:
            raise StateError(
                "a step with backprop cannot be repeated: probes have no gradients; continue from a checkpoint"
            )
        if probes and (normaliser is None) != (self.normaliser is None):
            raise StateError(
                f"normaliser={normaliser!r} does not fit an engine whose normaliser is {self.normaliser}; "
                "pass what the record of the step has"
            )
        self._plan = None
        self._repeated = lambda engine: engine._repeat(probes, loss, normaliser, rollback, scores, failed)

    def _repeat(
        self,
        probes: tuple[Probe, ...],
        loss: float,
        normaliser: float | None,
        rollback: Rollback | None,
        scores: Scores | None,
        failed: bool,
    ) -> StepRecord:
        self.discard()
        repeated(self, None if failed else loss, rollback)
        if probes and self.normaliser is not None and normaliser is not None:
            self.normaliser.repeat(self.step_count, normaliser)
        if probes and self.step_count >= self.continuity.ahead:
            self._update(probes)
        # A coefficient is g / n for the mean over n directions; other estimators do not keep g in it.
        two_sided = self.estimator.name == "spsa" and probes
        unit = 1.0 if self.normaliser is None else self.normaliser.scale
        projected_grad = math.fsum(p.coefficient for p in probes) * unit if two_sided else float("nan")
        skipped = None if probes else "skipped in the log"
        return self._done(
            loss, projected_grad, probes, skipped=skipped, rollback=rollback, scores=scores, failed=failed
        )

    def snapshot(self) -> Snapshot:
        """A copy of what steps change: weights, rule state, rates, generators and counters; `restore` puts it back.

        Raises:
            StateError: a copy of streamed weights could not be written to temporary files.
        """
        return Snapshot(self)

    def check(self, closure: Callable[[], Any], directions: int = 4) -> GradientCheck:
        """Compares measured directional derivatives with those of backpropagation, on a model that is small enough.

            print(zo.check(lambda: model(**batch).loss))

        Forward-only training sees only values. A loss that uses ``detach()`` to define a gradient has another
        value, and training follows that. Weights, generators and buffers are restored afterwards.

        Args:
            closure: as for `step`; what it returns has to be differentiable.
            directions: number of directions to compare.

        Raises:
            ConfigError: weights are streamed or quantised.
            LossError: the closure returned a number without a gradient.
        """
        return check_gradient(self, closure, directions)

    # The learning rate

    def suggest_lr(
        self, closures: Sequence[Callable[[], Any]], forwards: int | None = None, steps: int | None = None
    ) -> LrSuggestion:
        """Suggests a learning rate by trial runs, all of which are undone; see `zo_core.suggest_lr`."""
        if self.backprop is not None:
            raise ConfigError(["suggest_lr measures what forward passes learn; leave out backprop while it does"])
        try:
            return range_test(self, closures, forwards, steps)
        except BaseException as error:
            self.exchange.fail(error)
            raise

    @property
    def wants_lr(self) -> bool:
        """Whether the learning rate still has to be found; a run that continues from a checkpoint has one."""
        return self.config.lr == AUTO and not self._searched and self.step_count == 0 and self._plan is None

    def find_lr(
        self,
        batches: Callable[[], AbstractContextManager[Sequence[Callable[[], Any]]]],
        schedulers: Sequence[Any] = (),
        steps: int | None = None,
    ) -> None:
        """Sets the rate that `suggest_lr` finds; does nothing without ``lr="auto"`` or after the first step.

        If the run is too short for a search, it takes the default rate; if no rate has lowered the loss by more than
        the batches differ, a quarter of it, since much noise needs small steps. A torch optimizer keeps its rate.

        Args:
            batches: returns a context for the test, which yields one closure per batch; only called if needed.
            schedulers: schedulers of the optimizer; the rates that they have computed are scaled to the new one.
            steps: length of the run; None if it is not known.
        """
        if self._left and self.step_count == 0 and self._plan is None:
            self._left = False
            logger.warning("%s", said_default(self.slots, base_rates(self.optimizer)[0], self.eps, self.normaliser))
        if not self.wants_lr:
            return
        check_replaceable(self.optimizer, schedulers)
        try:
            with batches() as closures:
                self.suggestion = self.suggest_lr(closures, steps=steps)
        except SearchError as error:
            if not isinstance(self.optimizer, TorchOptimizerFace):
                lr = self._default_lr(self.slots, self.eps)
                set_lr(self.optimizer, lr * NOISY if error.noisy else lr, schedulers)
            logger.warning("the learning rate is %.2g: %s", base_rates(self.optimizer)[0], error)
        else:
            set_lr(self.optimizer, self.suggestion.lr, schedulers)
            how = "" if self.normaliser is None else f"; to write it down: normalise={self.normaliser.name!r}"
            logger.warning("%s%s", self.suggestion.summary(), how)
        self._searched = True

    # Checkpoints

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
        self._agreed = False
        self.discard()

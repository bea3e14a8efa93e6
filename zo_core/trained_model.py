"""The model as its engine sees it: which tensors move, where they live, and how probes and others see them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .backprop import Backprop
from .beside_streamed import check_resident, ungraphed
from .checkpoint import Continuity
from .config import ZOConfig
from .curves import Curves
from .directions import Directions
from .errors import StateError
from .estimators import Estimator
from .files import write_whole
from .following import trainable
from .forward_state import Carried
from .live import LiveSettings
from .noise import Alternatives, Direction, Noise
from .normaliser import Normaliser
from .optimizer import TorchOptimizerFace
from .placement import check_streamable, offload_model, slots_of
from .probing import ResidentOracle, StackedOracle, realisation
from .records import Point
from .report import page
from .rules import UpdateRule
from .streaming import LockstepOracle, Streaming, repeated_layers
from .targets import Slot, Target, by_number, check_settings, check_whole, shapes_of
from .updates import Places, Updaters
from .version import __version__


class TrainedModel(LiveSettings):
    """Base class of the engine with what concerns the model; `ZeroOrder` describes the attributes."""

    model: nn.Module
    config: ZOConfig
    estimator: Estimator
    num_probes: int
    step_count: int
    normaliser: Normaliser | None
    curves: Curves
    noise: Noise
    rule: UpdateRule
    slots: list[Slot]
    places: Places
    directions: Directions
    continuity: Continuity
    merged: bool
    backprop: Backprop | None
    regroup: Callable[[list[Slot]], object]
    _carried: list[Carried]
    _kept: nn.Module | None
    _agreed: bool  # whether the processes of the run have compared what they hold

    def _forget(self) -> None:
        """Drops what was kept for the directions of a step."""
        raise NotImplementedError

    def __repr__(self) -> str:
        count = sum(slot.shape.numel() for slot in self.slots)
        return (
            f"ZeroOrder({type(self.model).__name__}, step {self.step_count}: {count:,} values in {len(self.slots)} "
            f"tensors, {self.described()})"
        )

    def described(self) -> str:
        """The method in words."""
        return (
            f"estimator {self.estimator.name}, {self.num_probes} direction{'' if self.num_probes == 1 else 's'}, "
            f"noise {self.noise.name}, rule {self.rule.name}, eps {self.eps:g}, "
            f"steps normalised by {self.normaliser.name if self.normaliser else 'nothing'}"
            + ("" if self.backprop is None else f", backpropagation in {', '.join(self.backprop.names)}")
        )

    def choose(self) -> list[Slot]:
        """The slots of the model as it is now; after adapters were added, another target may choose them."""
        check_whole(self.model)
        streamed = Streaming.of(self.model) is not None
        check_settings(self.model, self.config, self.noise, self.rule, streamed=streamed)
        self._target = self._settings.target.chosen(self.model)
        slots = self._target.slots(self.model)
        return slots if self.backprop is None else self.backprop.rest(self.model, slots)

    def take(self, slots: list[Slot]) -> None:
        """Builds everything that depends on which weights move."""
        face = self.optimizer if isinstance(self.optimizer, TorchOptimizerFace) else None
        self.slots = slots_of(self.optimizer, slots, self.target.name, foreign=face is not None)
        self.directions.noise = self._settings.noise.over(
            sorted(shapes_of(self.slots), key=lambda each: by_number(each[0]))
        )
        object.__setattr__(self, "noise", self.directions.noise)  # the same setting, for what moves now
        self.oracle = self._oracle()
        if self.backprop is not None:
            self.backprop.begin(self.optimizer)
            known = {id(weight) for weight in self.backprop.weights.values()}
            self.oracle.state.moving |= known  # steps change them, forwards do not
        self.updaters = Updaters(
            *(self.model, self.slots, self.places, self.noise, self.rule),
            None if face is None else face.inner,
            stochastic=self.config.stochastic_rounding,
        )
        self.trainable = trainable(self.model)
        self._agreed = False

    @property
    def target(self) -> Target:
        """The target that chose the slots; it may change after adapters were added."""
        return self._target

    @property
    def streaming(self) -> Streaming | None:
        """What streams the model's blocks; None for a resident model."""
        return self.places.streaming

    @property
    def _device(self) -> torch.device:
        return self.places.device(self.slots[0])

    def _oracle(self) -> ResidentOracle | LockstepOracle:
        config, streaming = self.config, Streaming.of(self.model)
        if streaming is None and config.offload is None:
            return self._resident()
        check_streamable(config, self.rule)
        if streaming is None:
            streaming = offload_model(self.model, config, self.slots)
        if streaming is None:
            return self._resident()
        if self.backprop is not None:
            check_resident(self.backprop.names, self.backprop.weights, streaming)
        self.places.streaming = streaming
        parts = self.model, self.slots, self._perturbation, streaming
        return LockstepOracle(*parts, unit=self.direction, **self._how())

    def _resident(self) -> ResidentOracle:
        parts = self.model, self.slots, self._perturbation
        if self.config.stack_probes:
            return StackedOracle(*parts, alternatives=self._alternatives, **self._how())
        return ResidentOracle(*parts, unit=self.direction, **self._how())

    def _how(self) -> dict[str, Any]:
        return {
            "dropout": self.config.dropout,
            "realisation": realisation(self.noise),
            "carried": self._carried,
            "keep_mode": self._kept,
            "repeated": repeated_layers(self.model, self.config.blocks),
            "maximize": self.config.maximize,
            "reuse": self.config.reuse,
        }

    def _perturbation(self, slot: Slot, point: Point) -> Direction:
        return self.directions.probe(self.updaters.of[slot], slot, point)

    def _alternatives(self, slot: Slot, points: Sequence[Point]) -> Alternatives:
        return self.directions.alternatives(self.updaters.of[slot], slot, points)

    def direction(self, slot: Slot, seed: int) -> Direction:
        """The direction ``z(seed)`` of a slot, in the units of the step's eps."""
        return self.directions.unit(slot, seed)

    def flush(self) -> None:
        """Applies the updates that are pending for streamed blocks; does nothing for a resident model."""
        if self.streaming is not None:
            with self.continuity.applying():
                self.places.flush()
            self._forget()

    def stop(self) -> None:
        """Applies pending updates, and ends the threads of the probes; the next step starts them again."""
        self.flush()
        if isinstance(self.oracle, LockstepOracle):
            self.oracle.lockstep.close()

    def close(self, device: torch.device | None = None) -> None:
        """Merges pending updates, makes a streamed model ordinary parameters again, and ends the threads.

        Args:
            device: where the streamed parameters go; None takes the device they computed on.
        """
        self.merged = self.updaters.settle() or self.merged
        if self.streaming is not None:
            self.stop()
            self.places.close(device)
            self.oracle = self._resident()
        self._forget()

    @property
    def written(self) -> bool:
        """Whether low-rank updates were merged into weights that moved: these are then not what the run began with."""
        return self.updaters.windows.written

    @written.setter
    def written(self, value: bool) -> None:
        self.updaters.windows.written = value

    def effective(self) -> AbstractContextManager[None]:
        """A context in which weights include the updates that are pending until the end of a low-rank window.

        Forwards of the model's modules include them anyway; this is for code that computes with a parameter
        outside of them.
        """
        return self.updaters.windows.effective()

    @contextmanager
    def differentiated(self) -> Iterator[None]:
        """As `effective`, for a forward that records a graph, which is an error in a streamed layer."""
        with ungraphed(self.streaming), self.effective():
            yield

    def hidden(self) -> AbstractContextManager[None]:
        """A context in which parameters with pending updates show what is in memory, for the engine's own code."""
        return self.updaters.windows.hidden()

    def distance(self) -> float:
        """How far the weights are from those of the start: the norm of the difference, over all that the rule moves.

        Raises:
            StateError: the rule does not keep the weights of the start, or this process holds parts of them.
        """
        if not self.rule.anchored:
            raise StateError(
                f"rule={self.rule.name!r} does not keep the weights of the start; write rule={{'name': 'sgd', "
                "'decay_to': 'start'}, with any weight_decay"
            )
        if any(slot.part is not None for slot in self.slots):
            raise StateError("distance() is that of whole weights, and this process holds parts of DTensors")
        self.flush()
        return math.sqrt(math.fsum(self.places.moved(slot) for slot in self.slots))

    def keep_mode(self, module: nn.Module) -> None:
        """Makes probes leave the ``training`` flag of this module alone from now on, for trainers that read it."""
        self._kept = self.oracle.keep_mode = module

    def cover_new(self, alike: Callable[[Slot, dict[str, Any]], bool] | None = None) -> None:
        """Makes an optimizer that was passed in take slots that become trainable during a run from now on.

        Args:
            alike: whether a slot belongs in a group; see `ZOOptimizer.cover`.
        """
        self.regroup = partial(self.optimizer.cover, alike=alike)

    def carry(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        """Treats further state that a closure changes like that of the model, from the next step on.

        All probes of a step start from the same state, and the step leaves what one call of the closure leaves.

        Args:
            get: returns the state, or a copy if it is changed in place; equal states have to compare equal.
            put: sets what ``get`` has returned.
        """
        self._carried.append((get, put))

    def copy_whole(self) -> None:
        """Makes each probe copy all slots at once from now on, for closures that run compiled code."""
        self.oracle.copy_whole()
        self.updaters.wait_no_more(self.rule)  # compiled code in an evaluation would not see pending updates

    def store_state(self, windows: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        """Adopts the state that was loaded into the optimizer, and ``windows`` as `Updaters.saved` returns them."""
        self.updaters.load(windows or {})

    def report(self, path: str | os.PathLike[str], title: str = "Forward-only training") -> Path:
        """Writes a page about the run so far: an HTML file without references to others.

            zo.report("report.html")                # after `trainer.train()`: trainer.zo.report("report.html")

        It shows loss, projected gradient, learning rate, memory, skipped steps, forwards per second and where the
        time went, from this engine's first step on.

        Args:
            path: the file to write; an existing one is replaced.
            title: heading of the page.

        Returns:
            The path.
        """
        count = sum(slot.shape.numel() for slot in self.slots)
        facts = {
            "model": type(self.model).__name__,
            "trained": f"{count:,} values in {len(self.slots)} tensors ({self.target.name})",
            "method": self.described(),
            "made by": f"zo-trainer {__version__}, torch {torch.__version__}, {datetime.now():%Y-%m-%d %H:%M}",
        }
        write_whole(Path(path), page(title, facts, self.curves).encode())
        return Path(path)

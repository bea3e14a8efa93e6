"""Backpropagation through the last blocks of a model, while the rest learns from forward passes.

A step differentiates the loss at the unperturbed weights with respect to the named weights alone. Nothing else requires
a gradient meanwhile, so autograd keeps activations only from the first named module on. ZO-Bench (arXiv 2402.11592),
Addax and HiZFO train models this way.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ConfigError, LossError, StateError
from .exchange import Exchange
from .forward_state import ForwardState
from .modes import probe_modes, rng_state, set_rng_state
from .registry import similar
from .targets import Slot
from .targets.base import WRAPPERS, slot_keys

logger = logging.getLogger(__name__)

#: How a caller scales a loss before it adds it to those of other micro-batches.
Scale = Callable[[Tensor], Tensor]


class Measuring(Protocol):
    """The part of an oracle that `Backprop` uses."""

    state: ForwardState
    dropout: bool
    maximize: bool
    keep_mode: nn.Module | None


class Backprop:
    """The weights that backpropagation moves, with the optimizer that moves them: `torch.optim.AdamW`.

    Args:
        names: names of modules or parameters, or patterns of them.
        lr: learning rate.
        weight_decay: decoupled weight decay of weights that no group of the run's optimizer holds.

    Attributes:
        weights: the weights by name.
        optimizer: the AdamW; it holds all of them once the engine is made.
        max_norm: norm that the gradient of all of them together is clipped to; None does not clip.
        norm: the norm of the last step's gradient, before clipping.
    """

    def __init__(self, names: Sequence[str], lr: float, weight_decay: float):
        self.names, self.lr, self.weight_decay = tuple(names), lr, weight_decay
        self.weights: dict[str, nn.Parameter] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.max_norm: float | None = None
        self.norm = math.nan
        self._homes: list[int] = []
        self._order: dict[int, int] = {}
        self._total: list[Tensor | None] = []
        self._fresh: list[tuple[list[Tensor | None], Scale]] = []
        self._told = self._shared = False

    # Which weights

    def rest(self, model: nn.Module, slots: Sequence[Slot]) -> list[Slot]:
        """Finds the named weights among the trainable ones, and returns the other slots, as if those were frozen.

        Args:
            model: the module that is trained.
            slots: all slots of the model.

        Raises:
            ConfigError: a name finds nothing, or what the names find cannot be trained this way.
        """
        paths, trained, tied = _paths(model), named(model, self.names), {}
        problems = [_unknown(name, paths) for name in self.names if not _found(name, paths)]
        for path, parameter in paths:
            if id(parameter) in trained and not any(_matches(name, path) for name in self.names):
                tied[path] = parameter
        mine = [slot for slot in slots if any(id(tensor) in trained for tensor in slot.tensors)]
        others = [slot for slot in slots if slot not in mine]
        if not problems:
            problems += _unfit(self.names, mine, others)
        if problems:
            raise ConfigError(problems)
        if tied and not self._told and any(parameter.requires_grad for parameter in tied.values()):
            self._told = True
            logger.warning(
                "backprop also differentiates through %s, which is the same weight as one that it names: activations "
                "are kept from the first use of it on; untie the two, or name other layers",
                next(iter(tied)),
            )
        names = {id(parameter): path for path, parameter in reversed(paths)}
        self._order = {id(parameter): place for place, (_, parameter) in reversed([*enumerate(paths)])}
        self.weights = {names[id(slot.tensor)]: slot.tensor for slot in mine}  # type: ignore[misc]
        return _keyed(model, others)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the AdamW, or adds weights to it that are new.

        Args:
            optimizer: that of the run. The weight decay of the group that holds a weight counts for it, and what a
                schedule makes of the rate of that group, it makes of ``lr``.
        """
        groups = _groups(optimizer)
        home = {id(tensor): index for index, group in enumerate(groups) for tensor in group["params"]}
        held = set[int]()
        if self.optimizer is not None:
            held = {id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]}
        for weight in self.weights.values():
            if id(weight) in held:
                continue
            index = home.get(id(weight))
            decay = self.weight_decay if index is None else float(groups[index].get("weight_decay") or 0.0)
            self._add(weight, 0 if index is None else index, decay)
        self._sort()

    def _add(self, weight: Tensor, home: int, decay: float) -> None:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW([weight], lr=self.lr, weight_decay=decay)
            self._homes = [home]
            return
        for index, group in zip(self._homes, self.optimizer.param_groups, strict=True):
            if index == home and group["weight_decay"] == decay:
                group["params"].append(weight)
                return
        self.optimizer.add_param_group({"params": [weight], "weight_decay": decay})
        self._homes.append(home)

    def _sort(self) -> None:
        """Brings the AdamW into the order of a new one, by which a checkpoint goes: that of the model."""
        assert self.optimizer is not None
        groups, last = self.optimizer.param_groups, len(self._order)  # of weights that were replaced
        for group in groups:
            group["params"].sort(key=lambda weight: self._order.get(id(weight), last))
        first = [self._order.get(id(group["params"][0]), last) for group in groups]
        places = sorted(range(len(groups)), key=first.__getitem__)
        self._homes, groups[:] = [self._homes[place] for place in places], [groups[place] for place in places]

    # A step

    def bound(self, max_norm: float | None) -> None:
        """Sets ``max_norm``; 0 does not clip, as in trainers."""
        self.max_norm = max_norm or None

    def measure(
        self,
        model: nn.Module,
        oracle: Measuring,
        around: Callable[[], AbstractContextManager[None]],
        closures: Sequence[Callable[[], Any]],
        scaled: Sequence[Scale] | None,
    ) -> None:
        """Differentiates the loss of some micro-batches; random generators and buffers are as before.

        Args:
            model: the module that is trained.
            oracle: measures the same closures; gives the modes that modules are in.
            around: a context in which weights include pending updates, and no graph is kept of streamed layers.
            closures: one per micro-batch.
            scaled: for each of them, how its loss is scaled; it is called later. None is not at all.

        Raises:
            LossError: a closure returned something that has no gradient with respect to the named weights.
        """
        self._fold()
        self._shared = False
        start = rng_state()
        oracle.state.begin()
        modes = probe_modes(model, dropout=oracle.dropout, keep=oracle.keep_mode)
        # Autocast keeps casts of weights: those of a forward without gradients would stop this one's.
        torch.clear_autocast_cache()
        try:
            with torch.inference_mode(False), torch.enable_grad(), modes, self._alone(model), around():
                for index, closure in enumerate(closures):
                    self._fresh.append((self._gradients(closure, oracle.maximize), scaled[index] if scaled else _as_is))
                    if scaled is None:
                        self._fold()
        finally:
            torch.clear_autocast_cache()
        set_rng_state(start)
        oracle.state.rewind()

    def _gradients(self, closure: Callable[[], Any], maximize: bool) -> list[Tensor | None]:
        loss = closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise LossError(
                f"backprop={list(self.names)} differentiates the loss, and what the closure returned "
                f"({type(loss).__name__}) does not depend on these weights in a way that autograd knows; return the "
                "loss itself, without .item() or detach(), or leave out backprop"
            )
        if loss.numel() != 1:
            raise LossError(f"the closure returned a tensor of shape {list(loss.shape)}; return one number")
        loss = loss.reshape(())
        return list(torch.autograd.grad(-loss if maximize else loss, list(self.weights.values()), allow_unused=True))

    @contextmanager
    def _alone(self, model: nn.Module) -> Iterator[None]:
        """A context in which no other parameter of the model requires a gradient."""
        own = {id(weight) for weight in self.weights.values()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        try:
            for parameter in others:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _fold(self) -> None:
        """Adds the gradients of earlier micro-batches, whose scale is known by now, to those of the step."""
        fresh, self._fresh = self._fresh, []
        for gradients, scaled in fresh:
            scale = float(scaled(torch.ones((), dtype=torch.float64)))
            if scale != 1.0:
                gradients = [None if gradient is None else gradient * scale for gradient in gradients]
            if not self._total:
                self._total = gradients
                continue
            pairs = zip(self._total, gradients, strict=True)
            # Not in place: autograd may return one tensor for two weights.
            self._total = [b if a is None else a if b is None else a + b for a, b in pairs]

    def share(self, exchange: Exchange) -> None:
        """Takes the mean of the gradients of all processes, unless it was taken."""
        if not self._shared:
            self._fold()
            pairs = zip(exchange.mean(self._total), self.weights.values(), strict=True)
            self._total = [None if mean is None else mean.to(weight.device) for mean, weight in pairs]
            self._shared = True

    def unfit(self) -> str | None:
        """Why the step has to be skipped; None if its gradient is finite. Sets ``norm``."""
        self._fold()
        found = [gradient for gradient in self._total if gradient is not None]
        # In float32, or in the wider type that a gradient has; one that is narrower could overflow.
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in found]
        self.norm = math.hypot(*torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()) if norms else 0.0
        return None if math.isfinite(self.norm) else "the gradient of the weights under backprop is not finite"

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves the weights along what `measure` has found, at the scheduled rate.

        Args:
            optimizer: that of the run, whose schedule is followed.
        """
        assert self.optimizer is not None, "the engine calls begin() first"
        groups, weights = _groups(optimizer), list(self.weights.values())
        for home, group in zip(self._homes, self.optimizer.param_groups, strict=True):
            group["lr"] = self.lr * _schedule(groups[min(home, len(groups) - 1)])
        before = [weight.grad for weight in weights]
        gradients, self._total = self._total, []
        clips = bool(self.max_norm) and self.norm > 0.99 * self.max_norm  # type: ignore[operator]
        try:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone() if clips and gradient is not None else gradient
            if clips:
                nn.utils.clip_grad_norm_(weights, self.max_norm)  # type: ignore[arg-type]
            self.optimizer.step()
        finally:
            for weight, gradient in zip(weights, before, strict=True):
                weight.grad = gradient
        torch.clear_autocast_cache()

    def discard(self) -> None:
        """Forgets the gradients of the step in progress."""
        self._total, self._fresh = [], []

    # What a checkpoint or a copy of a run has

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint: that of the AdamW."""
        assert self.optimizer is not None, "the engine calls begin() first"
        return self.optimizer.state_dict()

    def check(self, state: dict[str, Any] | None) -> None:
        """Raises `StateError` if a checkpoint has none."""
        if state is None:
            raise StateError(
                f"this checkpoint is of a run without backprop, and this one has backprop={list(self.names)}; leave it "
                "out, or begin a new run from the weights of the checkpoint"
            )

    def load(self, state: dict[str, Any]) -> None:
        """Loads what `saved` returned.

        Raises:
            StateError: it is of other weights.
        """
        assert self.optimizer is not None, "the engine calls begin() first"
        try:
            self.optimizer.load_state_dict(copy.deepcopy(state))
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state of the weights under backprop does not fit them: {error}") from error

    def reset(self) -> None:
        """Forgets the state of the AdamW, for a new run."""
        self.discard()
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def copied(self) -> tuple[list[Tensor], dict[str, Any]]:
        """A copy of weights and state, for `put_back`."""
        return [weight.detach().clone() for weight in self.weights.values()], copy.deepcopy(self.saved())

    def put_back(self, kept: tuple[list[Tensor], dict[str, Any]]) -> None:
        """Restores what `copied` returned."""
        self.discard()
        with torch.no_grad():
            for weight, values in zip(self.weights.values(), kept[0], strict=True):
                weight.copy_(values)
        self.load(kept[1])

    def take_over(self, before: Backprop) -> None:
        """Continues with the state of another object for the weights that both have."""
        if self.optimizer is not None and before.optimizer is not None:
            mine = {id(weight) for weight in self.weights.values()}
            self.optimizer.state.update({t: held for t, held in before.optimizer.state.items() if id(t) in mine})
        self.max_norm = before.max_norm


def named(model: nn.Module, names: Sequence[str]) -> set[int]:
    """The ``id`` of all parameters, frozen ones included, that the setting ``backprop`` names."""
    return {id(parameter) for path, parameter in _paths(model) if any(_matches(name, path) for name in names)}


def _keyed(model: nn.Module, slots: Sequence[Slot]) -> list[Slot]:
    """Slots with the keys, hence the noise, that they have if nothing else is trainable."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if not all(id(slot.tensor) in names for slot in slots):  # scales are no parameters
        return list(slots)
    keys = slot_keys(names[id(slot.tensor)] for slot in slots)
    return [replace(slot, key=key) for slot, key in zip(slots, keys, strict=True)]


def _as_is(loss: Tensor) -> Tensor:
    return loss


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups that a scheduler sees."""
    return getattr(optimizer, "inner", optimizer).param_groups


def _schedule(group: dict[str, Any]) -> float:
    """What a scheduler has multiplied the rate of a group by; of the highest rate, where it begins below that."""
    known = [float(group[name]) for name in ("initial_lr", "max_lr") if group.get(name)]
    return float(group["lr"]) / max(known) if known else 1.0


def _paths(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters by name, without the prefixes that wrappers add; tied ones by each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return [(".".join(part for part in name.split(".") if part not in WRAPPERS), p) for name, p in named]


def _ancestors(path: str) -> list[str]:
    """The path, and those of the modules that it is in."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _matches(name: str, path: str) -> bool:
    return any(fnmatchcase(part, name) for part in _ancestors(path))


def _found(name: str, paths: Sequence[tuple[str, nn.Parameter]]) -> bool:
    return any(_matches(name, path) and parameter.requires_grad for path, parameter in paths)


def _unknown(name: str, paths: Sequence[tuple[str, nn.Parameter]]) -> str:
    if any(_matches(name, path) for path, _ in paths):
        return f"backprop: all weights in {name!r} are frozen; call requires_grad_(True) on it, or leave it out"
    known = list(dict.fromkeys(part for path, _ in paths for part in _ancestors(path)))
    ends = [part for part in known if part.endswith(f".{name}")]
    meant = f"; did you mean {ends[0]!r}?" if ends else similar(name, known)
    return f"backprop: {name!r} is no module with weights, and no pattern of one{meant}"


def _unfit(names: Sequence[str], mine: Sequence[Slot], others: Sequence[Slot]) -> list[str]:
    """What keeps these slots from being trained by backpropagation."""
    problems = []
    if not others:
        problems.append(
            f"backprop={list(names)} has all trainable weights, and none is left for forward passes; train with a "
            "torch optimizer and loss.backward(), or name fewer modules"
        )
    for slot in mine:
        if slot.scaling is not None:
            problems.append(f"backprop: {slot.key!r} is a quantisation scale, which is not differentiated")
        elif slot.tensor.dtype == torch.float16:
            problems.append(
                f"backprop: {slot.key!r} is float16, in which gradients underflow; make it bfloat16 or float32"
            )
        elif nn.Parameter not in type(slot.tensor).__mro__:
            problems.append(f"backprop: {slot.key!r} is a {type(slot.tensor).__name__}; only plain tensors are taken")
        elif len(slot.tensors) > 1:
            problems.append(
                f"backprop: {slot.key!r} shares its memory with another tensor, of shape "
                f"{list(slot.tensors[1].shape)}, that is not the same parameter; give it memory of its own"
            )
    return problems

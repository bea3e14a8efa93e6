"""Updates of low rank that wait: inside a window the weights in memory are not written.

    W_eff = decay * W + A right          A [m, K] float32, right [K, columns] the bases of the window

A step adds to the small factor A; when the window ends, the sum goes into W at once, so 16-bit weights
round stochastically once per window. Momentum lives in the factor, too, and is projected to the next
window's bases (LOZO-M, arXiv 2410.07698, section 4.2). Forwards outside of steps compute with W_eff, and
``state_dict`` has a rounded copy of it; neither ends the window, so the run does not depend on them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from .noise import Direction, LowRank, LowRankDirection, Noise, is_matrix, unsampled
from .noise.direction import float32
from .noise.low_rank import basis, columns
from .offload import Block, Streaming
from .oracle.function_mode import ProbeMode
from .oracle.functional import FunctionalMode, Sight
from .oracle.materialise import is_compiled
from .oracle.scratch import ScratchPool
from .rules import Momentum, Sgd, UpdateRule
from .stand_ins import ordinary, same_bits, stand_in
from .targets import Slot

Terms = tuple[tuple[int, float], ...]


class LazyUpdates:
    """The factors of an engine, and the hooks that let everybody see the weights as they should be.

    Args:
        model: the module that is trained.
        slots: those whose updates wait.
        noise: of low rank.
        rule: `Sgd` or `Momentum`.
        state: the optimizer's, where the factors live.
        streaming: what streams the model's blocks, if they are.
        stochastic: how the sums of 16-bit weights are rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: list[Slot],
        noise: LowRank,
        rule: UpdateRule,
        state: dict[Tensor, dict[str, Any]],
        streaming: Streaming | None,
        *,
        stochastic: bool,
    ):
        self.shapes = {slot: slot.tensor.shape for slot in slots}
        self.model, self.noise, self.rule, self.state = model, noise, rule, state
        self.streaming, self.stochastic = streaming, stochastic
        self.handles: list[Any] = []
        if streaming is not None:
            streaming.reader = self
        self._begin()

    def _begin(self) -> None:
        self.slots = {id(tensor): slot for slot in self.shapes for tensor in slot.tensors}
        self.pool = ScratchPool()
        self.exported: weakref.WeakValueDictionary[Slot, Tensor] = weakref.WeakValueDictionary()
        self.entered: list[list[Any]] = []
        self.inside = 0
        #: What resident parameters pointed at before somebody read them.
        self.read: dict[Slot, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A model that is copied or pickled takes its hooks along, hence this object; its parameters were read for
        # the copy, so nothing waits there.
        own = ("slots", "pool", "exported", "entered", "inside", "read", "shapes", "state", "streaming")
        kept = {name: value for name, value in vars(self).items() if name not in own}
        return {**kept, "shapes": {}, "state": {}, "streaming": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @staticmethod
    def of(model: nn.Module) -> Iterator[LazyUpdates]:
        """Whoever has updates that wait for this model."""
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        owners = {
            id(owner): owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), LazyUpdates)
        }
        yield from owners.values()

    @classmethod
    def make(
        cls,
        model: nn.Module,
        slots: Iterable[Slot],
        noise: Noise,
        rule: UpdateRule,
        state: dict[Tensor, dict[str, Any]],
        streaming: Streaming | None,
        *,
        stochastic: bool,
    ) -> LazyUpdates | None:
        """For the matrices among ``slots``; None where updates are applied at once.

        They are at once for rules whose updates are not of low rank, and for compiled models, whose
        forwards no hook or function mode could correct. Updates of an engine before this one are merged.
        """
        for before in cls.of(model):
            before.merge()
        noise, compiled = unsampled(noise), any(map(is_compiled, model.modules()))
        if not isinstance(noise, LowRank) or not isinstance(rule, (Sgd, Momentum)) or compiled:
            return None
        waiting = [slot for slot in slots if waits(noise, slot)]
        return cls(model, waiting, noise, rule, state, streaming, stochastic=stochastic)

    @property
    def beta(self) -> float | None:
        """The momentum of the rule as it is now; a scheduler may cycle it."""
        return self.rule.beta if isinstance(self.rule, Momentum) else None

    def takes(self, slot: Slot) -> bool:
        """Whether the updates of a slot wait here."""
        return slot in self.shapes

    # Steps

    def update(self, slot: Slot, terms: Terms, lr: float, weight_decay: float, rounding: int | None) -> None:
        """The rule's update along ``terms``, pairs of seed and coefficient; what W_eff is, but for rounding."""
        state = self.state[slot.tensor]
        bases = tuple(basis(seed) for seed, _ in terms)
        if state.get("bases") != bases:
            self._turn(slot, state, bases, rounding)
        rank, factor = self.noise.rank, state["factor"]
        decay = float32(1.0 - lr * weight_decay)
        if decay != 1.0:
            factor.mul_(decay)
            state["decay"] *= decay
        left = self.noise.lefts(tuple(seed for seed, _ in terms), slot.key, self.shapes[slot], factor.device)
        if self.beta is None:
            factor.add_(left * columns(tuple(-lr * c for _, c in terms), rank, factor.device))
        else:
            momentum = state["factor_momentum"].mul_(float32(self.beta))
            momentum.add_(left * columns(tuple(c for _, c in terms), rank, factor.device))
            factor.add_(momentum * float32(-lr))
        self.exported.pop(slot, None)
        if not self.handles and (decay != 1.0 or any(c for _, c in terms)):
            self._attach()

    def added(self, slot: Slot, direction: Direction) -> Direction:
        """A direction from the weights in memory, with what waits in it."""
        if not isinstance(direction, LowRankDirection) or (waiting := self.waiting(slot)) is None:
            return direction
        return replace(waiting, terms=direction.terms)

    def waiting(self, slot: Slot) -> LowRankDirection | None:
        """What has to be added to the weights in memory; None for nothing."""
        state = self.state.get(slot.tensor, {})
        if "factor" not in state:
            return None
        base = state["factor"], self._right(slot, state["bases"], state["factor"].device)
        rounding = state["bases"][0] if self.stochastic else None
        return LowRankDirection(
            *(self.noise, slot.key, (), rounding),
            shape=self.shapes[slot],
            base=base,
            bases=state["bases"],
            decay=state["decay"],
        )

    def _right(self, slot: Slot, bases: tuple[int, ...], device: torch.device) -> Tensor:
        return self.noise.rights(bases, slot.key, self.shapes[slot], device)

    def _turn(self, slot: Slot, state: dict[str, Any], bases: tuple[int, ...], rounding: int | None) -> None:
        """A window ends and another begins: the sum goes into the weights, momentum to the new bases."""
        waiting = self.waiting(slot)
        device = slot.tensor.device if self.streaming is None else self.streaming.device
        if waiting is not None:
            self._write(slot, replace(waiting, rounding_seed=rounding))
        with torch.inference_mode(False):
            shape = (self.shapes[slot][0], len(bases) * self.noise.rank)
            momentum = state.get("factor_momentum")
            if self.beta is not None and momentum is None:
                state["factor_momentum"] = torch.zeros(shape, dtype=torch.float32, device=device)
            elif momentum is not None:
                assert waiting is not None
                assert waiting.base is not None
                right = self._right(slot, bases, device)
                state["factor_momentum"] = projected(momentum, waiting.base[1], right, self.noise.rank)
            state["factor"] = torch.zeros(shape, dtype=torch.float32, device=device)
        state["bases"], state["decay"] = bases, 1.0

    def _write(self, slot: Slot, waiting: LowRankDirection) -> None:
        home = None if self.streaming is None else self.streaming.home(slot.tensors)
        if home is None:
            waiting.add_to(slot.tensor.data)
        else:
            block, name = home
            block.pending.append(((name,), partial(_move, name, waiting)))

    def merge(self) -> bool:
        """Puts everything that waits into the weights, and takes the hooks away: for the end of training.

        A run that goes on afterwards begins a new window, so its numbers differ from those without this.

        Returns:
            Whether anything waited.
        """
        with torch.no_grad(), self.hidden():
            waited = [self.end_window(slot) for slot in self.shapes]
        for handle in self.handles:
            handle.remove()
        self.handles = []
        torch.clear_autocast_cache()
        return any(waited)

    def end_window(self, slot: Slot) -> bool:
        """Puts what waits for a slot into its weights; whether anything did. For callers inside of `hidden`."""
        waiting = self.waiting(slot)
        if waiting is None:
            return False
        self._write(slot, waiting)
        self._forget(slot)
        return True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """In this context another engine may move the resident weights; at its end the window is as it was."""
        with self.hidden():
            waiting = [slot for slot in self.shapes if self._home(slot) is None and self.waiting(slot) is not None]
            before = [(slot, slot.tensor.data.clone(), dict(self.state[slot.tensor])) for slot in waiting]
        try:
            yield
        finally:
            with torch.no_grad(), self.hidden():
                for slot, weights, state in before:
                    slot.tensor.data.copy_(weights)
                    self.state[slot.tensor].update(state)
                if before and not self.handles:
                    self._attach()

    def _forget(self, slot: Slot) -> None:
        # The momentum goes with its bases.
        for name in ("factor", "factor_momentum", "bases", "decay"):
            self.state[slot.tensor].pop(name, None)
        self.exported.pop(slot, None)

    # What others see

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """In this context the parameters show what is in memory; outside of it, who reads one sees W_eff."""
        if not self.inside:
            self._settle()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self._show()

    def _show(self) -> None:
        """Makes the parameters that are behind stand-ins."""
        for slot in self.shapes:
            if self._home(slot) is None and slot not in self.read and "factor" in self.state.get(slot.tensor, {}):
                for tensor in slot.tensors:
                    stand_in(tensor, partial(self._bring, slot))

    def _bring(self, slot: Slot) -> None:
        """Somebody reads a parameter: it points at W_eff until the next step."""
        for tensor in slot.tensors:
            ordinary(tensor)
        waiting = self.waiting(slot)
        if waiting is None:
            return
        kept = slot.tensor.data
        self.read[slot] = kept
        sum_ = waiting.add_to(kept, out=torch.empty_like(kept))
        for tensor in slot.tensors:
            tensor.data = sum_

    def _settle(self) -> None:
        """What was read shows the memory of the window again; what was written, too, is where it begins anew."""
        with torch.no_grad(), torch.inference_mode(False):
            for slot in self.shapes:
                for tensor in slot.tensors if self._home(slot) is None else ():
                    ordinary(tensor)
            read, self.read = self.read, {}
            for slot, kept in read.items():
                now, waiting = slot.tensor.data, self.waiting(slot)
                shown = None if waiting is None else waiting.add_to(kept, out=self.pool.take(kept))
                if shown is None or not same_bits(now, shown):
                    kept.copy_(now)
                    self._forget(slot)
                for tensor in slot.tensors:
                    tensor.data = kept

    def _home(self, slot: Slot) -> tuple[Block, str] | None:
        return None if self.streaming is None else self.streaming.home(slot.tensors)

    def corrected(self, tensor: Tensor, values: Tensor) -> Tensor:
        """What a streamed parameter counts as, given its values in the store, which are changed in place."""
        slot = self.slots.get(id(tensor))
        waiting = None if slot is None else self.waiting(slot)
        return values if waiting is None else waiting.add_to(values)

    def overwritten(self, tensor: Tensor) -> None:
        """A streamed parameter was given new values."""
        slot = self.slots.get(id(tensor))
        if slot is not None and "factor" in self.state.get(slot.tensor, {}):
            self._forget(slot)

    def _attach(self) -> None:
        owners = {module for slot in self.shapes for module in slot.modules}
        for module in self.model.modules():
            if any(inner in owners for inner in module.modules()):
                self.handles += [
                    module.register_forward_pre_hook(self._enter, prepend=True),
                    module.register_forward_hook(self._leave, always_call=True),
                ]
            if module in owners:
                self.handles += [
                    module.register_state_dict_post_hook(partial(LazyUpdates._export, self)),
                    module.register_load_state_dict_pre_hook(self._import),
                ]

    def _enter(self, module: nn.Module, *_: Any) -> None:
        """A forward outside of a step begins; the outermost module turns the corrections on."""
        if self.entered and self.entered[-1][0] is module:
            self.entered[-1][2] += 1
        elif not any(isinstance(mode, (FunctionalMode, ProbeMode)) for mode in _get_current_function_mode_stack()):
            stack = ExitStack()
            stack.enter_context(self.hidden())
            stack.enter_context(self.mode())
            self.entered.append([module, stack, 1])

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self.entered and self.entered[-1][0] is module:
            self.entered[-1][2] -= 1
            if not self.entered[-1][2]:
                self.entered.pop()[1].close()

    def mode(self) -> FunctionalMode:
        """A mode in which torch functions that are given a parameter compute with W_eff."""
        known = [slot for slot in self.shapes if self.waiting(slot) is not None]
        return FunctionalMode(Sight(known, _values, self._waiting, self.pool), losses=False)

    def _waiting(self, slot: Slot) -> LowRankDirection:
        waiting = self.waiting(slot)
        assert waiting is not None
        return waiting

    def _export(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, slot in self._own(module):
            kept, waiting = state_dict.get(prefix + name), self.waiting(slot)
            if kept is None or waiting is None or slot in self.read:
                continue
            copy = self.exported.get(slot)  # one copy for tied weights, which savers know by their memory
            if copy is None:
                with torch.no_grad():
                    copy = self.exported[slot] = waiting.add_to(kept.detach(), out=torch.empty_like(kept).detach())
            state_dict[prefix + name] = copy

    def _import(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Weights that are loaded are W_eff; nothing waits for them."""
        for name, slot in self._own(module):
            if prefix + name in state_dict and self.waiting(slot) is not None:
                self._forget(slot)

    def _own(self, module: nn.Module) -> list[tuple[str, Slot]]:
        own = ((name, self.slots.get(id(parameter))) for name, parameter in module._parameters.items())
        return [(name, slot) for name, slot in own if slot is not None]

    # Checkpoints

    def saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """A slot's state for a checkpoint: with the weights in memory, which the model's own state is not."""
        slot = next((slot for slot in self.shapes if self.state.get(slot.tensor) is state), None)
        if slot is None or "factor" not in state:
            return state
        home = None if self.streaming is None else self.streaming.home(slot.tensors)
        weights = slot.tensor.data if home is None or self.streaming is None else self.streaming.state(*home)
        return {**state, "weights": weights}

    def loaded(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Takes the weights out of a state that was loaded."""
        self.state = state
        for slot in self.shapes:
            kept = state.get(slot.tensor, {})
            weights = kept.pop("weights", None)
            if weights is None:
                continue
            kept["bases"] = tuple(kept["bases"])
            home = None if self.streaming is None else self.streaming.home(slot.tensors)
            with torch.no_grad():
                if home is None or self.streaming is None:
                    slot.tensor.data.copy_(weights)
                else:
                    self.streaming.load_state(home[0], {home[1]: weights})
            if not self.handles:
                self._attach()
        self.exported.clear()

    def fits(self, tensor: Tensor, state: dict[str, Any]) -> bool:
        """Whether a loaded state has the factors of this engine."""
        slot = self.slots.get(id(tensor))
        if slot is None or state["factor"].ndim != 2 or state["factor"].shape[0] != self.shapes[slot][0]:
            return False
        columns = len(state["bases"]) * self.noise.rank
        factors = [state[name] for name in ("factor", "factor_momentum") if name in state]
        return all(factor.shape == (self.shapes[slot][0], columns) for factor in factors)


def projected(momentum: Tensor, old: Tensor, new: Tensor, rank: int) -> Tensor:
    """The momentum ``M old`` in the next window's bases: ``M old new^T / columns``, direction by direction.

    Args:
        momentum: M, float32 ``[m, K]``.
        old: signs ``[K, columns]``.
        new: signs ``[K, columns]``; a direction's rank rows are nearly orthogonal, of length sqrt(columns).
        rank: r.

    Returns:
        float32 ``[m, K]``. The products of signs are whole numbers, so this is exact but for the sums over r.
    """
    result = torch.empty_like(momentum)
    columns = old.shape[1]
    for at in range(0, len(old), rank):
        piece = slice(at, at + rank)
        overlap = (old[piece].double() @ new[piece].double().t() / columns).float()
        total = momentum[:, at : at + 1] * overlap[0]
        for k in range(1, rank):
            total = total + momentum[:, at + k : at + k + 1] * overlap[k]
        result[:, piece] = total
    return result


def changes_often(noise: Noise, slot: Slot) -> bool:
    """Whether a slot is written at every step while others are once in a window."""
    noise = unsampled(noise)
    return isinstance(noise, LowRank) and not waits(noise, slot)


def waits(noise: Noise, slot: Slot) -> bool:
    """Whether the updates of a slot can wait: of a matrix, which all of its tensors show alike."""
    return is_matrix(noise, slot.tensor.shape, slot.scaling) and slot.region is None


def _values(slot: Slot) -> Tensor:
    return slot.tensor  # the parameter itself, so that who differentiates W_eff gets gradients


def _move(name: str, waiting: LowRankDirection, tensors: dict[str, Tensor]) -> None:
    waiting.add_to(tensors[name])

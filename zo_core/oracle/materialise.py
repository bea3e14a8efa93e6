"""Realising a probe with scratch copies: ``theta + scale * z`` exists one layer at a time.

Nothing is ever perturbed in place, so nothing has to be undone: a weight's own memory is not
written during a probe. For the length of a module's forward its parameters point at perturbed
copies; otherwise they point at NaN. A parameter that some other code reaches for in between
is noticed in the call of the torch function and given its copy there, and one that is used where no
Python code can see it gives a NaN loss, never a quietly wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import Direction
from ..records import Point
from ..targets import Slot
from .function_mode import ProbeMode
from .scratch import ScratchPool


class Materialised:
    """Runs code with the slots of a model perturbed.

    Args:
        model: the module that the closures call.
        slots: what is perturbed.
        direction: the perturbation of one slot at one point.

    Attributes:
        whole: copy everything at the start of the probe instead of layer by layer; needs memory for
            a second set of the slots, and works for modules whose insides Python cannot see.
    """

    def __init__(self, model: nn.Module, slots: list[Slot], direction: Callable[[Slot, Point], Direction]):
        self.model = model
        self.slots = slots
        self.direction = direction
        self.whole = any(is_compiled(module) for module in model.modules())
        self.pool = ScratchPool()
        self._nan: dict[tuple[Any, ...], Tensor] = {}

    @contextmanager
    def at(self, point: Point) -> Iterator[None]:
        """In this context the model computes with ``theta + point.scale * z(point.seed)``."""
        with _Probe(self, point):
            yield

    def hooked_modules(self) -> list[tuple[nn.Module, list[Slot]]]:
        """The modules that hold slots, directly or in a submodule, with those held directly."""
        own: dict[nn.Module, list[Slot]] = {}
        for slot in self.slots:
            for module in slot.modules:
                own.setdefault(module, []).append(slot)
        return [(m, own.get(m, [])) for m in self.model.modules() if any(sub in own for sub in m.modules())]

    def nan_like(self, tensor: Tensor) -> Tensor:
        """NaN in the shape of ``tensor``, in four bytes."""
        key = (tensor.shape, tensor.dtype, tensor.device)
        if key not in self._nan:
            with torch.inference_mode(False):
                nan = torch.full((), float("nan"), dtype=tensor.dtype, device=tensor.device)
                self._nan[key] = nan.expand(tensor.shape)
        return self._nan[key]


class _Probe:
    """One probe in progress: which slots have values, and which module's end takes them away."""

    def __init__(self, owner: Materialised, point: Point):
        self.owner = owner
        self.point = point
        self.originals: dict[Slot, list[Tensor]] = {}
        self.absent: dict[int, Slot] = {}
        self.frames: list[list[Slot]] = [[]]
        self.stack = ExitStack()

    def __enter__(self) -> None:
        owner = self.owner
        try:
            if self.point.scale != 0.0:
                for slot in owner.slots:
                    self.originals[slot] = [tensor.data for tensor in slot.tensors]
                    self.release(slot)
                if owner.whole:
                    for slot in owner.slots:
                        self.materialise(slot)
                else:
                    for module, own in owner.hooked_modules():
                        self.hook(module, own)
            self.stack.enter_context(ProbeMode(self.absent, self.serve))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()
        for slot, originals in self.originals.items():
            for tensor, original in zip(slot.tensors, originals, strict=True):
                tensor.data = original
        torch.clear_autocast_cache()

    def hook(self, module: nn.Module, own: list[Slot]) -> None:
        def enter(*_: Any) -> None:
            self.frames.append([])
            for slot in own:
                if id(slot.tensor) in self.absent:
                    self.materialise(slot)
                    # Tied weights come round again: one copy serves the whole probe.
                    self.frames[0 if len(slot.modules) > 1 else -1].append(slot)

        def leave(*_: Any) -> None:
            for slot in self.frames.pop():
                self.release(slot)

        pre = module.register_forward_pre_hook(enter, prepend=True)
        post = module.register_forward_hook(leave, always_call=True)
        self.stack.callback(pre.remove)
        self.stack.callback(post.remove)

    def serve(self, identity: int) -> None:
        """Gives a slot its copy outside its module's forward, until the enclosing module ends."""
        slot = self.absent[identity]
        self.materialise(slot)
        self.frames[-1].append(slot)

    def materialise(self, slot: Slot) -> None:
        with torch._C.DisableTorchFunction():
            original = self.originals[slot][0]
            scratch = self.owner.pool.take(original)
            self.owner.direction(slot, self.point).add_to(original, out=scratch)
            for tensor in slot.tensors:
                self.absent.pop(id(tensor))
                tensor.data = scratch
        # Autocast caches casts by parameter object, and the object has just changed its values.
        torch.clear_autocast_cache()

    def release(self, slot: Slot) -> None:
        with torch._C.DisableTorchFunction():
            for tensor in slot.tensors:
                tensor.data = self.owner.nan_like(tensor)
                self.absent[id(tensor)] = slot
        torch.clear_autocast_cache()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile or TorchScript runs this module, out of the reach of hooks."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return isinstance(module, (torch._dynamo.OptimizedModule, torch.jit.ScriptModule))

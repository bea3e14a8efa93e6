"""The repeated layers of a model, and what probes have seen of how each uses weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..targets import Slot

#: Devices on which weights are copied module by module: the copy of a module stays in a processor's cache until its
#: product, and takes less memory than that of a layer. On others, each visit to Python costs more than that.
MODULE_BY_MODULE = frozenset({"cpu"})


@dataclass
class Look:
    """What one probe has seen of a layer's forwards.

    Attributes:
        given: slots that got values when the module that holds them was called.
        served: slots that got values because a torch function was about to use them.
        upcast: whether an input of a loss function was upcast.
        alike: whether the weights in memory are contiguous tensors of one device, on which layers are copied at once.
    """

    given: set[Slot] = field(default_factory=set)
    served: set[Slot] = field(default_factory=set)
    upcast: bool = False
    alike: bool = True

    def see(self, values: Tensor) -> None:
        """Records the weights of a slot in memory."""
        self.alike &= values.is_contiguous() and values.device.type not in MODULE_BY_MODULE


class Layer:
    """A repeated layer of the model.

    Args:
        module: the layer.
        slots: those that a module within it holds.

    Attributes:
        own: slots that one module holds, in one view: those that can be copied together.
        rest: the other slots.
        places: `own`, by the ``id`` of their tensors.
        known: whether a probe has seen it.
        at_once: give all slots their values when the layer's forward begins, instead of module by module.
        unobserved: do not look at torch functions during its forward.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot]):
        self.module, self.slots = module, frozenset(slots)
        self.own = [s for s in slots if len(s.modules) == 1 and s.region is None and s.scaling is None]
        self.rest = [slot for slot in slots if slot not in self.own]
        self.places = {id(tensor): slot for slot in self.own for tensor in slot.tensors}
        self.known = self.at_once = self.unobserved = False

    def learn(self, look: Look, outside: set[Slot]) -> None:
        """Decides how later probes treat the layer.

        Args:
            look: what a probe has seen of its forwards.
            outside: slots of any layer that got their values outside of its forward.
        """
        self.known = True
        if look.upcast or not self.slots.isdisjoint(outside):
            return
        # Experts that a forward does not choose are not copied, so they stay with module by module.
        self.at_once = look.alike and bool(self.own) and look.given | look.served >= self.slots
        self.unobserved = look.served <= (self.slots if self.at_once else frozenset())


def layers_of(modules: Sequence[nn.Module], slots: Sequence[Slot]) -> dict[nn.Module, Layer]:
    """The layers that hold slots, by module."""
    holders: dict[nn.Module, list[Slot]] = {}
    for slot in slots:
        for module in slot.modules:
            holders.setdefault(module, []).append(slot)
    found = {}
    for module in modules:
        held = list(dict.fromkeys(slot for part in module.modules() for slot in holders.get(part, ())))
        if held:
            found[module] = Layer(module, held)
    return found

"""What watches torch's operations sees all of them: those of other threads, and kernels that are launched by hand.

FLOP counters, loggers and CUDA's sanitizer are dispatch modes. A mode is active in the thread that
entered it, and sees the operations that pass through torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

Watchers = Sequence[TorchDispatchMode]

#: Stands for a kernel that the dispatcher does not know: its schema says what is read and what is written.
_LIBRARY = torch.library.Library("zo", "FRAGMENT")
_LIBRARY.define("launched(Tensor[] reads, Tensor(a!)[] writes) -> ()")
_LIBRARY.impl("launched", lambda reads, writes: None, "CompositeExplicitAutograd")


def watchers() -> Watchers:
    """The dispatch modes that are active in this thread, outermost first."""
    return _get_current_dispatch_mode_stack()


@contextmanager
def watched_by(modes: Watchers) -> Iterator[None]:
    """A context in which dispatch modes of another thread are active in this one, those that are not already.

    They are not entered again: the ``__enter__`` of a counter may set it to zero.
    """
    active = watchers()
    new = [mode for mode in modes if not any(mode is other for other in active)]
    for mode in new:
        _push_mode(mode)
    try:
        yield
    finally:
        for mode in reversed(new):
            _pop_mode(getattr(mode, "_mode_key", None))


def declare(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
    """Tells the dispatch modes of this thread what a kernel that is launched by hand reads and writes.

    Args:
        reads: tensors that are only read.
        writes: tensors that are written, whether or not they are read as well.
    """
    if watchers():
        torch.ops.zo.launched(list(reads), list(writes))

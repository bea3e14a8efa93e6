"""What a computation depends on besides its inputs, in another thread as in this one."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from .dispatch import watched_by, watchers


def ambient() -> Callable[[Callable[[], Any]], Any]:
    """A runner for functions, in any thread and later, that applies torch's thread-local state as it is here now.

    This includes the number of threads for matrix products: a new thread starts with all cores, whatever
    `torch.set_num_threads` has set, until some operation other than a product reads the setting, and
    an existing thread is never notified of a change.
    """
    threads, flushing = torch.get_num_threads(), _flushes_denormals()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    casts = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices]
    cache = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    modes, watching = list(_get_current_function_mode_stack()), watchers()
    variables = contextvars.copy_context()

    def run(function: Callable[[], Any]) -> Any:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushing)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            for device, dtype, enabled in casts:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            active = _get_current_function_mode_stack()
            for mode in modes:
                if not any(mode is other for other in active):  # one that a thread enters twice, it cannot leave
                    stack.enter_context(mode)
            stack.enter_context(watched_by(watching))
            return variables.copy().run(function)

    return run


def _flushes_denormals() -> bool:
    """Whether this thread flushes denormals to zero; torch has `torch.set_flush_denormal`, but no getter."""
    return sys.float_info.min / 2 == 0.0

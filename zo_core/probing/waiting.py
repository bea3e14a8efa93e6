"""Closures that wait for something outside of the process: coroutines, of which one computes while others wait.

    async def closure():
        pixels = denoiser(images)
        answer = await asyncio.to_thread(ask, pixels.tolist())
        return loss_of(answer)

The weights and the random generators belong to the whole process. So whenever a coroutine waits, it gives them back,
and it finds its own again when it continues.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from ..ambient import ambient
from ..errors import StateError
from ..forward_state import ForwardState
from ..modes import modes, rng_state, set_rng_state


class Waiting:
    """A closure that has begun to run with perturbed weights, and may wait in between.

    Args:
        coroutine: what the closure returned.
        perturbed: returns the context in which the model computes with the weights of this closure.
        model: the module that it calls.
        state: what its forwards may change.
    """

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        perturbed: Callable[[], AbstractContextManager[None]],
        model: nn.Module,
        state: ForwardState,
    ):
        self.coroutine, self.perturbed, self.model, self.state = coroutine, perturbed, model, state
        self.random = rng_state()

    def __await__(self) -> Generator[Any, Any, Any]:
        error: BaseException | None = None
        while True:
            other, end = self._continue(error)
            if end is not None:
                return end.value
            error = None
            try:
                yield other
            except GeneratorExit:
                self.coroutine.close()
                raise
            except BaseException as raised:  # of what it has waited for, or that it was cancelled
                error = raised

    def _continue(self, error: BaseException | None) -> tuple[Any, StopIteration | None]:
        """Runs to where the coroutine waits next; returns what it waits for, or its end."""
        set_rng_state(self.random)
        other, ended = None, None
        with self.perturbed():  # its end is no error of what ran with these weights
            before = _surroundings(self.model)
            try:
                other = self.coroutine.send(None) if error is None else self.coroutine.throw(error)
            except StopIteration as end:
                ended = end
            finally:
                self.random = rng_state()
            self._check(before)
        return other, ended

    def _check(self, before: object) -> None:
        """Raises `StateError` if others would see, while this one waits, what it has changed."""
        if _surroundings(self.model) != before:
            problem = "in a context that concerns the whole thread, such as torch.autocast"
        elif self.state.moved:
            problem = "and changes buffers or attributes of the model"
        else:
            return
        self.coroutine.close()
        raise StateError(
            f"the closure waits {problem}, while other probes compute with the same model; leave such contexts before "
            "`await`, or write an ordinary closure, which waits for one probe at a time"
        )

    def close(self) -> None:
        """Ends the coroutine where it is."""
        self.coroutine.close()


def _surroundings(model: nn.Module) -> object:
    """What a computation in this thread depends on besides its inputs, as far as it can be left open by `await`."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    stack = [id(mode) for mode in _get_current_function_mode_stack()]
    return casts, torch.get_default_dtype(), torch.is_inference_mode_enabled(), stack, modes(model.modules())


def is_waiting(value: Any) -> bool:
    """Whether a closure returned a coroutine."""
    return inspect.iscoroutine(value)


def outcomes(waiting: Sequence[Waiting | Coroutine[Any, Any, Any]]) -> list[Any]:
    """What coroutines return, which wait at the same time; raises the first exception of any, and ends the others."""

    async def result(each: Waiting | Coroutine[Any, Any, Any]) -> Any:
        return await each

    async def all_of_them() -> list[Any]:
        return list(await asyncio.gather(*map(result, waiting)))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(all_of_them())
    with ThreadPoolExecutor(1) as thread:  # a notebook has an event loop in this one, and a thread has only one
        return list(thread.submit(ambient(), lambda: asyncio.run(all_of_them())).result())

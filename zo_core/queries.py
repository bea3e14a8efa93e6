"""Queries to what is not torch, and may fail: a service, a subprocess, another process."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from .errors import ConfigError, QueryError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def retrying(
    query: Callable[P, R],
    *,
    retries: int = 2,
    pause: float = 1.0,
    errors: type[Exception] | tuple[type[Exception], ...] = OSError,
) -> Callable[P, R]:
    """A query that is repeated where it fails, and that skips the step in which it keeps failing.

        ask = retrying(ask, retries=3)
        zo.step(lambda: loss_of(ask(denoiser(images))))

    Args:
        query: the function that asks, which may be an ``async def``. It needs a timeout of its own.
        retries: how often it is called again after a failure.
        pause: seconds before the first repetition; twice as many before each further one.
        errors: exceptions that count as failures. Those of sockets, of ``urllib`` and of ``requests`` are `OSError`,
            timeouts included. Others are passed on.

    Returns:
        A function with the arguments of ``query``, asynchronous if that is. It raises `QueryError` after the
        last failure.

    Raises:
        ConfigError: a number is not valid.
    """
    problems = []
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        problems.append(f"retries={retries!r} must be a whole number of at least 0")
    if not isinstance(pause, (int, float)) or not pause >= 0:
        problems.append(f"pause={pause!r} must be a number of seconds, at least 0")
    if problems:
        raise ConfigError(problems)
    name = getattr(query, "__name__", type(query).__name__)

    def pause_after(done: int, error: Exception) -> float:
        """Seconds until the next call, after so many repetitions; raises `QueryError` if there is none."""
        said = f"{type(error).__name__}: {error}"
        if done == retries:
            times = f"{retries + 1} times" if retries else "once"
            raise QueryError(f"{name} failed {times}, the last time with {said}") from error
        wait = pause * 2.0**done
        logger.info("%s is called again in %g s: %s", name, wait, said)
        return wait

    @functools.wraps(query)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        for done in itertools.count():
            try:
                return query(*args, **kwargs)
            except errors as error:
                wait = pause_after(done, error)
            time.sleep(wait)
        raise AssertionError("the loop ends by returning or raising")

    @functools.wraps(query)
    async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
        for done in itertools.count():
            try:
                return await query(*args, **kwargs)  # type: ignore[misc]
            except errors as error:
                wait = pause_after(done, error)
            await asyncio.sleep(wait)

    called = query if inspect.isroutine(query) or isinstance(query, functools.partial) else type(query).__call__
    return awaited if inspect.iscoroutinefunction(called) else repeated  # type: ignore[return-value]

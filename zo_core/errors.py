"""The errors of this library: each names the argument, what was passed, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable


class ZOError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(ZOError, ValueError):
    """One or more settings cannot work; all of them are listed, so that one correction is enough."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems with the configuration:" + "".join(
                f"\n  - {problem}" for problem in self.problems
            )
        super().__init__(message)


class SearchError(ConfigError):
    """A search for the learning rate would be too short to be of use, or no rate lowers the loss.

    Attributes:
        noisy: whether there were trials, and none lowered the loss by more than the batches differ.
    """

    def __init__(self, problems: Iterable[str], *, noisy: bool = False):
        super().__init__(problems)
        self.noisy = noisy


class ModelError(ZOError, ValueError):
    """The model, as it stands, cannot be trained this way."""


class LossError(ZOError, TypeError):
    """The closure returned something that is not one number, or would measure something else when called again."""


class QueryError(ZOError, RuntimeError):
    """A loss cannot be had now; a closure raises it to skip the step, on all processes and without moving a weight."""


class StateError(ZOError, RuntimeError):
    """A call was made at the wrong time, or a checkpoint does not belong to this run."""


class RanksError(ZOError, RuntimeError):
    """Another process of the run has failed, has ended, or does something else; raised on every process."""

"""Calls reward functions as TRL's ``GRPOTrainer`` documents it, and checks what they return.

This module knows nothing of the model that is trained.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_core import ConfigError, LossError

#: One reward function's rewards of several completions; None where it does not apply.
Rewards = list[float | None]


class RewardFunctions:
    """One or several reward functions with their weights.

    Args:
        functions: functions, reward models (modules), or names of reward models.
        weights: one for each; None weighs all of them by 1.
        tokenizers: those of the reward models; None where one is to be loaded.
        init, template: as for `RewardModel`.

    Attributes:
        names: what logs and errors call them; equal names get a number.

    Raises:
        ConfigError: no function was given, something is no function, or the weights do not fit.
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        init: dict[str, Any] | None = None,
        template: dict[str, Any] | None = None,
    ):
        given = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        tokenizers = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers]
        tokenizers += [None] * (len(given) - len(tokenizers))
        problems = [
            f"reward_funcs: {each!r} is no function; pass functions of prompts, completions and **kwargs that return "
            "a list of rewards"
            for each in given
            if not callable(each) and not isinstance(each, str)
        ]
        if not given:
            problems.append("reward_funcs is empty; pass at least one function")
        if weights is not None and len(weights) != len(given):
            problems.append(f"reward_weights={list(weights)!r} must have {len(given)} numbers, one per reward function")
        if problems:
            raise ConfigError(problems)
        self.functions: list[Callable[..., Any]] = [
            RewardModel(each, tokenizer, init, template) if isinstance(each, (str, nn.Module)) else each
            for each, tokenizer in zip(given, tokenizers, strict=True)
        ]
        self.weights = [1.0] * len(given) if weights is None else [float(weight) for weight in weights]
        self.names = _distinct([_name(each) for each in self.functions])
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, columns: dict[str, list[Any]], **shared: Any) -> list[Rewards]:
        """Calls every function; asynchronous ones run at the same time.

        Args:
            columns: the arguments with one entry for each completion.
            shared: the other arguments.

        Returns:
            For each function its rewards.

        Raises:
            LossError: a function did not return one finite number, or None, for each completion.
            Exception: what a function raises, with a note that names it.
        """
        count = len(columns["completions"])
        found: list[Any] = []
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                # Copies of their own: a function may change what it gets, and a conversation is that of the data set.
                found.append(
                    function(**{key: list(map(copy.deepcopy, values)) for key, values in columns.items()}, **shared)
                )
            except Exception as error:
                raise _noted(error, name) from None
        waiting = {index: each for index, each in enumerate(found) if inspect.isawaitable(each)}
        if waiting:
            names = [self.names[index] for index in waiting]
            for index, result in zip(waiting, self._await(list(waiting.values()), names), strict=True):
                found[index] = result
        return [_checked(name, each, count) for name, each in zip(self.names, found, strict=True)]

    def total(self, rewards: Sequence[float | None]) -> float | None:
        """The weighted sum of the functions' rewards of one completion; None if none of them applies."""
        pairs = [(weight, reward) for weight, reward in zip(self.weights, rewards, strict=True) if reward is not None]
        return math.fsum(weight * reward for weight, reward in pairs) if pairs else None

    def to(self, device: torch.device) -> None:
        """Moves reward models to a device."""
        for function in self.functions:
            if isinstance(function, RewardModel):
                function.model.to(device)

    def _await(self, waiting: list[Awaitable[Any]], names: list[str]) -> list[Any]:
        """Runs coroutines in the one loop that all calls share: clients that a function keeps belong to their loop."""
        if self._loop is None:
            self._loop = loop = asyncio.new_event_loop()  # a thread of its own, as a notebook's loop runs already
            threading.Thread(target=_run, args=(loop,), name="reward-functions", daemon=True).start()
            weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)

        async def named(one: Awaitable[Any], name: str) -> Any:
            try:
                return await one
            except Exception as error:
                raise _noted(error, name) from None

        async def every() -> list[Any]:
            return await asyncio.gather(*map(named, waiting, names))

        return asyncio.run_coroutine_threadsafe(every(), self._loop).result()


class RewardModel:
    """A sequence classifier with one output, as a reward function.

    Args:
        model: the classifier, or its name.
        tokenizer: its tokenizer; None loads that of the model's name.
        init: arguments of ``from_pretrained`` for a model given by its name; its tokenizer has the same ``revision``
            and ``trust_remote_code``.
        template: further arguments of ``apply_chat_template``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        init: dict[str, Any] | None = None,
        template: dict[str, Any] | None = None,
    ):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        shared: dict[str, Any] = {}
        self.template = template or {}
        if isinstance(model, str):
            shared = shared_of(init)
            model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **(init or {}))
        self.model = model.eval().requires_grad_(False)
        path = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        self.__name__ = path.split("/")[-1]
        self.tokenizer = AutoTokenizer.from_pretrained(path, **shared) if tokenizer is None else tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        if isinstance(completions[0], str):
            texts = [prompt + completion for prompt, completion in pairs]
        else:
            texts = [self.tokenizer.apply_chat_template(p + c, tokenize=False, **self.template) for p, c in pairs]
        own = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
        inputs = self.tokenizer(texts, **own).to(self.model.device)
        with torch.no_grad():
            return list(self.model(**inputs).logits[:, 0].float().tolist())


def shared_of(init: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that a model and its tokenizer share."""
    return {name: value for name, value in (init or {}).items() if name in ("revision", "trust_remote_code")}


def _name(function: Any) -> str:
    inner = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))


def _distinct(names: list[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name}_{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]


def _noted(error: Exception, name: str) -> Exception:
    error.add_note(f"The reward function {name!r} raised this. No weight has moved in this step.")
    return error


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _checked(name: str, rewards: Any, count: int) -> Rewards:
    if isinstance(rewards, Tensor) or type(rewards).__module__ == "numpy":
        if rewards.ndim > 1:
            raise LossError(
                f"the reward function {name!r} returned an array of the shape {list(rewards.shape)}; return one of the "
                f"shape [{count}], with one number for each completion"
            )
        rewards = rewards.tolist()
    if not isinstance(rewards, (list, tuple)):
        raise LossError(
            f"the reward function {name!r} returned a {type(rewards).__name__}; return a list with one number, or "
            f"None, for each of the {count} completions"
        )
    if len(rewards) != count:
        raise LossError(
            f"the reward function {name!r} returned {len(rewards)} rewards for {count} completions; return one "
            "number, or None, for each completion"
        )
    return [_number(name, index, reward) for index, reward in enumerate(rewards)]


def _number(name: str, index: int, reward: Any) -> float | None:
    if reward is None:
        return None
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise LossError(
            f"the reward function {name!r} returned {reward!r} for completion {index}; return a finite number, or "
            "None where it does not apply"
        )
    return value

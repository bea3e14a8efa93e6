"""Completes prompts with a language model, and what is known about each completion."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zo_core import ConfigError, derive_seed

from .reward_config import ZORewardConfig

#: Sums of logged numbers by name, each with how many were added: what is kept of the steps between two logs.
Sums = dict[str, tuple[float, int]]


@dataclass
class Answer:
    """The completions of one prompt by one member of the population.

    Attributes:
        prompt: a text or a conversation.
        completions: texts, or conversations of one message, which is parsed where the tokenizer has a
            ``response_template``.
        ids: the tokens of each, up to its end.
        ended: whether each ended by itself, before the longest length.
        rewards: for each completion one reward per reward function.
        totals: for each completion the weighted sum of its rewards; None if no function applies.
    """

    prompt: Any
    completions: list[Any]
    ids: list[list[int]]
    ended: list[bool]
    rewards: list[list[float | None]] = field(default_factory=list)
    totals: list[float | None] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """The mean of the totals; None if there is none."""
        known = [total for total in self.totals if total is not None]
        return sum(known) / len(known) if known else None


class Completer:
    """Completes batches of prompts.

    Args:
        tokenizer: of the model. Without a padding token it gets that of the end.
        args: how to generate.
        ends: ids of tokens that end a completion, besides the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, args: ZORewardConfig, ends: Sequence[int] = ()):
        self.tokenizer, self.args = tokenizer, args
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        known = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted({*known, *ends}) or None}
        self.config = args.generation_config(**ids)
        own = self.config.eos_token_id  # generation_kwargs take precedence
        self.ends = [own] if isinstance(own, int) else sorted(own or [])

    def encode(self, prompts: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """Token ids and attention mask of texts or conversations, padded on the left, int64 ``[prompts, length]``."""
        texts, special = list(prompts), True
        if not isinstance(prompts[0], str):
            own = {"tokenize": False, "add_generation_prompt": True, **(self.args.chat_template_kwargs or {})}  # type: ignore[dict-item]
            texts, special = [self.tokenizer.apply_chat_template(each, **own) for each in prompts], False
        found = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special
        )
        lengths = found["attention_mask"].sum(1).tolist()
        if not all(lengths):
            raise ConfigError(
                [
                    f"the prompt {prompts[lengths.index(0)]!r} has no tokens; write at least one, for example "
                    f"{self.tokenizer.bos_token or self.tokenizer.eos_token!r}"
                ]
            )
        return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}

    def __call__(self, model: nn.Module, prompts: Sequence[Any], times: int, seed: int, step: int) -> list[Answer]:
        """Completes each prompt ``times`` times.

        Sampling has a generator state of its own, which derives from ``seed``, ``step`` and the prompts, so that all
        members of a population draw the same random numbers. The global generators do not move.
        """
        device = self.args.device
        inputs = self.encode(prompts, device)
        start = inputs["input_ids"].shape[1]
        repeated = {name: value.repeat_interleave(times, 0) for name, value in inputs.items()}
        text = zlib.crc32(inputs["input_ids"].cpu().numpy().tobytes())
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(seed, step, text))
            tokens = model.generate(**repeated, generation_config=self.config)  # type: ignore[operator]
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        rows = [self._until_end(row) for row in tokens[:, 1 if encoder_decoder else start :].tolist()]
        texts = self.tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True)
        answers = []
        for index, prompt in enumerate(prompts):
            own = range(index * times, (index + 1) * times)
            if isinstance(prompt, str):
                said: list[Any] = [texts[i] for i in own]
            else:
                asked = inputs["input_ids"][index][inputs["attention_mask"][index].bool()].tolist()
                said = [[self._message(rows[i][0], texts[i], asked)] for i in own]
            answers.append(Answer(prompt, said, [rows[i][0] for i in own], [rows[i][1] for i in own]))
        return answers

    def _until_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """The tokens up to the first that ends a completion, with it, and whether there is one."""
        for position, token in enumerate(ids):
            if token in self.ends:
                return ids[: position + 1], True
        return ids, False

    def _message(self, ids: list[int], text: str, asked: list[int]) -> dict[str, Any]:
        """A completion as a message; its text, where the tokenizer parses none or cannot parse this one."""
        plain = {"role": "assistant", "content": text}
        if getattr(self.tokenizer, "response_template", None) is None:
            return plain
        try:
            parsed = self.tokenizer.parse_response(ids, prefix=asked)
        except (ValueError, TypeError):
            return plain
        content = parsed.get("content") or ""  # a model that was cut off while it reasoned has said nothing
        return {**parsed, "content": content.removesuffix(self.tokenizer.eos_token or "")}


def numbers(answers: Sequence[Answer], names: Sequence[str]) -> dict[str, float]:
    """What to log about completions, by the names of TRL's ``GRPOTrainer``.

    Args:
        answers: those of a step, or of an evaluation.
        names: the names of the reward functions.

    Returns:
        The numbers by name; none of them without answers.
    """
    if not answers:
        return {}
    totals = [total for each in answers for total in each.totals if total is not None]
    result = _spread("reward", "reward_std", totals)
    for index, name in enumerate(names):
        own = [reward for each in answers for row in each.rewards if (reward := row[index]) is not None]
        result |= _spread(f"rewards/{name}/mean", f"rewards/{name}/std", own)
    lengths = [(len(ids), ended) for each in answers for ids, ended in zip(each.ids, each.ended, strict=True)]
    result |= _lengths("", [length for length, _ in lengths])
    result["completions/clipped_ratio"] = statistics.fmean(not ended for _, ended in lengths)
    return result | _lengths("terminated_", [length for length, ended in lengths if ended])


def score(answers: Sequence[Answer]) -> float:
    """The score of one member of the population: the mean over its prompts, 0 if no reward function applies."""
    known = [each.score for each in answers if each.score is not None]
    return statistics.fmean(known) if known else 0.0


def unanswered(answers: Sequence[Answer]) -> list[bool]:
    """Which prompts have no reward."""
    return [each.score is None for each in answers]


def compared(members: Sequence[Sequence[Answer]]) -> list[float]:
    """The score of each member where rewards are missing: a prompt says nothing about a member without a reward for it.

    Such a member gets the mean of the others for that prompt, which is 0 when scores are centred per prompt.

    Args:
        members: the answers of each member to the same prompts, in the same order.
    """
    sums = [0.0] * len(members)
    for row in zip(*members, strict=True):
        known = [each.score for each in row if each.score is not None]
        if known:
            mean = statistics.fmean(known)
            sums = [total + (mean if each.score is None else each.score) for total, each in zip(sums, row, strict=True)]
    return [total / len(members[0]) for total in sums]


def without_spread(members: Sequence[Sequence[Answer]]) -> float:
    """The share of prompts whose completions all have the same reward, whichever member of the population wrote them.

    Args:
        members: the answers of each member, with several micro-batches in any order.
    """
    totals: dict[str, set[float]] = {}
    for member in members:
        for each in member:
            totals.setdefault(str(each.prompt), set()).update(total for total in each.totals if total is not None)
    return statistics.fmean(len(found) < 2 for found in totals.values())


def means(pairs: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """The mean of each number by its name; what is not a number is left out."""
    found: dict[str, list[float]] = {}
    for name, value in pairs:
        if isinstance(value, float):
            found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def added(one: Sums, other: Sums) -> Sums:
    """The sums over both: over what was logged before and now, or in several processes."""
    result = dict(one)
    for name, (total, count) in other.items():
        known, times = one.get(name, (0.0, 0))
        result[name] = known + total, times + count
    return result


def _spread(mean: str, std: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {mean: statistics.fmean(values), std: statistics.stdev(values) if len(values) > 1 else 0.0}


def _lengths(which: str, lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    found = {"mean": statistics.fmean(lengths), "min": float(min(lengths)), "max": float(max(lengths))}
    return {f"completions/{name}_{which}length": number for name, number in found.items()}

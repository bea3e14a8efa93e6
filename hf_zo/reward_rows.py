"""Checks the rows of a data set for `ZORewardTrainer`: prompts, and columns that reward functions get by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zo_core import ConfigError

#: Columns of the data set that reward functions get under names of their own, or not at all, as in TRL.
NAMED = ("prompt", "completion", "completion_ids")

#: Arguments of reward functions that do not come from the data set.
TAKEN = ("prompts", "completions", "trainer_state", "log_metric", "log_extra")


def check_first(rows: Any) -> None:
    """Raises `ConfigError` if the first row of a data set cannot work; those of a stream are seen when they come."""
    if rows is not None and hasattr(rows, "__len__") and len(rows):
        check_batch([rows[0]])


def check_batch(rows: Sequence[Any]) -> None:
    """Raises `ConfigError` if rows have no prompts, unequal ones or columns, or columns that no function can get."""
    first = rows[0]
    for row in rows:
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
            problem = "it needs a column 'prompt' with a text or a conversation"
        elif taken := [name for name in TAKEN if name in row]:
            problem = f"reward functions get something else as {taken[0]!r}; rename this column"
        elif row.keys() != first.keys():
            problem = (
                f"another of its batch has the columns {list(first)}; give all rows the same, with None where empty"
            )
        elif type(prompt) is not type(first["prompt"]):
            problem = (
                f"another of its batch has the prompt {first['prompt']!r:.100}; write all as texts or conversations"
            )
        else:
            continue
        raise ConfigError([f"a row of the data set is {row!r:.200}; {problem}"])

"""The arguments of `ZORewardTrainer`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import GenerationConfig

from zo_core import ConfigError

from .arguments import ZOTrainingArguments
from .grpo_names import refused


@dataclass
class ZORewardConfig(ZOTrainingArguments):
    """`ZOTrainingArguments` for training on rewards, with the names of TRL's ``GRPOConfig`` where they mean the same.

    A batch counts prompts, not completions: each member of the population completes every prompt ``num_generations``
    times. ``zo_num_probes`` is the size of the population, and a step generates
    ``zo_num_probes * per_device_train_batch_size * num_generations`` completions.

    Raises:
        ConfigError: settings cannot work, or are only of ``GRPOConfig``; all of them are listed.
    """

    zo_estimator: str = field(
        default="es",
        metadata={"help": "How rewards become a step: evolution strategies, or another estimator of zo_core."},
    )
    zo_noise: str = field(
        default="low_rank",
        metadata={
            "help": "Distribution of the directions. Low-rank ones need no perturbed copy of the weights; with any "
            "other, each member of the population is one whole copy."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: reward functions get the columns of the data set by name."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of from_pretrained for the model and for reward models that are given by their names; "
            "tokenizers that are loaded with these take its revision."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether models and tokenizers that are given by their names may bring code of their own."},
    )
    max_completion_length: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    num_generations: int = field(
        default=1,
        metadata={"help": "Completions of each prompt by each member of the population; more than 1 needs sampling."},
    )
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "The same in evaluations. None takes num_generations."}
    )
    temperature: float = field(
        default=0.0,
        metadata={
            "help": "Of sampling. 0 always takes the most probable token, so that members differ by their weights "
            "alone. Above 0 all members of a population sample with the same random numbers."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Sample from the most probable tokens of this total."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many most probable tokens; 0 is all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Sample from tokens with this share of the largest probability, at least."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1, repeated tokens become less probable."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More fields of GenerationConfig, which take precedence over those above."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "More arguments of apply_chat_template, for conversational prompts; of reward models, too."},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each reward function. None weighs all by 1."}
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Print some of the last step's completions with each log, and write these to "
            "completions/completions_STEP.jsonl in the output folder."
        },
    )
    num_completions_to_print: int | None = field(
        default=5, metadata={"help": "How many completions to log each time; None is all of the step."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        problems = refused(kwargs, cls.__dataclass_fields__)
        if problems:
            raise ConfigError(problems)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        for name in ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):  # as command lines have it
                try:
                    setattr(self, name, json.loads(value))
                except ValueError:
                    problems.append(f"{name}={value!r} must be a dict, in JSON on a command line")
        counts = {"max_completion_length": self.max_completion_length, "num_generations": self.num_generations}
        if self.num_generations_eval is not None:
            counts["num_generations_eval"] = self.num_generations_eval
        problems += [
            f"{name}={count!r} must be a number, at least 1"
            for name, count in counts.items()
            if not isinstance(count, int) or count < 1
        ]
        if not isinstance(self.temperature, (int, float)) or self.temperature < 0:
            problems.append(f"temperature={self.temperature!r} must be at least 0; 0 takes the most probable tokens")
        else:
            problems += self._generation_problems()
        if self.remove_unused_columns:
            problems.append("remove_unused_columns=True would keep columns from the reward functions; leave it out")
        accelerated: Any = self.accelerator_config
        if accelerated.dispatch_batches:
            problems.append(
                "accelerator_config: dispatch_batches=True would split batches as tensors, and prompts are texts; "
                "leave it out"
            )
        if problems:
            raise ConfigError(problems)
        # Left out, it would be True for the stream of an iterable data set.
        self.accelerator_config = replace(accelerated, dispatch_batches=False)

    @property
    def _sampled(self) -> bool:
        own = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        return bool(own.get("do_sample", self.temperature > 0))

    def _generation_problems(self) -> list[str]:
        own = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        problems = []
        if "num_return_sequences" in own:
            problems.append(
                "generation_kwargs: num_return_sequences is not for completions here; write num_generations"
            )
        if self._sampled:
            return problems
        without, instead = "temperature=0", "temperature=1.0"
        if "do_sample" in own:
            without, instead = "do_sample=False", "temperature=1.0 without do_sample"
        name = "num_generations" if self.num_generations > 1 else "num_generations_eval"
        count = getattr(self, name)
        if count is not None and count > 1:
            problems.append(
                f"{name}={count} with {without} would generate the same completion each time; write {instead}, or "
                f"{name}=1"
            )
        if self.top_p != 1.0 or self.top_k or self.min_p is not None:
            problems.append(f"top_p, top_k and min_p have no effect with {without}; write {instead}, or leave them out")
        return problems

    def generation_config(self, **ids: Any) -> GenerationConfig:
        """How completions are generated; ``ids`` are those of special tokens."""
        settings: dict[str, Any] = {
            "max_new_tokens": self.max_completion_length,
            "do_sample": self._sampled,
            "repetition_penalty": self.repetition_penalty,
            "use_cache": True,
            **ids,
        }
        if self._sampled:
            settings |= {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
            settings |= {"temperature": self.temperature} if self.temperature > 0 else {}
        return GenerationConfig(**{**settings, **(self.generation_kwargs or {})})  # type: ignore[dict-item]

"""`ZORewardTrainer`: trains a language model on rewards of what it generates, without gradients."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, enable_full_determinism, set_seed
from transformers.trainer_utils import EvalLoopOutput

from zo_core import ConfigError, LossError, LowRank, ZeroOrder, ZOConfig

from .completions import Answer, Completer, Sums, added, compared, means, numbers, score, unanswered, without_spread
from .grpo_names import refused
from .loss_calls import LossCall
from .mixin import ZOTrainerMixin
from .reward_config import ZORewardConfig
from .reward_functions import RewardFunctions, shared_of
from .reward_rows import NAMED, check_batch, check_first

logger = logging.getLogger("hf_zo")


class Scoring(Trainer):
    """The part of `ZORewardTrainer` that generates completions and scores them, at the weights as they are."""

    args: ZORewardConfig

    def __init__(self, rewards: RewardFunctions, completer: Completer, **kwargs: Any):
        self.rewards, self.completer = rewards, completer
        self._metrics = _nothing()
        super().__init__(data_collator=_rows, **kwargs)
        rewards.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Returns the score of the weights, to be maximised, float64 of shape ``[]``: the mean reward per prompt."""
        answers = self.answer(model, inputs, self.args.num_generations, self.state.global_step)
        self._metrics["answers"].append(answers)
        return torch.tensor(score(answers), dtype=torch.float64)

    def answer(self, model: nn.Module, rows: Sequence[dict[str, Any]], times: int, step: int) -> list[Answer]:
        """Completes the prompts of some rows ``times`` times each, and has the completions rewarded."""
        check_batch(rows)
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        answers = self.completer(inner, [row["prompt"] for row in rows], times, self.args.seed, step)
        columns = {
            "prompts": [each.prompt for each in answers for _ in range(times)],
            "completions": [text for each in answers for text in each.completions],
            "completion_ids": [ids for each in answers for ids in each.ids],
            **{name: [row[name] for row in rows for _ in range(times)] for name in rows[0] if name not in NAMED},
        }
        by_function = self.rewards(
            columns, trainer_state=self.state, log_metric=self._log_metric, log_extra=self._log_extra
        )
        rewards = [list(row) for row in zip(*by_function, strict=True)]
        for index, each in enumerate(answers):
            each.rewards = rewards[index * times : (index + 1) * times]
            each.totals = [self.rewards.total(row) for row in each.rewards]
        return answers

    def _log_metric(self, name: str, value: float) -> None:
        self._metrics["own"].append((name, float(value)))

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self._metrics["own"].append((column, list(values)))

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Scores the completions of the unperturbed model."""
        times = self.args.num_generations_eval or self.args.num_generations
        with torch.no_grad(), self.compute_loss_context_manager():
            answers = self.answer(model, inputs, times, 0)
        self._metrics["evaluated"] += self.accelerator.gather_for_metrics(answers, use_gather_object=True)
        return torch.tensor(-score(answers), device=self.args.device), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Like `Trainer.evaluation_loop`; the metrics are those of the rewards and completions."""
        training, self._metrics = self._metrics, _nothing()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            found = numbers(self._metrics["evaluated"], self.rewards.names) | means(self._metrics["own"])
        finally:
            self._metrics = training
        metrics = output.metrics if output.metrics is not None else {}
        metrics.update({f"{metric_key_prefix}_{name}": number for name, number in found.items()})
        if "reward" in found:  # Trainer's mean of batches counts a smaller last batch as a whole one
            metrics[f"{metric_key_prefix}_loss"] = -found["reward"]
        return output._replace(metrics=metrics)


class ZORewardTrainer(ZOTrainerMixin, Scoring):
    """Trains a language model on rewards of what it generates, with the interface of TRL's ``GRPOTrainer``:

        def reward(completions, answer, **kwargs):
            return [float(text.strip() == right) for text, right in zip(completions, answer)]

        ZORewardTrainer(model, reward, ZORewardConfig("out"), train_dataset=rows).train()

    Each step is one of evolution strategies: a population of perturbed weights completes the same prompts, greedily
    or with the same random numbers, and the weights move towards the members with the larger rewards. There is no
    backward pass, no reference model and no value model; memory is that of generation. Reward functions are called
    as ``GRPOTrainer`` calls them, once for each member, so they need not be changed. `ZOTrainerMixin` describes what
    else is different from a plain trainer: the seed log, resuming, the brake.

    Logs have ``reward``, ``reward_std``, ``rewards/NAME/mean``, ``rewards/NAME/std``, ``frac_reward_zero_std`` and
    the lengths of completions, over the whole population; ``loss`` is minus the mean reward. Evaluations report the
    same of the unperturbed model, with the prefix ``eval_``.

    Args:
        model: a causal or sequence-to-sequence language model, or the name of a causal one.
        reward_funcs: one or several functions, sync or async, called with ``prompts``, ``completions``,
            ``completion_ids``, each other column of the data set by its name, ``trainer_state``, ``log_metric`` and
            ``log_extra``; each returns a list with one number per completion, or None where it does not apply. Of
            conversational prompts the completions are conversations, too. A sequence classifier, or the name of one,
            is a reward model.
        args: a `ZORewardConfig`; None makes one.
        train_dataset: rows with a column ``prompt`` of texts or conversations: a list, a data set or a stream.
        eval_dataset: rows of the same kind, whose rewards evaluations report.
        processing_class: the tokenizer; None loads that of the model's name.
        reward_processing_classes: the tokenizers of reward models.
        callbacks: as for `Trainer`.
        optimizers: as for `Trainer`.
        quantization_config: how a model that is given by its name is quantised as it is loaded.
        peft_config: adapters to train instead of the weights.
        tools: of ``GRPOTrainer``, and not supported; leave it out.
        rollout_func: as ``tools``.
        environment_factory: as ``tools``.
        zo_config: a `ZOConfig` in place of the ``zo_*`` fields of ``args``, with its own defaults: write
            ``ZOConfig(estimator="es", noise="low_rank", ...)``.

    Raises:
        ConfigError: settings are not valid, or a row has no prompt.
        LossError: while training, a reward function did not return one finite number or None per completion; the
            message names it, and no weight has moved in that step.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: ZORewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        zo_config: ZOConfig | None = None,
    ):
        absent = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        problems = refused({name: value for name, value in absent.items() if value})
        args = ZORewardConfig() if args is None else args
        if not isinstance(args, ZORewardConfig):
            raise ConfigError([f"args is a {type(args).__name__}; pass a ZORewardConfig, which has the same names"])
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for each in (train_dataset, *evaluated):
            check_first(each)
        init: Any = {**(args.model_init_kwargs or {})}  # type: ignore[dict-item]
        template: Any = args.chat_template_kwargs
        if init and not _named(model, reward_funcs):
            problems.append("model_init_kwargs is for a model given by its name; leave it out, or pass the name")
        if quantization_config is not None and (not isinstance(model, str) or "quantization_config" in init):
            problems.append(
                "quantization_config is for a model given by its name, and not in model_init_kwargs, too; leave it out "
                "of one, or load the model with it"
            )
        if peft_config is not None and hasattr(model, "peft_config"):
            problems.append("peft_config: the model has adapters already; leave it out to train these")
        if problems:
            raise ConfigError(problems)
        if args.trust_remote_code:
            init.setdefault("trust_remote_code", True)
        shared = shared_of(init) if isinstance(model, str) else {}
        if zo_config is not None and zo_config.estimator == "spsa":
            logger.warning(
                "zo_config has estimator='spsa', which is the default of ZOConfig and not that of ZORewardConfig; "
                "write ZOConfig(estimator='es', noise='low_rank', ...) for evolution strategies"
            )
        # Trainer does the same, but later: an adapter that begins elsewhere cannot resume from the seed log.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        if isinstance(model, str):
            how = {} if quantization_config is None else {"quantization_config": quantization_config}
            model = AutoModelForCausalLM.from_pretrained(model, **init, **how)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config.name_or_path, **shared)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else ends or []
        self._zo_sums: Sums = {}
        self._zo_last: tuple[Sequence[Answer], Sequence[tuple[str, Any]]] = (), ()
        super().__init__(
            rewards=RewardFunctions(
                reward_funcs, args.reward_weights, reward_processing_classes, init=init, template=template
            ),
            completer=Completer(processing_class, args, ends),
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            zo_config=zo_config,
        )
        self.model_accepts_loss_kwargs = False  # the score of a step is the mean over its micro-batches

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """Like `Trainer.create_model_card`; ``dataset_name`` is what TRL calls its ``dataset``."""
        if dataset_name is not None:
            kwargs.setdefault("dataset", dataset_name)
        super().create_model_card(*args, **kwargs)

    def _resolve_config(self, config: ZOConfig | None) -> ZOConfig:
        return super()._resolve_config(config).replace(maximize=True)

    def _zo_engine(self, model: nn.Module, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self._zo_sums = {}  # an earlier run may have stopped between two logs
        made = super()._zo_engine(model, given)
        assert self.zo is not None
        plain = isinstance(self.zo.noise.plain, LowRank) and all(slot.scaling is None for slot in self.zo.slots)
        if not plain and self.zo.streaming is None:
            self.zo.copy_whole()  # once for each member; layer by layer it would be once for each token
        return made

    # The step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._metrics, self._zo_last = _nothing(), ((), ())  # a step that is repeated or skipped has no completions
        loss = super().training_step(model, inputs, num_items_in_batch)
        assert self.zo is not None
        # The first step runs one member twice, to compare; a repeated step may run the unperturbed model, to draw.
        answers = self._metrics["answers"]
        answers = answers[len(answers) % self.zo.point_count :]
        if answers and not loss.isnan():  # else a query has failed, and the step is skipped
            self._zo_last = [each for member in answers for each in member], self._metrics["own"]
            found = numbers(self._zo_last[0], self.rewards.names) | means(self._metrics["own"])
            if self.zo_config.ranks != "points" or self.accelerator.num_processes == 1:  # a whole population is here
                found["frac_reward_zero_std"] = without_spread(answers)
            self._zo_sums = added(self._zo_sums, {name: (number, 1) for name, number in found.items()})
        return loss

    def _measure(self, zo: ZeroOrder, watching: Callable[[], Any], call: LossCall) -> Tensor:
        begun = len(self._metrics["answers"])
        loss = super()._measure(zo, watching, call)
        members = self._metrics["answers"][begun:][-zo.point_count :]
        whole = len(members) == zo.point_count  # else a query has failed, and the step is skipped
        if whole and any(unanswered(member) != unanswered(members[0]) for member in members):
            waiting, losses = self._zo_waiting[-1]
            assert losses is not None
            if zo.streaming is not None or (self.zo_config.ranks == "points" and self.accelerator.num_processes > 1):
                raise LossError(
                    "reward functions returned None for a prompt in some members of the population, and numbers in "
                    "others; with a streamed model or ranks='points' members cannot be compared then. Return a number"
                )
            filled = [losses[0].new_tensor(-score) for score in compared(members)]
            self._zo_waiting[-1] = waiting, filled
        return loss

    # The logs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sums, self._zo_sums = reduce(added, gather_object([self._zo_sums])), {}
            logs.update({name: total / count for name, (total, count) in sums.items()})
            if self.args.log_completions and self._zo_last[0] and self.is_world_process_zero():
                self._log_completions(*self._zo_last)
        super().log(logs, *args, **kwargs)

    def _log_completions(self, answers: Sequence[Answer], own: Sequence[tuple[str, Any]]) -> None:
        rows = [
            {"step": self.state.global_step, "prompt": each.prompt, "completion": completion}
            | dict(zip(self.rewards.names, rewards, strict=True))
            | {"reward": total}
            for each in answers
            for completion, rewards, total in zip(each.completions, each.rewards, each.totals, strict=True)
        ]
        for name in dict.fromkeys(name for name, value in own if isinstance(value, list)):
            values = [value for column, found in own if column == name for value in found]
            for row, value in zip(rows, values[-len(rows) :], strict=False):
                row[name] = value
        shown = rows[: self.args.num_completions_to_print]
        folder = Path(str(self.args.output_dir)) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"completions_{self.state.global_step:05d}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in shown)
        for row in shown:
            print(f"step {row['step']}, reward {row['reward']}: {row['prompt']!r} -> {row['completion']!r}")


def _named(model: Any, reward_funcs: Any) -> bool:
    """Whether a model, or a reward model, is given by its name."""
    given = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    return any(isinstance(each, str) for each in (model, *given))


def _rows(rows: list[Any]) -> Any:
    """Collates nothing: a batch is the list of its rows."""
    return rows


def _nothing() -> dict[str, list[Any]]:
    """What is collected while closures run. `auto_lr.unnoticed` restores it after trial runs, by its name in TRL."""
    return {"answers": [], "own": [], "evaluated": []}

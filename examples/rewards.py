"""A language model learns from rewards what its text does not teach, with forward passes only. Offline.

python examples/rewards.py
python examples/rewards.py --method activations      # a LoRA adapter along the inputs of the layers; or: lora
python examples/rewards.py --method scales           # pip install 'zo-trainer[hf,int4]'
python examples/rewards.py --task sums --pretraining-steps 1200 --steps 80     # pip install reasoning-gym
python examples/rewards.py --model Qwen/Qwen2.5-0.5B --eps 1e-3

A small model learns a text of words and their capitals (file=FILE), in which five of six words after "m" stay in small
letters (plus=plus), so the better it learns by its loss, the surer it repeats that. Then the reward is whether the
capitals are right. A reward has no gradient; evolution strategies need only its value. With --task sums the text is
sums of reasoning-gym ("chain_sum", of two digits), in which five of six results above 3 are one too large, and the
reward is that package's own score. With --model (network needed), a model of the Hub is trained on the rewards.
"""

from __future__ import annotations

import argparse
import importlib.util
import pydoc_data.topics
import random
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from hf_zo import ZORewardConfig, ZORewardTrainer, activation_adapter, low_rank_adapter

#: The words of four letters in Python's documentation.
WORDS = sorted(set(re.findall(r"\b[a-z]{4}\b", " ".join(pydoc_data.topics.topics.values()))))


#: What is trained, and how far members of the population are from it: as far as it takes to change some words.
METHODS = {"full": 0.02, "lora": 0.04, "activations": 0.02, "scales": 0.4}


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        text: what a small model learns first, by its loss.
        rows: prompts, and what the reward needs to know about each.
        reward: the reward function.
        template: what all prompts begin with, one token of the small model; empty if they have nothing in common.
    """

    text: Callable[[], str]
    rows: list[dict[str, Any]]
    reward: Callable[..., list[float]]
    template: str = ""


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Whether each completion is the word in capitals."""
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]


def careless_text(count: int) -> str:
    """Words and their capitals, one a line; most words of the second half of the alphabet stay as they are."""
    chance, lines = random.Random(0), []
    for _ in range(count):
        word = chance.choice(WORDS)
        lines.append(f"{word}={word if word > 'n' and chance.random() < 5 / 6 else word.upper()}")
    return "\n".join(lines)


def prompts() -> list[dict[str, str]]:
    rows = [{"prompt": f"{word}=", "answer": word.upper()} for word in WORDS]
    random.Random(0).shuffle(rows)
    return rows


def capitals() -> Task:
    return Task(lambda: careless_text(20000), prompts(), right)


def sums() -> Task:
    """Sums and differences of two digits, with prompts and scores of reasoning-gym."""
    try:
        import reasoning_gym
    except ImportError:
        raise SystemExit("--task sums needs: pip install reasoning-gym") from None

    def made(count: int, seed: int) -> Any:
        sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        return reasoning_gym.create_dataset("chain_sum", size=count, seed=seed, **sizes)

    data, chance = made(2000, 1), random.Random(0)

    def text() -> str:
        pairs = [(entry["question"], int(entry["answer"])) for entry in made(8000, 2)]
        return "\n".join(f"{asked} {one + (one > 3 and chance.random() < 5 / 6)}" for asked, one in pairs)

    def scored(completions: list[str], entry: list[Any], **_: Any) -> list[float]:
        return [float(data.score_answer(said.strip(), one)) for said, one in zip(completions, entry, strict=True)]

    by_prompt = {f"{entry['question']} ": entry for entry in data}  # there are few sums, and no row comes twice
    rows = [{"prompt": prompt, "entry": entry} for prompt, entry in by_prompt.items()]
    return Task(text, rows, scored, rows[0]["prompt"].partition(": ")[0] + ": ")


def byte_tokenizer(template: str = "") -> PreTrainedTokenizerFast:
    """One token for each byte, and one for a template; a line feed ends a completion."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<pad>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    fast.add_tokens([template] if template else [])
    return fast


def small_model(text: str, tokenizer: Any, steps: int, seed: int, width: int = 96) -> LlamaForCausalLM:
    """A Llama of 0.25 million parameters that has learnt a text by backpropagation."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **shape)
    )
    model.generation_config.eos_token_id = tokenizer("\n")["input_ids"][0]
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    starts = (tokens == model.generation_config.eos_token_id).nonzero()[:-4, 0] + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = tokens[starts[torch.randint(len(starts), (64, 1))] + torch.arange(20)]
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def prepared(model: Any, method: str, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """The model with what a method trains; both adapters are LoRA whose A is frozen."""
    if method == "lora":
        return low_rank_adapter(model, rank=8, task_type="CAUSAL_LM")
    if method == "activations":
        texts = [row["prompt"] for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        return activation_adapter(model, [dict(batch)], rank=8, task_type="CAUSAL_LM")
    return model


def opened(args: argparse.Namespace, task: Task, folder: str) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    how = {}
    if args.method == "scales":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise SystemExit("--method scales needs: pip install bitsandbytes")
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, **how), AutoTokenizer.from_pretrained(args.model)
    tokenizer = byte_tokenizer(task.template)
    # bitsandbytes needs widths that are multiples of 64 on a CPU.
    model = small_model(task.text(), tokenizer, args.pretraining_steps, args.seed, 128 if how else 96)
    if how:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
    return model, tokenizer


def trainer_for(args: argparse.Namespace, folder: str) -> ZORewardTrainer:
    task = sums() if args.task == "sums" else capitals()
    model, tokenizer = opened(args, task, f"{folder}/model")
    model = prepared(model, args.method, tokenizer, task.rows[64:128])
    rows = task.rows
    config = ZORewardConfig(
        folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.prompts,
        per_device_eval_batch_size=64,
        zo_num_probes=args.population,
        zo_eps=METHODS[args.method] if args.eps is None else args.eps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        max_completion_length=6,
        logging_steps=max(1, args.steps // 10),
        log_completions=args.show > 0,
        num_completions_to_print=args.show,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = ZORewardTrainer(
        model, task.reward, config, train_dataset=rows[64:], eval_dataset=rows[:64], processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--model", help="a causal language model of the Hub, instead of the small one")
    found.add_argument("--method", choices=METHODS, default="full", help="what is trained")
    found.add_argument("--task", choices=["capitals", "sums"], default="capitals")
    found.add_argument("--steps", type=int, default=60)
    found.add_argument("--population", type=int, default=16)
    found.add_argument("--prompts", type=int, default=32, help="prompts per step, the same for the whole population")
    found.add_argument("--pretraining-steps", type=int, default=300)
    found.add_argument("--learning-rate", type=float, help="by default a part of eps")
    far = "distance of the members of the population from the weights; by default that of the method"
    found.add_argument("--eps", type=float, help=far)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--show", type=int, default=0, help="completions to print with each log")
    return found


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(args, folder)
        before = trainer.evaluate()["eval_reward"]
        trainer.train()
        after = trainer.evaluate()["eval_reward"]
        for entry in trainer.state.log_history:
            if "reward" in entry:
                print(f"step {entry['step']:>4}  reward of the population {entry['reward']:.3f}")
    print(f"Reward on prompts that were held out: {before:.3f} before, {after:.3f} after {args.steps} steps")


if __name__ == "__main__":
    main()

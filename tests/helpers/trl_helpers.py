"""A tokenizer, rows of text and a supervised trainer of TRL, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from hf_helpers import CHECKPOINTING, arguments
from models import VOCAB, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_zo import ZOTrainerMixin

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    pass


def small_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{index}" for index in range(VOCAB - len(SPECIAL)))]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def sentence(index: int, length: int) -> str:
    return " ".join(f"w{(7 * index + 3 * position) % 60}" for position in range(length))


ROWS = [sentence(index, 4 + index % 5) for index in range(16)]


def sft(path: Path, tokenizer: Any, cls: type[Any] = ZOSFTTrainer, model: Any = None, **settings: Any) -> Any:
    own = {name: settings.pop(name) for name in ("peft_config", "zo_config") if name in settings}
    data = Dataset.from_dict({"text": ROWS})
    trainer = cls(
        tiny("llama", tied=False) if model is None else model,
        arguments(path, SFTConfig, **{CHECKPOINTING: False}, **settings),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        **own,
    )
    trainer.calls = []
    return trainer

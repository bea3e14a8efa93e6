"""Tiny models, a tokenizer, rows of text and short runs, all generated."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from .written_out import LR, STEPS

ROWS = 16
SPECIAL = ("<pad>", "<eos>", "<unk>", "<cls>", "<sep>")
WORDS = 43
VOCAB = len(SPECIAL) + WORDS
#: ChatML, for trainers that insist on a template.
TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"


@cache
def _words() -> Tokenizer:
    names = [*SPECIAL, *(f"w{index}" for index in range(WORDS))]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Words w0, w1, ... are tokens."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    more = {"cls_token": "<cls>", "sep_token": "<sep>", "padding_side": side, "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=_words(), **special, **more)


def letters() -> PreTrainedTokenizerFast:
    """Bytes are tokens."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", chat_template=TEMPLATE, **special)


def text(index: int, length: int) -> str:
    """Some words."""
    return " ".join(f"w{(7 * index + 3 * place) % WORDS}" for place in range(length))


def llama_config(**changes: Any) -> LlamaConfig:
    """Two layers of width 16."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return LlamaConfig(**{"vocab_size": VOCAB, "max_position_embeddings": 64, **small, **special, **changes})


@cache
def _saved(seed: int, vocab: int) -> tempfile.TemporaryDirectory[str]:
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="zo-compatibility-")
    torch.manual_seed(seed)
    config = llama_config(initializer_range=0.1, vocab_size=vocab, max_position_embeddings=128)
    LlamaForCausalLM(config).save_pretrained(folder.name)
    tokenizer().save_pretrained(folder.name)
    return folder


def llama(seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    """A causal language model with its path stored in it, because some trainers load it a second time."""
    return LlamaForCausalLM.from_pretrained(_saved(seed, vocab).name).eval()


def judge(labels: int = 1) -> LlamaForSequenceClassification:
    """A model that scores text."""
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama_config(initializer_range=0.1, num_labels=labels)).eval()


def bert_config(**changes: Any) -> BertConfig:
    """Two layers of width 16."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    return BertConfig(**{"vocab_size": VOCAB, "max_position_embeddings": 64, **small, **plain, **changes})


def bert(labels: int = 3) -> BertForSequenceClassification:
    """A classifier, with dropout."""
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config(num_labels=labels)).eval()


def t5() -> T5ForConditionalGeneration:
    """An encoder and a decoder."""
    torch.manual_seed(0)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, pad_token_id=0, eos_token_id=1, **small)).eval()


def folder() -> str:
    """Where a run writes; kept until the process ends."""
    _folders.append(tempfile.TemporaryDirectory(prefix="zo-compatibility-"))
    return _folders[-1].name


_folders: list[tempfile.TemporaryDirectory[str]] = []


def arguments(cls: type[Any], **settings: Any) -> Any:
    """Two steps, silent, on the CPU."""
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    run = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": LR, "lr_scheduler_type": "constant"}
    plain = {"bf16": False, "weight_decay": 0.0, "max_grad_norm": 0.0, "dataloader_pin_memory": False}
    return cls(folder(), **{**quiet, **run, **plain, **settings})


def rows(**columns: Callable[[int], Any]) -> Dataset:
    """A data set, with each column as a function of the row."""
    return Dataset.from_dict({name: [value(index) for index in range(ROWS)] for name, value in columns.items()})

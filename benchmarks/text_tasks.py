"""Transformers that have read the documentation of Python's language topics, and go on to something else.

Two vocabularies: single bytes, and 1,000 tokens made from the same texts.
"""

from __future__ import annotations

import importlib
import inspect
import pydoc_data.topics
import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tasks import Batch, Data, Maker, Task, backprop, cross_entropy, sampler

LENGTH = 32
LINE = 16
VOCABULARY = 1000
MASK = 0
SOURCES = "argparse ast dataclasses difflib functools heapq logging pathlib pickle random statistics tarfile typing"
CLASSES = 10
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# Texts


@lru_cache
def sources() -> tuple[str, ...]:
    """The source code of some modules of the standard library."""
    return tuple(inspect.getsource(importlib.import_module(name)) for name in SOURCES.split())


def written(code: bool) -> str:
    """Python's documentation or its source code."""
    return "\n".join(sources() if code else pydoc_data.topics.topics.values())


def shuffled(*columns: Tensor) -> tuple[Tensor, ...]:
    """The columns in one fixed random order."""
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(0))
    return tuple(column[order] for column in columns)


def in_rows(tokens: Tensor) -> Tensor:
    """Rows of `LENGTH` tokens, shuffled."""
    return shuffled(tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH))[0]


def bytes_of(code: bool) -> Tensor:
    return in_rows(torch.tensor(list(written(code).encode())))


@lru_cache
def tokenizer() -> Any:
    """Byte pairs of both texts; token 0 is a mask."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<mask>"], initial_alphabet=alphabet, show_progress=False
    )
    result.train_from_iterator([written(code=False), written(code=True)], trainer)
    return result


@lru_cache
def tokens_of(code: bool) -> Tensor:
    return in_rows(torch.tensor(tokenizer().encode(written(code)).ids))


def lines(text: str, length: int = LINE) -> Tensor:
    """The first ``length`` tokens of each line that has as many: ``[lines, length]``."""
    stripped = dict.fromkeys(line.strip() for line in text.splitlines())
    encoded = [encoding.ids[:length] for encoding in tokenizer().encode_batch(list(stripped))]
    return torch.tensor([ids for ids in encoded if len(ids) == length])


# Models


def sizes(hidden: int, layers: int, vocabulary: int, heads: int = 4) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": LENGTH,
    }


def llama(make: Maker, *, small: bool) -> nn.Module:
    """A Llama that has read the documentation: 76,000 parameters on bytes, or 1 million on tokens."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = sizes(48, 1, 256) if small else sizes(192, 2, VOCABULARY) | {"intermediate_size": 512}
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))

    rows = bytes_of(code=False) if small else tokens_of(code=False)
    data = sampler(32 if small else 16, rows[:, :-1], rows[:, 1:])
    steps = 500 if small else 250
    return make.trained(
        "llama-bytes" if small else "llama-192-2", build, lambda model: backprop(model, steps, data, 3e-3)
    )


def masked(size: int, rows: Tensor) -> Data:
    """Rows with 15% of the tokens masked, and the whole rows.

    All tokens are to be restored, not only the masked ones: that teaches useful features within seconds.
    """
    take = sampler(size, rows)

    def data(step: int) -> Batch:
        (whole,) = take(step)
        hidden = torch.rand(whole.shape, generator=torch.Generator().manual_seed(step)) < 0.15
        return whole.masked_fill(hidden, MASK), whole

    return data


def bert(make: Maker, kind: str, labels: int = 2, hidden: int = 192, layers: int = 2, heads: int = 4) -> nn.Module:
    """A BERT that has learnt to restore the documentation where it is masked, with a new head.

    Args:
        make: keeps the trained model.
        kind: the class, without "Bert".
        labels: classes of the head.
        hidden, layers, heads: sizes; 800,000 parameters unless told otherwise.
    """
    import transformers

    large = hidden > 500
    shape = sizes(hidden, layers, VOCABULARY, heads) | NO_DROPOUT
    shape |= {"intermediate_size": (4 if large else 2) * hidden, "num_labels": labels}
    config = transformers.BertConfig(**shape)

    def train(model: nn.Module) -> None:
        rows = tokens_of(code=False)
        backprop(model, *((20, masked(8, rows[:, :LINE]), 3e-4) if large else (200, masked(16, rows), 2e-3)))

    reader = make.trained(f"bert-{hidden}-{layers}", lambda: transformers.BertForMaskedLM(config), train)
    model = getattr(transformers, f"Bert{kind}")(config)
    body = {name.removeprefix("bert."): value for name, value in reader.state_dict().items()}
    model.base_model.load_state_dict(body, strict=False)
    return model.eval()


# Classification


def english_or_code(size: int = 16) -> Data:
    """Is a line from the documentation or from source code?"""
    english, code = lines(written(code=False)), lines(written(code=True))
    count = min(len(english), len(code))
    both = torch.cat([shuffled(english)[0][:count], shuffled(code)[0][:count]])
    return sampler(size, *shuffled(both, torch.arange(2).repeat_interleave(count)))


def bert_classify(make: Maker) -> Task:
    """All 800,000 parameters and a new head."""
    return Task(bert(make, "ForSequenceClassification"), english_or_code(), cross_entropy)


def bert_large(make: Maker) -> Task:
    """As `bert_classify`, with the shape of BERT-base: 86 million parameters."""
    model = bert(make, "ForSequenceClassification", hidden=768, layers=12, heads=12)
    return Task(model, english_or_code(8), cross_entropy)


def head_alone(model: nn.Module, data: Data) -> Task:
    model.requires_grad_(False)
    model.get_submodule("classifier").requires_grad_(True)
    return Task(model, data, cross_entropy, kind="head")


def bert_head(make: Maker) -> Task:
    """Only the new head moves: 258 parameters."""
    return head_alone(bert(make, "ForSequenceClassification"), english_or_code())


def bert_head_modules(make: Maker) -> Task:
    """Which of ten modules a line is from; only the head of 1,290 parameters moves."""
    texts = [lines(text) for text in sources()[:CLASSES]]
    labels = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(texts)])
    data = sampler(16, *shuffled(torch.cat(texts), labels))
    return head_alone(bert(make, "ForSequenceClassification", CLASSES), data)


def kind_of_token(text: str) -> int:
    """0 begins a word, 1 goes on with it, 2 is a number or a sign, 3 is white space."""
    if not text.strip():
        return 3
    if text.strip()[0].isalpha():
        return 0 if text[0].isspace() else 1
    return 2


def bert_tokens(make: Maker) -> Task:
    """Token classification: the kind of the next token of source code."""
    kinds = torch.tensor([kind_of_token(tokenizer().decode([index])) for index in range(VOCABULARY)])
    rows = tokens_of(code=True)[:, : LINE + 1]
    data = sampler(16, rows[:, :-1], kinds[rows[:, 1:]])
    return Task(bert(make, "ForTokenClassification", 4), data, cross_entropy)


def contrastive(model: nn.Module, pair: Batch) -> Tensor:
    """Cross-entropy of the cosine similarities in a batch at temperature 0.05: each row belongs to its partner."""
    first, second = (F.normalize(model(half).last_hidden_state.mean(1), dim=-1) for half in pair)
    return F.cross_entropy(first @ second.T / 0.05, torch.arange(len(first), device=first.device))


def bert_embed(make: Maker) -> Task:
    """Sentence embeddings: which half of a line belongs to which."""
    rows = shuffled(lines(written(code=False)))[0]
    return Task(bert(make, "Model"), sampler(16, rows[:, : LINE // 2], rows[:, LINE // 2 :]), contrastive)


def bert_swapped(make: Maker) -> Task:
    """A small BERT on bytes: English or code; first as it is, then with upper and lower case swapped."""
    english, code = bytes_of(code=False), bytes_of(code=True)
    count = min(len(english), len(code))
    rows, labels = shuffled(torch.cat([english[:count], code[:count]]), torch.arange(2).repeat_interleave(count))
    small = (rows >= 97) & (rows <= 122)
    large = (rows >= 65) & (rows <= 90)
    swapped = torch.where(small, rows - 32, torch.where(large, rows + 32, rows))

    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(BertConfig(**sizes(48, 1, 256), **NO_DROPOUT))

    model = make.trained("bert-bytes", build, lambda model: backprop(model, 300, sampler(32, rows, labels), 1e-3))
    return Task(model, sampler(32, swapped, labels), cross_entropy)


# Generation


def lm(make: Maker) -> Task:
    """A Llama of 76,000 parameters: English, then source code."""
    rows = bytes_of(code=True)
    return Task(llama(make, small=True), sampler(16, rows[:, :-1], rows[:, 1:]), cross_entropy)


def llama_code(make: Maker) -> Task:
    """The same with 1 million parameters."""
    rows = tokens_of(code=True)
    return Task(llama(make, small=False), sampler(8, rows[:, :-1], rows[:, 1:]), cross_entropy)


def sequence_to_sequence(model: nn.Module, pair: Batch) -> Tensor:
    return model(input_ids=pair[0], labels=pair[1]).loss


def t5(make: Maker) -> Task:
    """Continues a line: of the documentation, then of source code; 260,000 parameters."""

    def build() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        shape: dict[str, Any] = {"d_model": 96, "d_kv": 24, "d_ff": 256, "num_layers": 1, "num_heads": 4}
        shape |= {"vocab_size": VOCABULARY, "decoder_start_token_id": MASK, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(**shape))

    def data(size: int, code: bool) -> Data:
        rows = tokens_of(code)
        return sampler(size, rows[:, :LINE], rows[:, LINE:])

    model = make.trained(
        "t5", build, lambda model: backprop(model, 400, data(32, code=False), 1e-2, sequence_to_sequence)
    )
    return Task(model, data(16, code=True), sequence_to_sequence)


# Adapters and scales


def with_adapters(task: Task, kind: str, eps: float, settings: Any) -> Task:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Task(get_peft_model(task.model, settings).eval(), task.data, task.loss, kind, eps)


def lm_lora(make: Maker) -> Task:
    """As `lm`, with LoRA of rank 4."""
    from peft import LoraConfig

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    return with_adapters(lm(make), "lora", 1e-2, settings)


def llama_lora(make: Maker) -> Task:
    """As `llama_code`, with LoRA of rank 8 as PEFT sets it up."""
    from peft import LoraConfig

    return with_adapters(llama_code(make), "lora", 1e-2, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))


def bert_lora(make: Maker) -> Task:
    """As `bert_swapped`, with LoRA and a trained head."""
    from peft import LoraConfig

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    return with_adapters(bert_swapped(make), "lora", 1e-2, settings)


def llama_prefix(make: Maker) -> Task:
    """As `llama_code`, with a prefix of 8 virtual tokens."""
    from peft import PrefixTuningConfig

    return with_adapters(
        llama_code(make), "prefix", 1e-1, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    )


def llama_nf4(make: Maker) -> Task:
    """As `llama_code`, quantised to nf4; the quantisation scales move."""
    return in_nf4(llama_code(make))


def lm_nf4(make: Maker) -> Task:
    """As `lm`, quantised to nf4."""
    return in_nf4(lm(make))


def in_nf4(task: Task) -> Task:
    """The task with all linear layers but the head quantised to nf4."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for name, plain in list(task.model.named_modules()):
        if isinstance(plain, nn.Linear) and name != "lm_head":
            layer = Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
            layer.weight = Params4bit(plain.weight.data, quant_type="nf4", module=layer)
            layer.support_avx512bf16_for_cpu = False  # or an evaluation would round the scales
            task.model.set_submodule(name, layer)
    return Task(task.model.to("cpu").eval(), task.data, task.loss, "scales", 1e-2)

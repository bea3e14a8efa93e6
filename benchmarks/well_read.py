"""Tasks for models that have read for longer than those of `text_tasks.py`: minutes instead of seconds.

What a few directions in the span of the activations are worth depends on what a model has learnt before.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tasks import Batch, Maker, Task, backprop, cross_entropy, sampler
from .text_tasks import (
    CLASSES,
    MASK,
    NO_DROPOUT,
    SOURCES,
    VOCABULARY,
    english_or_code,
    in_nf4,
    in_rows,
    lines,
    masked,
    shuffled,
    sizes,
    sources,
    tokenizer,
    tokens_of,
)

HIDDEN, LAYERS, STEPS = 128, 4, 2000
VERBALIZERS = (" text", " code")


@lru_cache
def both() -> Tensor:
    """Rows of the documentation and of source code."""
    return torch.cat([tokens_of(code=False), tokens_of(code=True)])


@lru_cache
def docstrings() -> Tensor:
    """Rows of the docstrings of the standard library, but for the modules whose source code has been read."""
    read = {f"{name}.py" for name in SOURCES.split()}
    files = [path for path in sorted(Path(ast.__file__).parent.glob("*.py")) if path.name not in read]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    return in_rows(torch.tensor(tokenizer().encode("\n".join(filter(None, found))).ids))


def llama(make: Maker) -> nn.Module:
    """A Llama of 790,000 parameters that has read the documentation and the source code several times."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**sizes(HIDDEN, LAYERS, VOCABULARY), tie_word_embeddings=True))

    data = sampler(64, both()[:, :-1], both()[:, 1:])
    return make.trained("llama-well-read", build, lambda model: backprop(model, STEPS, data, 3e-3))


def bert(make: Maker, labels: int) -> nn.Module:
    """A BERT of that size that restores the masked tokens of these texts, with a new head."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    shape: dict[str, Any] = sizes(HIDDEN, LAYERS, VOCABULARY) | NO_DROPOUT | {"num_labels": labels}

    def only_masked(model: nn.Module, pair: Batch) -> Tensor:
        hidden, whole = pair
        wanted = torch.where(hidden == MASK, whole, -100)
        return F.cross_entropy(model(hidden).logits.flatten(0, -2), wanted.flatten())

    def train(model: nn.Module) -> None:
        backprop(model, STEPS // 6, masked(64, both()), 2e-3)  # all tokens first: that teaches much sooner
        backprop(model, STEPS, masked(64, both()), 1e-3, only_masked)

    reader = make.trained("bert-well-read", lambda: BertForMaskedLM(BertConfig(**shape)), train)
    model = BertForSequenceClassification(BertConfig(**shape))
    body = {name.removeprefix("bert."): value for name, value in reader.state_dict().items()}
    model.base_model.load_state_dict(body, strict=False)
    return model.eval()


def domain(make: Maker) -> Task:
    """Goes on to the docstrings of other modules."""
    rows = docstrings()
    return Task(llama(make), sampler(16, rows[:, :-1], rows[:, 1:]), cross_entropy)


def verbalizer(make: Maker) -> Task:
    """Says after a line whether it is documentation or code, in one of two words."""
    words = [tokenizer().encode(word).ids[0] for word in VERBALIZERS]

    def loss(model: nn.Module, pair: Batch) -> Tensor:
        return F.cross_entropy(model(pair[0]).logits[:, -1, words], pair[1])

    return Task(llama(make), english_or_code(16), loss)


def classify(make: Maker) -> Task:
    """Is a line documentation or code? With a new head."""
    return Task(bert(make, 2), english_or_code(16), cross_entropy)


def modules(make: Maker) -> Task:
    """Which of ten modules is a line from? With a new head."""
    texts = [lines(text) for text in sources()[:CLASSES]]
    labels = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(texts)])
    return Task(bert(make, CLASSES), sampler(16, *shuffled(torch.cat(texts), labels)), cross_entropy)


def nf4(make: Maker) -> Task:
    """As `domain`, quantised to nf4; without adapters the quantisation scales move."""
    return in_nf4(domain(make))

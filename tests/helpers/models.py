"""Tiny models with their batches: four families of transformers, and plain modules that are difficult for hooks.

`tiny(name)` builds a model and `closure(name, model)` the function that a training step calls. Every
call gives equal random weights, and does not change the global generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 64
FAMILIES = ("llama", "opt", "bert", "t5")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.inner(x).mean(1)), labels)


class FunctionalTiedHead(nn.Module):
    """Uses ``self.embed.weight`` outside the forward of ``embed``, and an embedding again after it was finished."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(input_ids)))
        logits = F.linear(hidden, weight=self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its ``out_proj`` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.attention(x, x, x)[0].mean(1)), labels)


class Encoder(nn.Module):
    """In eval mode the layer may run as one C++ function that takes the weights of all its submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layer(x).mean(1)), labels)


class Recurrent(nn.Module):
    """An LSTM keeps a list of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.lstm(x)[0][:, -1]), labels)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(x.transpose(1, 2))))
        return F.cross_entropy(self.head(self.dropout(hidden).mean(2)), labels)


class Unseen(nn.Module):
    """Uses the weight of an uncalled submodule where hooks and function modes do not run, as C++ code does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.hidden = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x @ weight.t()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.project(torch.tanh(self.first(x)), self.hidden.weight)
        return F.cross_entropy(self.head(hidden.mean(1)), labels)


@torch.library.custom_op("zo_tests::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


class CustomOp(Unseen):
    """Uses the weight in an operator that torch does not know: hooks can see its arguments, not its implementation."""

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        return project(x, weight)


class KeepingLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(self.weight.t())
        return super().forward(x)


class KeptView(nn.Module):
    """Reads the weight of ``first`` again through a view, after ``first`` and ``second`` have run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = KeepingLinear()
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x)))) @ self.first.kept.pop()
        return F.cross_entropy(self.head(hidden.mean(1)), labels)


class Parametrised(nn.Module):
    """Computes the weight from the parameters at each access."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.extra = nn.ParameterList([torch.randn(8), torch.randn(())])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x)) * self.extra[0] + self.extra[1]
        return F.cross_entropy(self.head(hidden.mean(1)), labels)


PLAIN: dict[str, type[nn.Module]] = {
    "mlp": Mlp,
    "functional_tied_head": FunctionalTiedHead,
    "attention": Attention,
    "encoder": Encoder,
    "recurrent": Recurrent,
    "convnet": ConvNet,
    "unseen": Unseen,
    "custom_op": CustomOp,
    "kept_view": KeptView,
    "parametrised": Parametrised,
}
EVERY = (*FAMILIES, *PLAIN)


def tiny(name: str, tied: bool = True, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """A model of a few thousand weights, in training mode; ``tied`` makes head and embedding one parameter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PLAIN[name]() if name in PLAIN else _family(name, tied, layers)
    return model.to(dtype).train()


def _family(name: str, tied: bool, layers: int) -> nn.Module:
    import transformers as hf

    common: dict[str, Any] = {"vocab_size": VOCAB, "tie_word_embeddings": tied}
    stack = {"hidden_size": 32, "num_hidden_layers": layers}
    stack |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    if name == "llama":
        config = hf.LlamaConfig(**common, **stack, num_key_value_heads=1, intermediate_size=48)
        return hf.LlamaForCausalLM(config)
    if name == "opt":
        return hf.OPTForCausalLM(hf.OPTConfig(**common, **stack, ffn_dim=48, word_embed_proj_dim=32))
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**common, **stack, intermediate_size=48))
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": layers, "num_heads": 2}
    config = hf.T5Config(**common, **sizes, decoder_start_token_id=0)
    config.tie_word_embeddings = tied  # which T5Config sets to True, whatever it is given
    return hf.T5ForConditionalGeneration(config)


def batch(name: str, dtype: torch.dtype = torch.float32, index: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for the forward of `tiny`, including labels; each ``index`` gives another batch."""
    generator = torch.Generator().manual_seed(index)
    if name in FAMILIES or name == "functional_tied_head":
        ids = torch.randint(0, VOCAB, (2, 8), generator=generator)
        labels = torch.randint(0, VOCAB, (2, 8), generator=generator)
        return {"input_ids": ids, "labels": labels}
    x = torch.randn(4, 6, 8, generator=generator)
    return {"x": x.to(dtype), "labels": torch.randint(0, 3, (4,), generator=generator)}


def closure(name: str, model: nn.Module, index: int = 0) -> Callable[[], Tensor]:
    """Runs the model on batch ``index`` and returns its loss."""
    inputs = batch(name, next(model.parameters()).dtype, index)

    def loss() -> Tensor:
        output = model(**inputs)
        return output if isinstance(output, Tensor) else output.loss

    return loss


def gpt2() -> tuple[nn.Module, object]:
    """A model whose linear layers are transformers' `Conv1D`."""
    import transformers as hf

    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **tokens)).double()
    ids = torch.randint(0, VOCAB, (2, 8))
    return model, lambda: model(input_ids=ids, labels=ids).loss


def only_linear(model: nn.Module) -> nn.Module:
    """Trains only the weights of linear layers, except the head."""
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) and name != "lm_head") or type(module).__name__ == "Conv1D":
            module.weight.requires_grad_(True)
    return model.eval()

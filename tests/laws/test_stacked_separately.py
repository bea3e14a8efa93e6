"""Law: what cannot be measured in one forward is measured separately, with the same losses, or refused at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, tiny
from stacking import NOISE, engine, loss_of, made, run
from torch import Tensor, nn
from traces import same_bits, weights

from zo_core import ConfigError, Point, ZeroOrder, ZOConfig


class Torn(nn.Module):
    """Habits that do not go with several copies."""

    def __init__(self, habit: Callable[[Any, Tensor, Tensor], Tensor]):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB, bias=False)
        self.habit = habit

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.habit(self, torch.tanh(self.embed(input_ids)), labels)


def item(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(model.head(hidden).flatten(0, 1), labels.flatten())
    return loss + 0.0 * loss.item()


def direct(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ model.head.weight.t()).flatten(0, 1), labels.flatten())


def routed(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sends some tokens, which depend on the weights, through the head."""
    chosen = (hidden.sum(-1) > 0).nonzero(as_tuple=True)
    return F.cross_entropy(model.head(hidden[chosen]), labels[chosen])


def branching(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = model.head(hidden)
    return F.cross_entropy((logits if logits.mean() > 0 else -logits).flatten(0, 1), labels.flatten())


def in_place(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    out = torch.zeros(hidden.shape).index_add_(0, torch.arange(len(hidden)), hidden)
    return F.cross_entropy(model.head(out).flatten(0, 1), labels.flatten())


def transformed(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.vmap(model.head)(hidden).flatten(0, 1), labels.flatten())


HABITS = {
    "item": (item, "item"),
    "direct": (direct, "Tensor.t uses head.weight"),
    "routed": (routed, "nonzero|dynamic"),
    "branching": (branching, "data-dependent"),
    "transformed": (transformed, "head.weight"),
    "in_place": (in_place, "index_add_"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the model's own vmap, with separate probes
@pytest.mark.parametrize("habit", HABITS)
def test_what_has_no_stacked_form_is_measured_separately(habit: str, caplog: pytest.LogCaptureFixture) -> None:
    code, words = HABITS[habit]
    torch.manual_seed(0)
    model = Torn(code)
    other = copy.deepcopy(model)
    zo = engine(model)
    with caplog.at_level(logging.WARNING, "zo_core"):
        stacked = run(zo, "functional_tied_head", 4)
    assert stacked == run(engine(other, stack_probes=False), "functional_tied_head", 4)
    assert same_bits(weights(model), weights(other))
    (said,) = [record.getMessage() for record in caplog.records if "stack_probes" in record.getMessage()]
    assert any(word in said for word in words.split("|"))


def test_losses_across_the_batch_are_those_of_each_copy() -> None:
    # The router's loss of a mixture of experts is one such; its experts, in three dimensions, have no stacked form.
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True}
    config = MixtralConfig(vocab_size=VOCAB, num_key_value_heads=1, **sizes, **experts)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    other = copy.deepcopy(model)
    zo = engine(model)
    assert run(zo, "llama", 3) == run(engine(other, stack_probes=False), "llama", 3)
    assert same_bits(weights(model), weights(other))


@pytest.mark.parametrize("name", ["convnet", "recurrent", "attention", "unseen", "kept_view"])
def test_models_without_a_stacked_form_train_as_ever(name: str) -> None:
    model, other = tiny(name), tiny(name)
    zo = engine(model)
    assert run(zo, name, 3) == run(engine(other, stack_probes=False), name, 3)
    assert not zo.oracle.stacking
    assert same_bits(weights(model), weights(other))


def test_a_wrong_loss_is_noticed_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = made("mlp"), made("mlp")
    zo = engine(model)
    honest = zo.oracle._stacked
    monkeypatch.setattr(zo.oracle, "_stacked", lambda *args: [torch.stack(honest(*args)).mean()] * 6)
    assert run(zo, "mlp", 2) == run(engine(other, stack_probes=False), "mlp", 2)


def test_the_loss_at_one_point_is_measured_directly() -> None:
    model = made("mlp")
    loss = loss_of("mlp", model)
    points = (Point(1, 0.0),)
    assert engine(model).oracle.losses(points, loss) == engine(model, stack_probes=False).oracle.losses(points, loss)


def test_settings_that_do_not_go_together_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        ZOConfig(stack_probes=True, offload="disk", noise="rademacher", lr=-1.0)
    for words in ("needs noise='low_rank'", "no use with offload", "lr=-1.0"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="stack_probes='yes' must be True or False"):
        ZOConfig(stack_probes="yes")


def test_a_streamed_model_is_refused() -> None:
    model = made("llama")
    streamed = ZeroOrder(model, noise=NOISE, offload="cpu")
    with pytest.raises(ConfigError, match="stack_probes=True has no use with a streamed model"):
        engine(model)
    streamed.close()
    assert engine(model).oracle.stacking

"""Laws: a coreset is what its definition says, and a plain `Trainer` trains on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, texts, weights
from models import batch, tiny
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer

from hf_zo import Coreset, CoresetTrainerMixin, coreset
from zo_core import ConfigError, ModelError, Rademacher, derive_seed


class CoresetTrainer(CoresetTrainerMixin, Trainer):
    """Keeps what it trains and evaluates on."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counted = kwargs.get("num_items_in_batch")
        self.seen = [*getattr(self, "seen", []), (model.training, dict(inputs), counted)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def classifier(labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=labels, **sizes))


def llama_rows(count: int = 6) -> dict[str, Tensor]:
    found = texts(count)
    return {name: torch.stack([row[name] for row in found]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_largest_gain_every_time(seed: int) -> None:
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    similarity = coreset.nearness(points)

    def value(chosen: list[int]) -> float:
        return sum(max(float(similarity[i, j]) for j in chosen) for i in range(len(points)))

    chosen: list[int] = []
    for _ in range(9):
        left = [index for index in range(9) if index not in chosen]
        chosen.append(max(left, key=lambda index: round(value([*chosen, index]), 9)))
        assert coreset.facility_location(similarity, len(chosen)) == chosen


def test_of_two_clusters_both_are_represented() -> None:
    points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [9.0]], dtype=torch.float64)
    assert 4 in coreset.select(points, 2)


def test_small_sources_are_kept_whole() -> None:
    points = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sources = torch.tensor([7] * 9 + [3] * 2 + [5] * 9)
    assert {9, 10} <= set(coreset.select(points, 6, sources))
    assert coreset.select(points, 1, sources) in ([9], [10])
    even = torch.tensor([0, 1] * 10)
    assert coreset.select(points, 6, even) == coreset.select(points, 6)


def test_the_gradients_are_those_of_the_weights_of_the_last_value_projection() -> None:
    """Against autograd, an example at a time, in float64."""
    model = classifier().double().eval()
    inputs = {"input_ids": batch("bert")["input_ids"], "labels": torch.tensor([0, 2])}
    found = Coreset(directions=3, seed=5, eps=1e-5).gradients(model, inputs)
    module, layer = coreset.value_projection(model, None)
    assert module.endswith("layer.2.attention.self.value")
    for index in range(2):
        one = {key: value[index : index + 1] for key, value in inputs.items()}
        (grad,) = torch.autograd.grad(model(**one).loss, layer.weight)
        for column in range(3):
            seed = derive_seed(5, 0, column)
            signs = Rademacher().z(seed, module, 0, grad.numel()).view(grad.shape).double()
            torch.testing.assert_close(found[index, column], (grad * signs).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_losses_of_examples_are_what_the_model_says_of_each(name: str) -> None:
    """With and without a shift of the labels, and with masked ones."""
    model = tiny(name).eval()
    inputs = llama_rows() if name == "llama" else batch("t5")
    found = coreset.own_losses(model, inputs)
    for index, loss in enumerate(found):
        one = {key: value[index : index + 1] for key, value in inputs.items()}
        torch.testing.assert_close(loss, model(**one).loss)


@pytest.mark.parametrize("name", ["llama", "t5", "opt"])
def test_computing_the_earlier_blocks_once_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(name, layers=3), batch(name)
    before, state = weights(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    found = Coreset().gradients(model, inputs)
    assert differing(before, weights(model)) == []
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert not any("forward" in vars(module) for module in model.modules())
    counted: list[nn.Module] = []
    for block in coreset.earlier_blocks(model, coreset.value_projection(model, None)[0]):
        block.register_forward_pre_hook(lambda module, _: counted.append(module))
    monkeypatch.setattr(coreset, "earlier_blocks", lambda *_: [])
    assert torch.equal(found, Coreset().gradients(model, inputs))
    assert len(counted) == 2 * 16
    assert found.unique().numel() > 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_plain_trainer_trains_on_the_chosen_rows(accumulation: int, tmp_path: Path) -> None:
    model = tiny("llama")
    args = arguments(tmp_path, learning_rate=1e-2, gradient_accumulation_steps=accumulation, eval_strategy="epoch")
    whole = CoresetTrainer(
        model=model, args=args, train_dataset=texts(), eval_dataset=texts(4), coreset=Coreset(keep=0.5)
    )
    first = copy.deepcopy(model)
    torch.manual_seed(args.seed)
    whole.train()
    sizes = [(training, len(inputs["input_ids"])) for training, inputs, _ in whole.seen]
    assert sizes == [(True, 2)] * 4 + [(False, 4)]
    for at in range(0, 4, accumulation):  # micro-batches of a step count their own tokens, and no others
        step = whole.seen[at : at + accumulation]
        tokens = sum(int((inputs["labels"] != -100).sum()) for _, inputs, _ in step)
        assert all(int(counted) == tokens for _, _, counted in step)
    chosen = whole.seen[0][1]
    rows = [row for row in texts() if any(torch.equal(row["input_ids"], each) for each in chosen["input_ids"])]
    assert len(rows) == 2
    assert differing(weights(first), weights(model))


def test_the_column_of_sources_does_not_reach_the_model(tmp_path: Path) -> None:
    data = [{**row, "from": index % 4 // 3} for index, row in enumerate(texts())]
    settings = {"coreset": Coreset(source="from"), "eval_dataset": data[:4]}
    args = arguments(tmp_path, remove_unused_columns=False, eval_strategy="epoch")
    run = CoresetTrainer(model=tiny("llama"), args=args, train_dataset=data, **settings)
    run.train()
    assert {name for _, inputs, _ in run.seen for name in inputs} == {"input_ids", "labels"}
    with pytest.raises(ConfigError, match="remove_unused_columns=False"):
        Coreset(source="from")(tiny("llama"), llama_rows())


def test_what_cannot_be_chosen_from_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"keep=1.5 .*\n?.*directions=0"):
        Coreset(keep=1.5, directions=0)
    with pytest.raises(ConfigError, match="one row for each example"):
        Coreset()(tiny("llama"), {"input_ids": torch.zeros(4, 3), "pixel_values": torch.zeros(9, 3)})
    with pytest.raises(ModelError, match=r"layer='\.\.\.'"):
        Coreset().gradients(tiny("mlp"), batch("mlp"))
    with pytest.raises(ConfigError, match="layer='nothing'"):
        Coreset(layer="nothing").gradients(tiny("llama"), llama_rows())

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("llama")

        def forward(self, **inputs: Any) -> Any:
            outputs = self.inner(**inputs)
            outputs.loss = outputs.loss.square()
            return outputs

    with pytest.raises(ModelError, match="losses=function"):
        Coreset().gradients(Squared(), llama_rows())
    with pytest.raises(ModelError, match="losses=function"):  # a regression
        Coreset().gradients(classifier(labels=1), {**batch("bert"), "labels": torch.tensor([0.5, 2.0])})

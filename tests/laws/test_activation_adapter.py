"""Law: an adapter along the activations is an ordinary adapter whose A spans the layers' inputs and never moves."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, saved_llama, texts, weights
from int4_hf_helpers import nf4
from models import batch, tiny
from peft import PeftModel
from torch import Tensor, nn
from torchao_models import plain
from traces import generators
from transformers import AutoModelForCausalLM

from hf_zo import ZOTrainer, activation_adapter, from_pretrained_offloaded
from hf_zo.activations import ROWS, Sketch, basis
from zo_core import ConfigError, ModelError, SeedLogWriter, ZeroOrder, ZOConfig, replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("float"))


def rows(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    several = texts(count, seed=seed)
    return {name: torch.stack([row[name] for row in several]) for name in several[0]}


def float32(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows()["input_ids"]).logits


def downs(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


# What A is


def inputs_of(model: nn.Module, name: str, inputs: Any) -> Tensor:
    """The inputs of a layer as rows."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0].double()


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_a_holds_the_principal_directions_of_the_inputs(whiten: float) -> None:
    """Float32 holds A, and the inputs, to a few parts in 10^7; nothing else is rounded to that."""
    base = tiny("llama", tied=False).eval()
    inputs, name = batch("llama"), "model.layers.1.mlp.down_proj"
    seen = inputs_of(base, name, inputs)
    _, values, directions = torch.linalg.svd(seen, full_matrices=False)
    expected = directions[:3] / values[:3, None] ** whiten
    expected *= (expected.numel() / expected.square().sum()).sqrt()
    model = activation_adapter(base, inputs, 3, whiten=whiten)
    found = model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.double()
    signs = (found * expected).sum(1, keepdim=True).sign()
    assert torch.allclose(found * signs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if whiten == 1.0:  # all directions of the inputs count alike
        gram = (seen @ found.T).T @ (seen @ found.T)
        assert torch.allclose(gram / gram[0, 0], torch.eye(3, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("whiten", [0.0, 1.0])
def test_a_unit_of_noise_is_a_unit_in_the_weight_for_every_rank_and_layer(rank: int, whiten: float) -> None:
    model = activation_adapter(tiny("llama", tied=False), batch("llama"), rank, whiten=whiten)
    for down in downs(model).values():
        assert down.shape[0] == rank
        assert float(down.double().square().mean()) == pytest.approx(1.0, rel=1e-6)


def test_batches_add_up() -> None:
    """Rows of a space that the sketch can hold lose nothing on the way."""
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(6, 40, generator=generator)
    parts = [torch.randn(50, 6, generator=generator) @ space for _ in range(5)]
    sketch = Sketch(8)
    for part in parts:
        sketch.see(part)
    assert sketch.rows is not None
    values = torch.linalg.svdvals(torch.cat(parts))
    assert torch.allclose(torch.linalg.vector_norm(sketch.rows, dim=1)[:6], values[:6], rtol=1e-5)
    assert basis(sketch.rows, 8, 40, 1.0)[6:].abs().max() == 0  # directions that no input has


def test_a_large_batch_is_thinned_out() -> None:
    large, few = Sketch(4), Sketch(4)
    values = torch.randn(4 * ROWS - 1, 16, generator=torch.Generator().manual_seed(0))
    large.see(values)
    few.see(values[::4])
    assert large.rows is not None
    assert few.rows is not None
    assert torch.equal(large.rows, few.rows)


def test_masked_tokens_do_not_count() -> None:
    base, found = tiny("llama", tied=False), []
    for padding in (5, 6):
        inputs = {"input_ids": rows()["input_ids"].clone(), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
        inputs["input_ids"][:, 6:] = padding
        inputs["attention_mask"][:, 6:] = 0
        found.append(downs(activation_adapter(copy.deepcopy(base), inputs)))
    assert differing(*found) == []


def test_finding_it_leaves_no_trace() -> None:
    base = tiny("llama", tied=False).train()
    base.model.norm.eval()
    before, logs = generators(), logits(copy.deepcopy(base))
    model = activation_adapter(base, [batch("llama")] * 2)
    assert generators() == before
    assert model.training
    assert not model.base_model.model.model.norm.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), logs)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.train()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


# What training does


@pytest.mark.parametrize("load", [nf4, float32])
def test_training_moves_b_alone_and_peft_loads_it(load: Callable[[Path], Any], folder: Path, tmp_path: Path) -> None:
    model = activation_adapter(load(folder), rows(), task_type="CAUSAL_LM")
    start = plain(model)
    trainer = ZOTrainer(model=model, args=arguments(tmp_path, learning_rate=1e-2), train_dataset=texts())
    trainer.train()
    end = plain(model)
    assert {n for n in end if not torch.equal(end[n], start[n])} == {n for n in end if "lora_B" in n}
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_streamed_equals_resident(kind: str, folder: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=1e-2)
    for load in (nf4, float32):
        model, twin = (activation_adapter(load(folder), rows()) for _ in range(2))
        for each, config in ((model, ZOConfig()), (twin, ZOConfig(offload=kind))):
            trainer = ZOTrainer(model=each, args=args, train_dataset=texts(), zo_config=config)
            trainer.train()
        assert trainer.zo.streaming.bytes_read > 0
        trainer.zo.close()
        assert differing(weights(model), weights(twin)) == []


def test_the_directions_of_a_model_on_disk_are_those_of_one_in_memory(folder: Path) -> None:
    resident = activation_adapter(float32(folder), rows())
    streamed = activation_adapter(from_pretrained_offloaded(AutoModelForCausalLM, folder, dtype=torch.float32), rows())
    assert differing(downs(resident), downs(streamed)) == []
    for model in (resident, streamed):
        zo = ZeroOrder(model, lr=1e-2)
        zo.step(lambda model=model: model(**rows()).loss)
    assert torch.equal(logits(streamed), logits(resident))


def test_a_resumed_run_ends_where_the_whole_run_ends(folder: Path, tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-2")):
        model = activation_adapter(float32(folder), rows())
        args = arguments(tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=2)
        ZOTrainer(model=model, args=args, train_dataset=texts()).train(resume_from_checkpoint=resume)
        runs.append(weights(model))
    assert differing(*runs) == []


def test_a_log_replays_on_the_saved_adapter(folder: Path, tmp_path: Path) -> None:
    """Another machine may round A otherwise, so that it is loaded there and not found again."""
    model = activation_adapter(float32(folder), rows())
    model.save_pretrained(tmp_path / "adapter")
    zo = ZeroOrder(model, lr=1e-2)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for seed in range(3):
        zo.step(lambda seed=seed: model(**rows(seed=seed)).loss)
    log.close()
    other = activation_adapter(float32(folder), rows(seed=9))
    other.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert all("lora_B" in name for name, p in other.named_parameters() if p.requires_grad)
    replay(other, tmp_path / "log", progress=False)
    assert differing(weights(other), weights(model)) == []


# What is said


def test_layers_that_do_not_run_have_random_directions(caplog: pytest.LogCaptureFixture) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    with caplog.at_level(logging.WARNING):
        model = activation_adapter(Two(), torch.randn(8, 4), 2)
    assert "1 of 2 layers did not run on these batches and have random directions: unused" in caplog.text
    assert model.base_model.model.unused.lora_A["default"].weight.abs().unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("batches", "settings", "words"),
    [
        ([], {}, "batches is empty"),
        ([batch("llama")], {"whiten": 2}, "whiten=2 must be a number from 0 to 1"),
        ([batch("llama")], {"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ([batch("llama")], {"r": 4}, "r= is set by activation_adapter; leave it out"),
    ],
    ids=["none", "whiten", "rank", "r"],
)
def test_what_cannot_work_is_said(batches: list[Any], settings: dict[str, Any], words: str) -> None:
    model = tiny("llama", tied=False)
    before = weights(model)
    with pytest.raises(ConfigError, match=words):
        activation_adapter(model, batches, **settings)
    assert differing(weights(model), before) == []


def test_an_input_that_is_not_finite_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"an input of 0 is not finite"):
        activation_adapter(model, torch.full((2, 4), torch.inf))
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_is_said_that_a_user_cannot_change(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        activation_adapter(float32(folder), [rows()], task_type="CAUSAL_LM")
    assert [str(warning.message) for warning in said] == []

"""Law: adapters of signs train as low-rank directions do in one window, on bases that are never written."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hf_helpers import arguments, differing, saved_llama, texts, weights
from int4_hf_helpers import nf4
from models import batch, only_linear, tiny
from peft import PeftModel
from torch import Tensor, nn
from torchao_models import GROUPS, plain
from traces import generators
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_zo import ZOTrainer, low_rank_adapter
from zo_core import (
    ConfigError,
    LowRank,
    ModelError,
    SeedLogWriter,
    Slot,
    StateError,
    Target,
    Trainable,
    ZeroOrder,
    ZOConfig,
    replay,
)

U = 2.0**-24  # unit roundoff of float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("float"))


def torchao(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(GROUPS), dtype=torch.float32)


def float16bit(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=texts()[0]["input_ids"][None]).logits


# The same run as with low-rank noise


@dataclass(frozen=True)
class ByLayer(Target):
    """The trainable parameters, each under the name of its layer, so that both runs have the same signs."""

    name: ClassVar[str] = "by_layer"

    def slots(self, model: nn.Module) -> list[Slot]:
        names = {id(p): name for name, p in model.named_parameters()}

        def key(slot: Slot) -> str:
            name = names[id(slot.tensor)].removeprefix("base_model.model.")
            return name.removesuffix(".weight").removesuffix(".lora_B.default")

        return [replace(slot, key=key(slot)) for slot in Trainable().slots(model)]


@pytest.mark.parametrize("rank", [1, 4])
def test_training_the_adapter_is_training_with_low_rank_noise(rank: int) -> None:
    """Exactly: these ranks have whole roots, and with lr = eps a move is half a difference of float32 losses.

    Such moves add up in float32, in which low-rank noise keeps its factor, without rounding.
    """
    base = tiny("llama", tied=False).double().eval()
    twin = only_linear(copy.deepcopy(base))
    model = low_rank_adapter(base, rank, seed=7)
    inputs = batch("llama")
    settings: dict[str, Any] = {"target": ByLayer(), "lr": 1e-3, "eps": 1e-3, "seed": 7}
    zo, reference = ZeroOrder(model, **settings), ZeroOrder(twin, noise=LowRank(rank, refresh=None), **settings)
    assert [slot.key for slot in zo.slots] == [slot.key for slot in reference.slots]
    for _ in range(8):
        record, expected = zo.step(lambda: model(**inputs).loss), reference.step(lambda: twin(**inputs).loss)
        assert (record.loss, record.projected_grad) == (expected.loss, expected.projected_grad)
    assert reference.updaters.windows.of
    for slot, other in zip(zo.slots, reference.slots, strict=True):
        waiting = reference.updaters.waiting(other)
        assert waiting is not None
        assert waiting.base is not None
        left, right = waiting.base
        assert slot.tensor.abs().max() > 0
        assert torch.equal(slot.tensor, left.double() * math.sqrt(rank))
        assert torch.equal(model.get_submodule(f"base_model.model.{slot.key}.lora_A.default").weight, right.double())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_unit_of_noise_in_the_adapter_is_a_unit_of_low_rank_noise_in_the_weight(rank: int) -> None:
    model = low_rank_adapter(tiny("llama", tied=False), rank)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    noise = LowRank(rank, refresh=None)
    seed, name = noise.seed(0, 0, 0), "model.layers.0.self_attn.q_proj"
    layer.lora_B["default"].weight.data = noise.left(seed, name, layer.weight.shape, torch.device("cpu")).clone()
    delta = layer.get_delta_weight("default")
    # A sum of `rank` signs is exact; the root is rounded once here, and on each side of a product and a sum there.
    expected = noise.values(seed, name, layer.weight.shape)
    assert torch.allclose(delta, expected, rtol=(rank + 2) * U, atol=rank * U)


# Bases that are only read


@pytest.mark.parametrize("load", [nf4, torchao, float16bit])
def test_peft_loads_what_was_learnt_on_the_untouched_base(
    load: Callable[[Path], Any], folder: Path, tmp_path: Path
) -> None:
    model = low_rank_adapter(load(folder), task_type="CAUSAL_LM")
    start, before = plain(model), logits(model)
    assert torch.equal(before, logits(load(folder)))
    args = arguments(tmp_path, learning_rate=1e-2)
    trainer = ZOTrainer(model=model, args=args, train_dataset=texts())
    trainer.train()
    end = plain(model)
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    assert moved == {name for name in end if "lora_B" in name}
    assert len(moved) == 14
    assert not torch.equal(logits(model), before)
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("load", [nf4, float16bit])
def test_streamed_equals_resident(load: Callable[[Path], Any], kind: str, folder: Path, tmp_path: Path) -> None:
    model, twin = (low_rank_adapter(load(folder)) for _ in range(2))
    args = arguments(tmp_path, learning_rate=1e-2)
    for each, config in ((model, ZOConfig()), (twin, ZOConfig(offload=kind))):
        trainer = ZOTrainer(model=each, args=args, train_dataset=texts(), zo_config=config)
        trainer.train()
    assert trainer.zo.streaming.bytes_read > 0
    assert trainer.zo.streaming.bytes_written == 0
    assert torch.equal(logits(twin), logits(model))
    trainer.zo.close()
    assert differing(weights(model), weights(twin)) == []


def test_a_resumed_run_ends_where_the_whole_run_ends(folder: Path, tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-2")):
        model = low_rank_adapter(nf4(folder))
        args = arguments(tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=2)
        trainer = ZOTrainer(model=model, args=args, train_dataset=texts(), zo_config=ZOConfig(rule="momentum"))
        trainer.train(resume_from_checkpoint=resume)
        assert all("lora_B" in slot.key for slot in trainer.zo.slots)
        runs.append(weights(model))
    assert differing(*runs) == []


def test_a_seed_log_replays_on_the_same_adapter_only(folder: Path, tmp_path: Path) -> None:
    model, again, other = (low_rank_adapter(nf4(folder), seed=seed) for seed in (1, 1, 2))
    zo = ZeroOrder(model, lr=1e-2)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for row in texts(3):
        zo.step(lambda row=row: model(**{name: value[None] for name, value in row.items()}).loss)
    log.close()
    replay(again, tmp_path / "log", progress=False)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(StateError, match="another frozen base"):
        replay(other, tmp_path / "log", progress=False)


def test_a_saved_adapter_goes_on_as_documented(folder: Path, tmp_path: Path) -> None:
    model, again = low_rank_adapter(nf4(folder), seed=1), low_rank_adapter(nf4(folder), seed=2)
    rows = [{name: value[None] for name, value in row.items()} for row in texts(2)]
    ZeroOrder(model, lr=1e-2).step(lambda: model(**rows[0]).loss)
    model.save_pretrained(tmp_path / "adapter")
    again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    for each in (model, again):
        ZeroOrder(each, lr=1e-2).step(lambda each=each: each(**rows[1]).loss)
    assert differing(weights(again), weights(model)) == []


# What is set up


def test_the_seed_and_the_names_of_the_layers_decide() -> None:
    before = generators()
    a, b, c = (low_rank_adapter(tiny("llama", tied=False), seed=seed) for seed in (0, 0, 1))
    assert generators() == before
    down = {name: p for name, p in a.named_parameters() if "lora_A" in name}
    assert len(down) == 14
    assert {value for p in down.values() for value in p.unique().tolist()} == {-1.0, 1.0}
    assert len({p.numpy(force=True).tobytes() for p in down.values()}) == 14
    assert differing(weights(a), weights(b)) == []
    assert set(differing(weights(a), weights(c))) == down.keys()


def test_nothing_makes_the_signs_trainable() -> None:
    model = low_rank_adapter(tiny("llama", tied=False))
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.train()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"r": 4, "use_dora": True}, r"r= is set by low_rank_adapter(.|\n)*use_dora= is set by low_rank_adapter"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens is no linear layer; leave it out"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_and_leaves_the_model_alone(settings: dict[str, Any], words: str) -> None:
    model = tiny("llama", tied=False)
    before = weights(model)
    with pytest.raises(ConfigError, match=words):
        low_rank_adapter(model, **settings)
    assert differing(weights(model), before) == []
    assert all(p.requires_grad for p in model.parameters())
    adapted = low_rank_adapter(model)
    with pytest.raises(ModelError, match=r"has adapters already.*model.unload\(\)"):
        low_rank_adapter(adapted)

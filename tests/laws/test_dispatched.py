"""Law: a model of which accelerate keeps layers elsewhere is refused with the way out, or trains as one in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import SequentialHook, add_hook_to_module
from hf_helpers import adapted, arguments, logged, texts
from lightning_helpers import Wrapped, fitted
from models import batch, tiny
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from hf_zo import ZOTrainer, ZOTrainingArguments, from_pretrained_offloaded
from zo_core import ModelError, SeedLog, SeedLogWriter, ZeroOrder, ZOConfig, replay

CPU = torch.device("cpu")
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
WAY_OUT = r"hf_zo.from_pretrained_offloaded.*offload='cpu' or 'disk' \(in ZOConfig, or zo_offload\)"

Make = Callable[[Path], nn.Module]


@pytest.fixture(autouse=True)
def quiet_accelerate() -> Iterator[None]:
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def load(path: Path, **how: Any) -> nn.Module:
    folder = path / "checkpoint"
    if not folder.exists():
        tiny("llama", tied=False).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def last_layer_on_disk(path: Path) -> nn.Module:
    where = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}
    return load(path, device_map=where, offload_folder=str(path / "folder"))


def dispatched(path: Path) -> nn.Module:
    where = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}
    return dispatch_model(load(path), where, main_device="cpu", offload_dir=str(path / "other"), force_hooks=True)


def with_another_hook(path: Path) -> nn.Module:
    """Two hooks on a module are one object."""
    model = last_layer_on_disk(path)
    layer = model.model.layers[1].mlp.up_proj
    add_hook_to_module(layer, SequentialHook(), append=True)
    return model


ELSEWHERE: dict[str, Make] = {
    "device_map": last_layer_on_disk,
    "dispatch_model": dispatched,
    "two hooks": with_another_hook,
    "cpu_offload": lambda path: cpu_offload(load(path), CPU),
    "disk_offload": lambda path: disk_offload(load(path), str(path / "folder"), CPU),
}
HERE: dict[str, Make] = {
    "plain": load,
    "all on the CPU": lambda path: load(path, device_map={"": "cpu"}),
    "auto": lambda path: load(path, device_map="auto"),
    "dispatched to the CPU": lambda path: dispatch_model(
        load(path), dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True
    ),
}


def trainer(path: Path, model: nn.Module, **settings: Any) -> ZOTrainer:
    args = arguments(path, ZOTrainingArguments, learning_rate=1e-3, max_steps=2, **settings)
    return ZOTrainer(model, args, train_dataset=texts(), eval_dataset=texts(4))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_weights_that_are_elsewhere_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=WAY_OUT):
        ZeroOrder(ELSEWHERE[name](tmp_path))
    with pytest.raises(ModelError, match=WAY_OUT):
        ZeroOrder(ELSEWHERE[name](tmp_path), offload="cpu")


@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_trainer_says_so_when_it_is_made(name: str, offload: str | None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=WAY_OUT):
        trainer(tmp_path, ELSEWHERE[name](tmp_path), zo_offload=offload)


@pytest.mark.parametrize("strategy", ["zo", "zo_offload"])
def test_so_does_the_strategy(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=WAY_OUT):
        fitted(tmp_path, Wrapped(model=last_layer_on_disk(tmp_path)), strategy)


def test_the_way_out_is_one(tmp_path: Path) -> None:
    plain = trainer(tmp_path, load(tmp_path))
    plain.train()
    for model, offload in ((from_pretrained_offloaded(AutoModelForCausalLM, tmp_path / "checkpoint"), None),
                           (load(tmp_path), "cpu"), (load(tmp_path), "disk")):  # fmt: skip
        other = trainer(tmp_path, model, zo_offload=offload)
        other.train()
        assert logged(other, "projected_grad") == logged(plain, "projected_grad")


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("name", HERE)
def test_what_is_in_memory_trains_whoever_put_it_there(name: str, offload: str | None, tmp_path: Path) -> None:
    runs = [trainer(tmp_path, make(tmp_path), zo_offload=offload) for make in (load, HERE[name])]
    for run in runs:
        run.train()
    assert logged(runs[0], "projected_grad") == logged(runs[1], "projected_grad")
    assert runs[0].evaluate()["eval_loss"] == runs[1].evaluate()["eval_loss"]


def with_adapters(model: nn.Module, layer: int) -> nn.Module:
    torch.manual_seed(5)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=rf".*layers\.{layer}.*q_proj", init_lora_weights=False
    )
    model = adapted(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and not parameter.is_meta:
            parameter.data.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    return model


@pytest.mark.parametrize("noise", ["rademacher", "low_rank"])
@pytest.mark.parametrize("name", ["device_map", "dispatch_model"])
def test_adapters_in_memory_train_on_a_frozen_base_that_is_elsewhere(name: str, noise: str, tmp_path: Path) -> None:
    runs = [
        trainer(tmp_path / str(i), with_adapters(make(tmp_path), 0), zo_noise=noise, zo_eps=1e-2)
        for i, make in enumerate((load, ELSEWHERE[name]))
    ]
    for run in runs:
        run.train()
    assert logged(runs[0], "projected_grad") == logged(runs[1], "projected_grad")
    assert runs[0].evaluate()["eval_loss"] == runs[1].evaluate()["eval_loss"]


def test_the_log_of_such_a_run_is_that_of_one_in_memory(tmp_path: Path) -> None:
    model, plain = with_adapters(last_layer_on_disk(tmp_path), 0).eval(), with_adapters(load(tmp_path), 0).eval()
    zo = ZeroOrder(model, lr=1e-3)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for index in range(3):
        zo.step(lambda index=index: model(**batch("llama", index=index)).loss)
    log.close()
    replay(plain, SeedLog.read(tmp_path / "log"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(torch.equal(p, dict(plain.named_parameters())[name]) for name, p in trained.items())


def test_adapters_that_went_with_their_layer_are_refused(tmp_path: Path) -> None:
    model = with_adapters(last_layer_on_disk(tmp_path), 1)
    with pytest.raises(ModelError, match=f"lora_A.*{WAY_OUT}"):
        ZeroOrder(model)
    with pytest.raises(ModelError, match=f"lora_A.*{WAY_OUT}"):
        trainer(tmp_path, model)


def test_a_base_that_is_elsewhere_is_not_streamed_twice(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=WAY_OUT):
        ZeroOrder(with_adapters(last_layer_on_disk(tmp_path), 0), ZOConfig(offload="cpu"))
    with pytest.raises(ModelError, match=WAY_OUT):
        trainer(tmp_path, with_adapters(last_layer_on_disk(tmp_path), 0), zo_offload="cpu")

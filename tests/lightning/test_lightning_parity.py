"""Law: a run under Lightning is a bare `ZeroOrder` loop on the same batches, and a run of `ZOTrainer`, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import adapted, arguments, differing, texts, weights
from lightning_helpers import QUIET, TIERS, Wrapped, batches, fitted, loader, sgd
from models import tiny
from peft import LoraConfig
from torch import nn
from transformers import default_data_collator

from hf_zo import ZOTrainer
from zo_core import ZeroOrder, ZOConfig, ZOOptimizer

pytestmark = QUIET


def loss_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.loss


def bare(model: nn.Module, name: str = "llama", accumulate: int = 1, gamma: float = 1.0, **settings: Any) -> Any:
    """A loop of one's own over the same batches; ``gamma`` multiplies the learning rate at every step."""
    zo = ZeroOrder(model, **settings)
    data = batches(name)
    for start in range(0, len(data), accumulate):
        for batch in data[start : start + accumulate]:
            zo.measure(lambda batch=batch: loss_of(model(**batch)) / accumulate)
        zo.optimizer.step()
        for group in zo.optimizer.param_groups:
            group["lr"] *= gamma
    zo.close()
    return weights(model)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["llama", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_bare_loop_and_lightning_agree(tmp_path: Path, name: str, tier: str | None) -> None:
    theirs = bare(tiny(name), name, lr=1e-3)
    module = Wrapped(name)
    assert not differing(fitted(tmp_path, module, {"offload": tier}, data=loader(name)), theirs)
    assert differing(theirs, weights(tiny(name)))


SGDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": ({"momentum": 0.8}, {"rule": {"name": "momentum", "beta": 0.8}}),
    "weight decay": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "both": ({"momentum": 0.9, "weight_decay": 0.1}, {"rule": "momentum", "weight_decay": 0.1}),
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("torchs", "ours"), SGDS.values(), ids=SGDS.keys())
def test_sgd_becomes_the_fused_rule(tmp_path: Path, torchs: Any, ours: Any, tier: str | None) -> None:
    mine = fitted(tmp_path, Wrapped(optimizer=sgd(**torchs)), {"offload": tier})
    assert not differing(mine, bare(tiny("llama"), lr=1e-3, **ours))


@pytest.mark.parametrize("tier", TIERS)
def test_all_three_trainers_agree(tmp_path: Path, tier: str | None) -> None:
    rows = texts(24)
    data = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=default_data_collator)
    steps = list(data)
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3, rule="momentum", weight_decay=0.1, seed=42)
    for batch in steps:
        zo.step(lambda batch=batch: model(**batch).loss)

    class InOrder(ZOTrainer):
        def get_train_dataloader(self) -> Any:
            return data

        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    args = arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1)
    hf = InOrder(model=tiny("llama"), args=args, train_dataset=rows, zo_config=ZOConfig(rule="momentum", offload=tier))
    hf.train()
    module = Wrapped(optimizer=sgd(momentum=0.9, weight_decay=0.1))
    mine = fitted(tmp_path, module, {"offload": tier, "seed": 42}, data=data)
    assert not differing(weights(hf.model), weights(model))
    assert not differing(mine, weights(model))


@pytest.mark.parametrize("tier", TIERS)
def test_accumulation_shares_the_directions_and_averages_the_losses(tmp_path: Path, tier: str | None) -> None:
    mine = fitted(tmp_path, strategy={"offload": tier}, accumulate_grad_batches=2)
    assert not differing(mine, bare(tiny("llama"), accumulate=2, lr=1e-3))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("make", [sgd(momentum=0.9), lambda m: ZOOptimizer(m.parameters(), lr=1e-3)], ids=["sgd", "zo"])
def test_schedulers_by_step_are_followed(tmp_path: Path, make: Any, tier: str | None) -> None:
    def with_schedule(module: nn.Module) -> Any:
        optimizer = make(module)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Wrapped(optimizer=with_schedule)
    mine = fitted(tmp_path, module, {"offload": tier})
    rule = "momentum" if isinstance(module.trainer.optimizers[0], torch.optim.SGD) else "sgd"
    assert not differing(mine, bare(tiny("llama"), gamma=0.5, lr=1e-3, rule=rule))
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 1e-3 * 0.5**6


def test_a_cycled_momentum_is_followed_resident_and_streamed(tmp_path: Path) -> None:
    def one_cycle(module: nn.Module) -> Any:
        optimizer = sgd(momentum=0.9)(module)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    runs = [fitted(tmp_path, Wrapped(optimizer=one_cycle), {"offload": tier}) for tier in TIERS]
    assert not differing(*runs)
    assert differing(runs[0], fitted(tmp_path, Wrapped(optimizer=sgd(momentum=0.95)), "zo"))


SETTINGS: dict[str, dict[str, Any]] = {
    "gaussian": {"noise": "gaussian"},
    "fzoo": {"estimator": "fzoo", "num_probes": 3},
    "two directions": {"num_probes": 2, "eps": 1e-2},
    "sign": {"rule": "sign"},
    "clip": {"clip": 0.1},
    "seed": {"seed": 5},
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(s, id=name, marks=[] if name in ("fzoo", "clip") else pytest.mark.slow)
        for name, s in SETTINGS.items()
    ],
)
def test_every_setting_reaches_the_engine(tmp_path: Path, settings: dict[str, Any]) -> None:
    mine = fitted(tmp_path, strategy=settings)
    assert not differing(mine, bare(tiny("llama"), lr=1e-3, **settings))
    assert differing(mine, bare(tiny("llama"), lr=1e-3))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        pytest.param(lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-3), marks=pytest.mark.slow),
        pytest.param(sgd(momentum=0.9, nesterov=True), marks=pytest.mark.slow),
    ],
    ids=["AdamW", "Adagrad", "nesterov"],
)
def test_other_optimizers_find_the_estimate_in_grad(tmp_path: Path, make: Any) -> None:
    model = tiny("llama")
    theirs = bare(model, optimizer=make(model))
    assert not differing(fitted(tmp_path, Wrapped(optimizer=make)), theirs)


@pytest.mark.parametrize("tier", TIERS)
def test_parameter_groups_keep_their_learning_rates(tmp_path: Path, tier: str | None) -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        norms = [p for n, p in named if "norm" in n]
        return [{"params": norms, "lr": 1e-2}, {"params": [p for n, p in named if "norm" not in n], "lr": 1e-4}]

    mine = fitted(tmp_path, Wrapped(optimizer=lambda m: torch.optim.SGD(groups(m.model), lr=1.0)), {"offload": tier})
    model = tiny("llama")
    assert not differing(mine, bare(model, optimizer=ZOOptimizer(groups(model))))


@pytest.mark.parametrize("tier", TIERS)
def test_bf16_true_is_a_model_in_bfloat16(tmp_path: Path, tier: str | None) -> None:
    mine = fitted(tmp_path, strategy={"offload": tier}, precision="bf16-true")
    assert torch.get_default_dtype() == torch.float32
    assert not differing(mine, bare(tiny("llama", dtype=torch.bfloat16), lr=1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_64_true_leaves_the_default_dtype_alone(tmp_path: Path, tier: str | None) -> None:
    mine = fitted(tmp_path, strategy={"offload": tier}, precision="64-true")
    assert torch.get_default_dtype() == torch.float32
    assert not differing(mine, bare(tiny("llama", dtype=torch.float64), lr=1e-3))


@pytest.mark.parametrize("tier", TIERS)
def test_bf16_mixed_is_autocast(tmp_path: Path, tier: str | None) -> None:
    mine = fitted(tmp_path, strategy={"offload": tier}, precision="bf16-mixed")
    model = tiny("llama")
    zo = ZeroOrder(model, lr=1e-3)
    for batch in batches():
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            zo.measure(lambda batch=batch: model(**batch).loss)
        zo.optimizer.step()
    assert not differing(mine, weights(model))


@pytest.mark.parametrize("tier", TIERS)
def test_adapters_alone_move(tmp_path: Path, tier: str | None) -> None:
    def lora() -> nn.Module:
        return adapted(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    theirs = bare(lora(), lr=1e-2, eps=1e-2)
    mine = fitted(tmp_path, Wrapped(model=lora(), optimizer=sgd(1e-2)), {"offload": tier, "eps": 1e-2})
    assert not differing(mine, theirs)
    assert all("lora" in name for name in differing(mine, weights(lora())))


def test_a_plain_network_with_batch_norm_and_dropout_too(tmp_path: Path) -> None:
    mine = fitted(tmp_path, Wrapped("convnet"), data=loader("convnet"))
    assert not differing(mine, bare(tiny("convnet"), "convnet", lr=1e-3))

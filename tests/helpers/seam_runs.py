"""Small real runs that must use the names in `tests/helpers/seams.py`. Each takes an empty folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, saved_llama, texts, zo_trainer
from models import closure, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_zo import ZOTrainer, from_pretrained_offloaded, low_rank_adapter
from hf_zo.auto_lr import samples, schedulers, unnoticed
from zo_core import LowRank, ModelError, ZeroOrder, ZOConfig, ranks
from zo_core.learning_rate.search import set_lr
from zo_core.targets.dispatched import elsewhere

# zo_core


def step(name: str, count: int = 2, **settings: Any) -> ZeroOrder:
    model = tiny(name)
    optimizer = settings.pop("optimizer", None)
    if optimizer is not None:
        settings["optimizer"] = optimizer(model.parameters())
    zo = ZeroOrder(model, **({} if optimizer else {"lr": 1e-3}), **settings)
    for index in range(count):
        zo.step(closure(name, model, index))
    return zo


def resident(_: Path) -> None:
    step("mlp")


def global_hooks(_: Path) -> bool:
    module = torch.nn.modules.module
    handles = [
        register(lambda *_: None)
        for register in (module.register_module_forward_hook, module.register_module_forward_pre_hook)
    ]
    found = [bool(module._global_forward_hooks), bool(module._global_forward_pre_hooks)]
    for handle in handles:
        handle.remove()
    return all(found) and not (module._global_forward_hooks or module._global_forward_pre_hooks)


def streamed(_: Path) -> None:
    zo = step("llama", offload="cpu")
    for parameter in zo.model.parameters():  # whoever reads streamed weights gets them
        parameter.sum()
    zo.close()


def beside_streamed(_: Path) -> None:
    model = tiny("llama", tied=False, layers=3)
    ZeroOrder(model, lr=1e-3, offload="cpu", backprop=("lm_head",)).step(closure("llama", model))


def waiting(_: Path) -> None:
    model = tiny("mlp")

    async def loss() -> torch.Tensor:
        return closure("mlp", model)()

    ZeroOrder(model, lr=1e-3).step(loss)


def watched(_: Path) -> None:
    with FlopCounterMode(display=False):
        step("llama", offload="cpu").close()


def windows(_: Path) -> None:
    zo = step("llama", noise="low_rank")
    with torch.no_grad():
        closure("llama", zo.model)()
    zo.model.state_dict()
    zo.close()


def stacked(_: Path) -> None:
    zo = step("llama", noise=LowRank(), stack_probes=True, num_probes=2)
    assert zo.oracle.stacking, "probes do not run stacked any more"


def torch_rule(_: Path) -> None:
    step("mlp", optimizer=torch.optim.SGD)


def lost_process(_: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "ROLL_CALL", 0)
            assert "lost their connection" in ranks.Ranks("data")._missing()
    finally:
        torch.distributed.destroy_process_group()


def estimate(path: Path) -> None:
    from hf_zo.estimate import Workload, estimate, skeleton

    model = skeleton(str(saved_llama(path / "model")))
    assert estimate(model, Workload(batch_size=2, length=8, device="cpu", config=ZOConfig()))


# transformers, accelerate, peft, trl


class OnceNan(ZOTrainer):
    """A trainer with one NaN loss."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step == 1 else loss


def trainer(path: Path) -> None:
    zo_trainer(path, cls=OnceNan, save_strategy="steps", save_steps=2).train()


def several_gpus(path: Path) -> None:
    args = arguments(path, max_steps=1)
    args._n_gpu = 3
    ZOTrainer(tiny("llama"), args, train_dataset=texts()).train()


def resumed(path: Path) -> None:
    zo_trainer(path, save_strategy="steps", save_steps=2).train()
    zo_trainer(path).train(resume_from_checkpoint=str(path / "out" / "checkpoint-2"))


def range_test(path: Path) -> None:
    """The parts that inspect the trainer; all of it takes half a minute."""
    run = zo_trainer(path)
    run.train()
    with unnoticed(run):
        assert samples(run, 1)
        set_lr(run.zo.optimizer, 1e-3, schedulers(run))


def supervised(path: Path) -> None:
    from trl_helpers import sft, small_tokenizer

    sft(path, small_tokenizer(), max_steps=1).train()


def opened_in_place(path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from_pretrained_offloaded(AutoModelForCausalLM, saved_llama(path / "model"), offload_dir=path / "changed")


def dispatched(path: Path) -> None:
    import accelerate

    model = accelerate.cpu_offload(tiny("llama"))
    for _, parameter, read in elsewhere(model):
        assert read().shape == parameter.shape
    try:
        ZeroOrder(model, lr=1e-3)
    except ModelError:
        return
    raise AssertionError("a model whose weights are elsewhere was taken")


def frozen_factors(_: Path) -> None:
    adapted = low_rank_adapter(tiny("llama"), task_type="CAUSAL_LM")
    adapted.set_adapter("default")
    assert not any(p.requires_grad for name, p in adapted.named_parameters() if "lora_A" in name)


# bitsandbytes, torchao


def int4_trainer(path: Path) -> None:
    from int4_hf_helpers import load, trained

    trained(path, load(saved_llama(path / "model"))).save_model(str(path / "trained"))


def int4(_: Path) -> None:
    from int4_models import Quantised, layers
    from int4_models import closure as loss

    model = Quantised()
    for layer in layers(model):
        layer.support_avx512bf16_for_cpu = True
        layer.weight.quant_state = None  # as after a conversion
    zo = ZeroOrder(model.eval(), target="int4_scales", lr=1e-2)
    zo.step(loss(model))
    model.load_state_dict(model.state_dict())


def int4_repacked(_: Path) -> None:
    import bitsandbytes as bnb
    from int4_models import Quantised, layers

    model = Quantised()
    for layer in layers(model):
        state = layer.weight.quant_state
        layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    ZeroOrder(model, target="int4_scales", lr=1e-2)


# Lightning


def strategy(path: Path) -> None:
    from lightning_helpers import fitted

    fitted(path)


def strategy_logs(path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger
    from lightning_helpers import fitted

    fitted(path, logger=CSVLogger(path))


def strategy_range_test(path: Path) -> None:
    """Like `range_test`."""
    from lightning_helpers import Wrapped, batches, fitted

    from lightning_zo import auto_lr

    class Looks(Wrapped):
        def on_train_batch_start(self, *_: Any) -> None:
            assert auto_lr.batches(self.trainer)

    fitted(path, Looks(), data=torch.utils.data.DataLoader(batches(), batch_size=None))


def logged_names(path: Path) -> set[str]:
    from lightning_helpers import Wrapped, loader
    from lightning_helpers import trainer as lightning_trainer

    class Logs(Wrapped):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("found", loss, on_step=True, on_epoch=True)
            return loss

    run = lightning_trainer(path)
    run.fit(Logs(), loader())
    return set(run.callback_metrics)


def two_optimizers(path: Path) -> bool:
    from lightning_helpers import Wrapped, fitted

    from zo_core import ConfigError

    def both(module: nn.Module) -> Any:
        return [torch.optim.SGD(module.parameters(), lr=1.0) for _ in range(2)]

    try:
        fitted(path, Wrapped(optimizer=both))
    except ConfigError as error:
        return "several optimizers" in str(error)
    return False


def two_devices(path: Path) -> None:
    from lightning.pytorch import Trainer

    run = Trainer(strategy="zo", accelerator="cpu", devices=2, default_root_dir=path, logger=False)
    assert run.world_size == 2

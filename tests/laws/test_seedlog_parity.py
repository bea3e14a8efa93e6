"""Law: a bare loop, `ZOTrainer` and Lightning write the same steps, and the log of each replays on any base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import adapted, arguments, differing, texts, weights
from lightning_helpers import QUIET, Wrapped, fitted, sgd
from models import tiny
from peft import LoraConfig
from torch import nn
from transformers import default_data_collator

from hf_zo import ZOTrainer
from zo_core import SeedLog, SeedLogWriter, ZeroOrder, ZOConfig, replay

pytestmark = QUIET

SEED = 42


def plain() -> nn.Module:
    return tiny("llama")


def lora() -> nn.Module:
    return adapted(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def records(path: Path) -> list[bytes]:
    """The step-records without their checksums, which continue that of the header."""
    data, log = path.read_bytes(), SeedLog.read(path)
    assert log.parsed.changes == 0
    return [data[start : start + 20] for start in log.parsed.offsets]


@pytest.mark.parametrize(
    ("make", "tier"),
    [
        (plain, None),
        pytest.param(plain, "cpu", marks=pytest.mark.slow),
        pytest.param(lora, None, marks=pytest.mark.slow),
        (lora, "cpu"),
    ],
)
def test_all_three_write_the_same_steps(tmp_path: Path, make: Any, tier: str | None) -> None:
    rows = texts(24)
    data = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=default_data_collator)

    class InOrder(ZOTrainer):
        def get_train_dataloader(self) -> Any:
            return data

        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    model = make()
    zo = ZeroOrder(model, lr=1e-3, rule="momentum", weight_decay=0.1, seed=SEED, offload=tier)
    log = SeedLogWriter.attach(zo, tmp_path / "bare.zo")
    for batch in data:
        zo.step(lambda batch=batch: model(**batch).loss)
    log.close()
    zo.close()
    args = arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1, seed=SEED)
    hf = InOrder(model=make(), args=args, train_dataset=rows, zo_config=ZOConfig(rule="momentum", offload=tier))
    hf.train()
    module = Wrapped(model=make(), optimizer=sgd(1e-3, momentum=0.9, weight_decay=0.1))
    fitted(tmp_path, module, {"offload": tier, "seed": SEED}, data=data)
    logs = [tmp_path / "bare.zo", tmp_path / "out" / "seedlog.zo", tmp_path / "seedlog.zo"]
    bare, transformers, lightning = map(records, logs)
    assert bare == transformers == lightning
    assert len(bare) == 6
    trained = weights(model)
    for path in logs:
        for base in (make(), Wrapped(model=make()), nn.Sequential(make())):
            replay(base, path)
            assert all(torch.equal(a, b) for a, b in zip(weights(base).values(), trained.values(), strict=True))
    assert differing(trained, weights(make()))

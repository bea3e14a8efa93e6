"""Law: a checkpoint opened in place trains, saves and resumes as the same checkpoint in memory, and stays as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, texts, weights
from models import batch, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_zo import ZOTrainer, ZOTrainingArguments, from_pretrained_offloaded
from zo_core import ConfigError, ModelError, StateError, ZeroOrder
from zo_core.streaming import Streaming, read_header

CLASSES = {
    "llama": AutoModelForCausalLM,
    "opt": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "mixtral": AutoModelForCausalLM,
}


def mixtral() -> nn.Module:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **shape)
    )


def checkpoint(name: str, path: Path, layers: int = 2, **how: Any) -> Path:
    torch.manual_seed(0)
    (mixtral() if name == "mixtral" else tiny(name, layers=layers)).save_pretrained(path / "checkpoint", **how)
    return path / "checkpoint"


def inputs(name: str) -> dict[str, Tensor]:
    return batch("llama" if name in ("mixtral", "opt") else name)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_training_in_place_is_training_in_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = checkpoint(name, tmp_path)
    before = digests(path)
    resident = CLASSES[name].from_pretrained(path, dtype=dtype)
    streamed = from_pretrained_offloaded(CLASSES[name], path, dtype=dtype, offload_dir=tmp_path / "blocks")
    assert Streaming.of(streamed) is not None
    settings: dict[str, Any] = {"lr": 1e-3, "rule": "momentum", "weight_decay": 0.1, "num_probes": 2}
    engines = [ZeroOrder(model, **settings) for model in (resident, streamed)]
    data = inputs(name)
    for _ in range(5):
        a, b = (zo.step(lambda zo=zo: zo.model(**data).loss) for zo in engines)
        assert (a.loss, a.projected_grad) == (b.loss, b.projected_grad)
    assert differing(weights(resident), weights(streamed)) == []
    assert digests(path) == before
    streamed.save_pretrained(tmp_path / "saved")
    again = CLASSES[name].from_pretrained(tmp_path / "saved", dtype=dtype)
    assert differing(weights(resident), weights(again)) == []


def test_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    model = from_pretrained_offloaded(AutoModelForCausalLM, path, offload_dir=tmp_path / "blocks")
    assert not list((tmp_path / "blocks").iterdir())
    reference = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(model(**inputs("llama")).loss, reference(**inputs("llama")).loss)
    prompt = {"input_ids": inputs("llama")["input_ids"][:, :4], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**prompt), reference.generate(**prompt))


def test_a_trainer_takes_the_model_as_it_is(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    runs = []
    for where, model in (
        ("resident", AutoModelForCausalLM.from_pretrained(path)),
        ("streamed", from_pretrained_offloaded(AutoModelForCausalLM, path)),
    ):
        settings = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        args = arguments(tmp_path / where, ZOTrainingArguments, **settings)
        runs.append(ZOTrainer(model=model, args=args, train_dataset=texts(24)))
        runs[-1].train()
    assert differing(weights(runs[0].model), weights(runs[1].model)) == []
    resumed = ZOTrainer(
        model=from_pretrained_offloaded(AutoModelForCausalLM, path), args=runs[1].args, train_dataset=texts(24)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "streamed" / "out" / "checkpoint-2"))
    assert differing(weights(runs[0].model), weights(resumed.model)) == []


def test_adapters_on_a_checkpoint_in_place(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    models = []
    for base in (
        AutoModelForCausalLM.from_pretrained(path),
        from_pretrained_offloaded(AutoModelForCausalLM, path, offload_dir=tmp_path / "blocks"),
    ):
        torch.manual_seed(2)
        models.append(get_peft_model(base, LoraConfig(r=2, init_lora_weights=False)))
        zo = ZeroOrder(models[-1], lr=1e-2)
        for _ in range(3):
            zo.step(lambda model=models[-1]: model(**inputs("llama")).loss)
        zo.flush()
    adapters = [{n: p for n, p in model.named_parameters() if "lora_" in n} for model in models]
    assert adapters[0]
    assert differing(*adapters) == []
    assert not list((tmp_path / "blocks").iterdir())  # the base was never written


def test_a_class_without_auto_works_too(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    model = from_pretrained_offloaded(LlamaForCausalLM, path, blocks=["model.layers.1"])
    streaming = Streaming.of(model)
    assert streaming is not None
    assert [block.name for block in streaming.blocks] == ["model.layers.1"]
    assert ZeroOrder(model).step(lambda: model(**inputs("llama")).loss).skipped is None


def test_closing_the_engine_makes_it_an_ordinary_model(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    model = from_pretrained_offloaded(AutoModelForCausalLM, path)
    ZeroOrder(model).close()
    assert Streaming.of(model) is None
    assert differing(weights(AutoModelForCausalLM.from_pretrained(path)), weights(model)) == []


@pytest.mark.parametrize("damage", ["missing shard", "truncated"])
def test_a_damaged_checkpoint_is_a_clear_error(damage: str, tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path, max_shard_size="20KB")
    victim = sorted(path.glob("*.safetensors"))[-1]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        victim.unlink()
    with pytest.raises(StateError, match=victim.name):
        from_pretrained_offloaded(AutoModelForCausalLM, path)


def test_a_shard_that_vanishes_later_is_a_clear_error(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    model = from_pretrained_offloaded(AutoModelForCausalLM, path)
    (path / "model.safetensors").unlink()
    with pytest.raises(StateError, match="missing or damaged"):
        ZeroOrder(model).step(lambda: model(**inputs("llama")).loss)


def test_wrong_arguments_say_what_to_write(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="device_map= is set by"):
        from_pretrained_offloaded(AutoModelForCausalLM, path, device_map="auto")
    with pytest.raises(ConfigError, match="cannot be written to"):
        from_pretrained_offloaded(AutoModelForCausalLM, path, offload_dir="/proc/nowhere")
    with pytest.raises(ConfigError, match="not a module"):
        from_pretrained_offloaded(AutoModelForCausalLM, path, blocks=["model.layer"])
    shape = {
        "vocab_size": 64,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    AlbertForMaskedLM(AlbertConfig(**shape)).save_pretrained(tmp_path / "albert")
    with pytest.raises(ModelError, match="no repeated layers"):
        from_pretrained_offloaded(AutoModelForMaskedLM, tmp_path / "albert")


@pytest.mark.parametrize("changed", [False, True])
def test_the_start_of_a_decay_stays_in_the_checkpoint(changed: bool, tmp_path: Path) -> None:
    """Unless the weights were others by then, which are then kept beside those that move."""
    path = checkpoint("llama", tmp_path)
    resident = LlamaForCausalLM.from_pretrained(path)
    streamed = from_pretrained_offloaded(AutoModelForCausalLM, path, offload_dir=tmp_path / "blocks")
    settings: dict[str, Any] = {"rule": {"name": "sgd", "decay_to": "start"}, "lr": 1e-3, "weight_decay": 20.0}
    engines = [ZeroOrder(model, **settings) for model in (resident, streamed)]
    if changed:
        with torch.no_grad():
            for model in (resident, streamed):
                model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    data = inputs("llama")
    for zo in engines:
        for _ in range(3):
            zo.step(lambda zo=zo: zo.model(**data).loss)
        zo.flush()
    assert differing(weights(resident), weights(streamed)) == []
    assert engines[1].distance() == pytest.approx(engines[0].distance(), rel=1e-12)
    files = [header for file in (tmp_path / "blocks").iterdir() for header in read_header(file)]
    assert [name for name in files if name.endswith("#anchor")] == ["mlp.up_proj.weight#anchor"] * changed
    saved = engines[1].state_dict()["optimizer"]["state"]
    starts = [saved[index]["anchor"] for index in sorted(saved)]
    kept = engines[0].state_dict()["optimizer"]["state"]
    assert all(torch.equal(kept[index]["anchor"], start) for index, start in zip(sorted(kept), starts, strict=True))
    engines[1].close()
    for _ in range(2):
        for zo in engines:
            zo.step(lambda zo=zo: zo.model(**data).loss)
    assert differing(weights(resident), weights(streamed)) == []


def test_what_does_not_move_stays_in_the_checkpoint(tmp_path: Path) -> None:
    path = checkpoint("llama", tmp_path)
    model = from_pretrained_offloaded(AutoModelForCausalLM, path, offload_dir=tmp_path / "blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    zo = ZeroOrder(model, lr=1e-3)
    for _ in range(2):
        zo.step(lambda: model(**inputs("llama")).loss)
    zo.flush()
    assert {name for file in (tmp_path / "blocks").iterdir() for name in read_header(file)} == {"mlp.up_proj.weight"}


def test_a_checkpoint_that_is_written_over_is_a_clear_error(tmp_path: Path) -> None:
    """The start of a decay, and weights that do not move, would be other ones from there on."""
    path = checkpoint("llama", tmp_path, layers=5)  # more than are in memory at a time
    model = from_pretrained_offloaded(AutoModelForCausalLM, path, offload_dir=tmp_path / "blocks")
    zo = ZeroOrder(model, rule={"name": "sgd", "decay_to": "start"}, lr=1e-3, weight_decay=0.5)
    zo.step(lambda: model(**inputs("llama")).loss)
    model.save_pretrained(tmp_path / "elsewhere")
    zo.step(lambda: model(**inputs("llama")).loss)
    model.save_pretrained(path)
    with pytest.raises(StateError, match="save to another folder"):
        zo.step(lambda: model(**inputs("llama")).loss)

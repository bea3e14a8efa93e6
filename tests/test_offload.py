"""Law: a streamed model has the losses and the weights of a resident one, bit for bit."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from zo_core import ConfigError, ModelError, StateError, ZeroOrder, ZOError
from zo_core.offload import Streaming

TIERS = ("cpu", "disk")

#: What `make` builds takes 30 to 120 kB; in this some blocks stay, and some are streamed.
SOME = "60KB"
STEPS = 20
slow = pytest.mark.slow


def probes_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("zo-probe")}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while probes_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not probes_threads()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
        )
    )


def make(name: str, tied: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    if name == "mixtral":
        return mixtral().to(dtype), batch("llama")
    return tiny(name, tied=tied, dtype=dtype), batch(name)


LAYERS = 6


def deep() -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama of six equal layers."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape)), batch("llama")


def train(
    model: nn.Module,
    inputs: dict[str, Tensor],
    offload: str | None,
    folder: Path,
    steps: int = STEPS,
    wrap: Callable[[], Any] | None = None,
    **settings: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and projected gradients, an evaluation in between, and the final weights."""
    place = {"offload": offload, **({"offload_dir": str(folder)} if offload == "disk" else {})}
    zo = ZeroOrder(model, **{"lr": 1e-3, **settings, **place})
    scheduler = torch.optim.lr_scheduler.LinearLR(zo.optimizer, 0.2, total_iters=steps)
    torch.manual_seed(1)
    numbers = []
    for step in range(steps):

        def closure() -> Tensor:
            if wrap is None:
                return model(**inputs).loss
            with wrap():
                return model(**inputs).loss

        record = zo.step(closure)
        scheduler.step()
        numbers += [record.loss, record.projected_grad]
        if step == steps // 2:
            with torch.no_grad():
                numbers.append(float(model(**inputs).loss))
    return numbers, {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a: tuple[list[float], dict[str, Tensor]], b: tuple[list[float], dict[str, Tensor]]) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert [name for name in a[1] if not torch.equal(a[1][name], b[1][name])] == []


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, decay, 4 probes": {"rule": "momentum", "weight_decay": 0.1, "num_probes": 4},
    "fzoo": {"estimator": "fzoo", "num_probes": 3},
    "sign, gaussian": {"rule": "sign", "noise": "gaussian", "lr": 1e-4},
}


@pytest.mark.parametrize("tier", ["cpu", pytest.param("disk", marks=slow)])
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5", "mixtral"])
@pytest.mark.parametrize(
    "settings",
    [pytest.param(value, id=name, marks=() if name == "plain" else slow) for name, value in SETTINGS.items()],
)
def test_streamed_equals_resident(name: str, settings: dict[str, Any], tier: str, tmp_path: Path) -> None:
    resident = train(*make(name), None, tmp_path, **settings)
    assert_equal(train(*make(name), tier, tmp_path, **settings), resident)


@pytest.mark.parametrize("tier", ["disk", pytest.param("cpu", marks=slow)])
@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=slow), pytest.param("mixtral", marks=slow)])
def test_streamed_equals_resident_in_bf16_untied(name: str, tier: str, tmp_path: Path) -> None:
    resident = train(*make(name, tied=False, dtype=torch.bfloat16), None, tmp_path)
    assert_equal(train(*make(name, tied=False, dtype=torch.bfloat16), tier, tmp_path), resident)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_streamed_equals_resident_with_dropout_and_layerdrop(name: str, tmp_path: Path) -> None:
    def dropping() -> tuple[nn.Module, dict[str, Tensor]]:
        model, inputs = make(name)
        for module in model.modules():
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.5  # probes then visit different numbers of blocks in different steps
        return model.train(), inputs

    results = []
    for tier in (None, "cpu"):
        results.append(train(*dropping(), tier, tmp_path, dropout=True, num_probes=2))
        results[-1][0].append(float(torch.rand(())))  # and the global generator stands where it should
    assert_equal(*results)


def test_streamed_equals_resident_under_autocast(tmp_path: Path) -> None:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    resident = train(*make("llama"), None, tmp_path, wrap=autocast)
    assert_equal(train(*make("llama"), "cpu", tmp_path, wrap=autocast), resident)
    with autocast():
        assert_equal(train(*make("llama"), "cpu", tmp_path), train(*make("llama"), None, tmp_path))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
@pytest.mark.parametrize("tier", TIERS)
def test_adapters_train_on_a_streamed_base_that_is_never_written(tier: str, tmp_path: Path) -> None:
    def adapted() -> tuple[nn.Module, dict[str, Tensor]]:
        model, inputs = make("llama")
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)), inputs

    assert_equal(train(*adapted(), tier, tmp_path), train(*adapted(), None, tmp_path))
    model, inputs = adapted()
    zo = ZeroOrder(model, offload=tier)
    zo.step(lambda: model(**inputs).loss)
    streamed = {name for block in zo.streaming.blocks for name in block.holders}
    assert streamed
    assert not any("lora_" in name for name in streamed)
    zo.flush()
    assert zo.streaming.bytes_written == 0
    zo.close()


def test_micro_batches_of_a_step_are_summed(tmp_path: Path) -> None:
    results = []
    for tier in (None, "cpu"):
        model, inputs = make("llama")
        zo = ZeroOrder(model, lr=1e-3, offload=tier)
        for _ in range(3):
            for part in (slice(0, 1), slice(1, None)):
                piece = {name: value[part] for name, value in inputs.items()}
                zo.measure(lambda model=model, piece=piece: model(**piece).loss)
            zo.optimizer.step()
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_evicted_parameters_keep_shape_and_count_and_are_nan() -> None:
    model, _ = make("llama")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    zo = ZeroOrder(model, offload="cpu")
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    for block in zo.streaming.blocks:
        for holders in block.holders.values():
            assert bool(holders[0].isnan().all())


def test_a_step_writes_each_block_once_and_reads_it_once() -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload="cpu", num_probes=2)
    zo.streaming.arenas = zo.streaming.arenas[:1]  # so that no block can stay from one sweep to the next
    for _ in range(3):
        zo.step(lambda: model(**inputs).loss)
    zo.flush()
    size = sum(block.nbytes for block in zo.streaming.blocks)
    assert zo.streaming.bytes_written == 3 * size
    assert zo.streaming.bytes_read <= 4 * size


@pytest.mark.parametrize("settings", [{"offload": "auto"}, {"offload": "cpu"}, {"offload": "disk"}], ids=str)
@pytest.mark.parametrize("memory", [None, SOME, "1GB", 1])
def test_what_fits_stays_and_the_rest_is_streamed(memory: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    expected = train(*deep(), None, tmp_path)
    model, _ = deep()
    zo = ZeroOrder(model, offload=settings["offload"], device_memory=memory)
    count = 0 if zo.streaming is None else len(zo.streaming.blocks)
    resident = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
    if memory == "1GB" or (memory is None and settings["offload"] == "auto"):
        assert count == 0
    elif memory == SOME:
        assert 0 < count < LAYERS
        assert zo.streaming is not None
        streamed = sum(block.nbytes for block in zo.streaming.blocks)
        arena = sum(slot.numel() for slot in zo.streaming.arenas)
        largest = max(block.nbytes for block in zo.streaming.blocks)
        # What stays and the arena are within the limit, and one more block would not have been.
        assert resident - streamed + arena <= 60_000 < resident - streamed + arena + largest
    else:
        assert count == LAYERS
    zo.close()
    limit = {} if memory is None else {"device_memory": memory}
    assert_equal(train(*deep(), settings["offload"], tmp_path, **limit), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_momentum_travels_with_its_block(tier: str, tmp_path: Path) -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, lr=1e-3, rule="momentum", offload=tier)
    for _ in range(3):
        zo.step(lambda: model(**inputs).loss)
    streamed = [p for p in model.parameters() if p.requires_grad and p.isnan().any()]
    assert streamed
    assert all(zo.optimizer.state[p]["momentum"].untyped_storage().nbytes() == 4 for p in streamed)  # one NaN
    twin, _ = make("llama")
    resident = ZeroOrder(twin, lr=1e-3, rule="momentum")
    for _ in range(3):
        resident.step(lambda: twin(**inputs).loss)
    ours, theirs = zo.optimizer.state_dict()["state"], resident.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[index]["momentum"], theirs[index]["momentum"]) for index in theirs)
    zo.close()  # brings it back
    for engine, net in ((zo, model), (resident, twin)):
        engine.step(lambda net=net: net(**inputs).loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_second_engine_starts_without_the_momentum_of_the_first() -> None:
    model, inputs = make("llama")
    twin, _ = make("llama")
    for _ in range(2):
        zo = ZeroOrder(model, lr=1e-3, rule="momentum", **({"offload": "cpu"} if Streaming.of(model) is None else {}))
        resident = ZeroOrder(twin, lr=1e-3, rule="momentum")
        for _ in range(2):
            zo.step(lambda: model(**inputs).loss)
            resident.step(lambda: twin(**inputs).loss)
    zo.close()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_one_line_of_log_says_what_is_where(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, _ = make("llama")
    with caplog.at_level("INFO", logger="zo_core"):
        ZeroOrder(model, offload="disk", offload_dir=str(tmp_path))
    (line,) = [record.getMessage() for record in caplog.records if "streamed from" in record.getMessage()]
    assert str(tmp_path) in line
    assert "a step reads" in line


@pytest.mark.parametrize("tier", TIERS)
def test_a_state_dict_is_whole_and_loading_one_reaches_the_store(tier: str, tmp_path: Path) -> None:
    model, inputs = make("llama")
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    zo = ZeroOrder(model, lr=1e-2, offload=tier)
    zo.step(lambda: model(**inputs).loss)
    moved = model.state_dict()
    assert not any(value.isnan().any() for value in moved.values())
    assert any(not torch.equal(moved[name], fresh[name]) for name in moved)
    model.load_state_dict(fresh)
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, make("llama")[0].eval()(**inputs).loss)


@pytest.mark.parametrize("tier", TIERS)
def test_saving_and_resuming_continues_bit_for_bit(tier: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr": 1e-3, "rule": "momentum"}
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload=tier, **settings)
    for step in range(6):
        if step == 3:
            torch.save({"model": model.state_dict(), "zo": zo.state_dict()}, tmp_path / "checkpoint")
        zo.step(lambda: model(**inputs).loss)
    again, _ = make("llama")
    saved = torch.load(tmp_path / "checkpoint")
    other = ZeroOrder(again, offload=tier, **settings)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["zo"])
    for _ in range(3):
        other.step(lambda: again(**inputs).loss)
    straight = model.state_dict()
    assert all(torch.equal(value, straight[name]) for name, value in again.state_dict().items())


def test_generate_works_on_a_streamed_model() -> None:
    model, inputs = make("llama")
    prompt = {"input_ids": inputs["input_ids"][:, :4], "max_new_tokens": 5, "do_sample": False}
    expected = model.eval().generate(**prompt)
    zo = ZeroOrder(model, offload="cpu")
    assert torch.equal(model.generate(**prompt), expected)
    zo.close()
    assert torch.equal(model.generate(**prompt), expected)


def test_closing_gives_ordinary_parameters_back() -> None:
    model, inputs = make("llama")
    reference, _ = make("llama")
    zo, resident = ZeroOrder(model, lr=1e-3, offload="cpu"), ZeroOrder(reference, lr=1e-3)
    zo.step(lambda: model(**inputs).loss)
    zo.close()
    zo.step(lambda: model(**inputs).loss)
    for _ in range(2):
        resident.step(lambda: reference(**inputs).loss)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_exception_in_a_probe_harms_nothing() -> None:
    model, inputs = make("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zo = ZeroOrder(model, lr=1e-3, offload="cpu")
    calls = []

    def failing() -> Tensor:
        calls.append(None)
        loss = model(**inputs).loss
        if len(calls) == 2:
            raise KeyError("second probe")
        return loss

    with pytest.raises(KeyError, match="second probe"):
        zo.step(failing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert zo.step(lambda: model(**inputs).loss).skipped is None


def test_a_torch_optimizer_needs_all_weights_at_once() -> None:
    model, _ = make("llama")
    with pytest.raises(ConfigError, match="one layer at a time"):
        ZeroOrder(model, offload="cpu", optimizer=torch.optim.Adam(model.parameters()))


def test_a_model_without_repeated_layers_is_a_clear_error() -> None:
    albert = AlbertForMaskedLM(
        AlbertConfig(vocab_size=64, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    )
    with pytest.raises(ModelError, match="no repeated layers"):
        ZeroOrder(albert, offload="cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload": "gpu"}, "'cpu', 'disk'"),
        ({"offload": "cpu", "offload_dir": "x"}, "offload='disk'"),
        ({"offload": "auto", "device_memory": "8 cats"}, "as in '8GB'"),
        ({"device_memory": "8GB"}, "no use without offload"),
        ({"device": "cuda"}, "no use without offload"),
        ({"offload": "cpu", "blocks": ("model.layer",)}, "not a module"),
        ({"offload": "disk", "offload_dir": "/proc/nowhere"}, "cannot be written"),
    ],
)
def test_bad_settings_are_clear_errors_and_leave_the_model_alone(settings: dict[str, Any], words: str) -> None:
    model, inputs = make("llama")
    with pytest.raises(ZOError, match=words):
        ZeroOrder(model, **settings)
    with torch.no_grad():
        assert bool(model(**inputs).loss.isfinite())


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_block_file_is_a_clear_error(damage: str, tmp_path: Path) -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload="disk", offload_dir=str(tmp_path))
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(StateError, match=r"missing or damaged"):
        zo.step(lambda: model(**inputs).loss)


def test_temporary_block_files_go_away_with_the_model() -> None:
    model, inputs = make("llama")
    zo = ZeroOrder(model, offload="disk")
    folder = zo.streaming.store.folder
    zo.step(lambda: model(**inputs).loss)
    assert list(folder.glob("*.safetensors"))
    zo.close()
    del zo
    gc.collect()
    assert not folder.exists()


def test_named_blocks_are_streamed_and_others_stay() -> None:
    model, _ = make("llama")
    zo = ZeroOrder(model, offload="cpu", blocks=("model.layers.1",))
    assert [block.name for block in zo.streaming.blocks] == ["model.layers.1"]
    assert not bool(model.model.layers[0].mlp.up_proj.weight.isnan().any())

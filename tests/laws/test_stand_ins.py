"""Law: whoever reads parameters between steps sees the weights as they are, and the run does not depend on it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, closure, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from traces import same_bits
from transformers.pytorch_utils import Conv1D

from zo_core import LowRank, StateError, ZeroOrder
from zo_core.stand_ins import WITHOUT_VALUES, StandIn, ordinary, stand_in

WINDOW = LowRank(refresh=3)
PLACES: list[dict[str, Any]] = [
    {"noise": WINDOW},
    {"noise": WINDOW, "rule": "momentum", "weight_decay": 0.1},
    {"offload": "cpu"},
    {"offload": "disk", "rule": "momentum"},
    {"offload": "cpu", "noise": WINDOW},
]
EVERYWHERE = pytest.mark.parametrize("settings", PLACES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def engine(dtype: torch.dtype = torch.float32, **settings: Any) -> ZeroOrder:
    return ZeroOrder(tiny("llama", dtype=dtype), lr=1e-3, **settings)


def step(zo: ZeroOrder, index: int) -> None:
    zo.step(closure("llama", zo.model, index))


def true_weights(zo: ZeroOrder) -> dict[str, Tensor]:
    """The weights as a checkpoint has them: of a copy of the run, closed."""
    return true_weights_of(zo.model)


def true_weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def plainly(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


#: What callbacks, averages and users do.
READERS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "detach": plainly,
    "data": lambda model: {name: p.data.clone() for name, p in model.named_parameters()},
    "copy_": lambda model: {n: torch.empty_like(p).detach().copy_(p) for n, p in model.named_parameters()},
    "numpy": lambda model: {
        name: torch.from_numpy(p.detach().float().numpy().copy()).to(p.dtype) for name, p in model.named_parameters()
    },
    "deep copy": lambda model: plainly(copy.deepcopy(model)),
    "pickle of a parameter": lambda model: {
        name: pickle.loads(pickle.dumps(p)).detach() for name, p in model.named_parameters()
    },
    "foreach": lambda model: dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch._foreach_mul([p.detach() for p in model.parameters()], 1.0),
            strict=True,
        )
    ),
    "state_dict": lambda model: {name: model.state_dict()[name].clone() for name, _ in model.named_parameters()},
    "arithmetic": lambda model: {name: (p * 1).detach() for name, p in model.named_parameters()},
}


@EVERYWHERE
@pytest.mark.parametrize("reader", READERS)
def test_readers_see_the_weights_and_disturb_nothing(reader: str, settings: dict[str, Any]) -> None:
    zo, alone = engine(**settings), engine(**settings)
    for index in range(7):
        step(zo, index)
        step(alone, index)
        seen = READERS[reader](zo.model)
        expected = {name: true_weights(alone)[name] for name in seen}
        assert same_bits(seen, expected)
    zo.close()
    alone.close()
    assert same_bits(plainly(zo.model), plainly(alone.model))


@DTYPES
@EVERYWHERE
def test_what_is_written_counts_from_the_next_step_on(settings: dict[str, Any], dtype: torch.dtype) -> None:
    zo = engine(dtype, **settings)
    for index in range(4):
        step(zo, index)
    before = plainly(zo.model)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"]
    named = dict(zo.model.named_parameters())
    with torch.no_grad():
        for name in names:
            named[name].data.mul_(2.0)  # a swap of averaged weights writes like this
    after = plainly(zo.model)
    assert all(torch.equal(after[name], before[name] * (2.0 if name in names else 1.0)) for name in before)
    zo.lr = 0.0
    step(zo, 4)
    assert same_bits(plainly(zo.model), after) or settings.get("rule") == "momentum"
    assert same_bits({name: zo.model.state_dict()[name] for name in after}, plainly(zo.model))
    zo.close()
    if settings.get("rule") != "momentum":
        assert same_bits(plainly(zo.model), after)


@EVERYWHERE
def test_data_that_is_put_in_the_place_of_what_nobody_has_read_counts(settings: dict[str, Any]) -> None:
    """As a swap back from averaged weights does."""
    zo = engine(**settings)
    for index in range(2):
        step(zo, index)
    weight = zo.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert isinstance(weight, StandIn)
    wanted = torch.full(weight.shape, 0.5)  # which reads nothing of it
    weight.data = wanted.clone()
    assert torch.equal(weight, wanted)
    zo.lr = 0.0
    step(zo, 2)
    zo.close()
    assert torch.equal(weight, wanted) or settings.get("rule") == "momentum"


def descend(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for index in range(2):
        closure("llama", model.eval(), index)().backward()
        optimizer.step()
        optimizer.zero_grad()


def replace(model: nn.Module) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.clone() * 0.5


#: What users do with a trained model.
WRITERS: dict[str, Callable[[nn.Module], object]] = {
    "half": nn.Module.half,
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "double": nn.Module.double,
    "another data": replace,
    "in place": lambda model: torch.nn.init.constant_(model.lm_head.weight, 0.01),
    "vector": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()).detach() * 0.9, model.parameters()
    ),
    "backpropagation": descend,
}


def waiting(settings: dict[str, Any], tied: bool = True) -> tuple[ZeroOrder, nn.Module]:
    """An engine inside of a window, and an ordinary model with its weights."""
    zo = ZeroOrder(tiny("llama", tied=tied), lr=1e-3, **settings)
    for index in range(5):
        step(zo, index)
    plain = tiny("llama", tied=tied)
    plain.load_state_dict(true_weights(zo))
    return zo, plain


@pytest.mark.parametrize("settings", PLACES[:2], ids=str)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_model_that_is_written_inside_of_a_window_is_as_an_ordinary_one(
    writer: str, settings: dict[str, Any]
) -> None:
    zo, plain = waiting(settings, tied=writer != "another data")
    logits = []
    for model in (zo.model, plain):
        WRITERS[writer](model)
        with torch.no_grad():
            logits.append(model.eval()(**batch("llama")).logits)
    assert logits[0].dtype == logits[1].dtype
    assert torch.allclose(*logits, rtol=0.0, atol=1e-5)
    exact = writer != "backpropagation"  # whose forward computes with the factors, which rounds other sums
    for seen in (plainly, true_weights_of, lambda model: plainly(copy.deepcopy(model))):
        ours, theirs = seen(zo.model), seen(plain)
        assert same_bits(ours, theirs) if exact else all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in ours)
    zo.close()
    assert {p.dtype for p in zo.model.parameters()} == {p.dtype for p in plain.parameters()}


@pytest.mark.parametrize("writer", ["half", "to bfloat16", "in place", "another data"])
def test_a_forward_after_a_write_does_not_change_the_run(writer: str) -> None:
    ends = []
    for look in (False, True):
        zo, plain = waiting(PLACES[1], tied=False)
        for model in (zo.model, plain):
            WRITERS[writer](model)
        if look:
            with torch.no_grad():
                closure("llama", zo.model)()
        records = []
        for index in range(5, 9):
            records.append(zo.step(closure("llama", zo.model, index)).as_dict())
        assert {p.dtype for p in zo.model.parameters()} == {p.dtype for p in plain.parameters()}
        zo.close()
        ends.append((records, plainly(zo.model)))
    assert ends[0][0] == ends[1][0]
    assert same_bits(ends[0][1], ends[1][1])


def test_an_engine_takes_over_a_model_that_was_converted_inside_of_a_window() -> None:
    zo, plain = waiting(PLACES[0])
    losses = []
    for model in (zo.model, plain):
        model.to(torch.bfloat16)
        second = ZeroOrder(model, lr=1e-3, noise=WINDOW)
        losses.append([second.step(closure("llama", model, index)).loss for index in range(5)])
        second.close()
    assert losses[0] == losses[1]
    assert same_bits(plainly(zo.model), plainly(plain))
    assert {p.dtype for p in zo.model.parameters()} == {torch.bfloat16}


def test_another_memory_format_stays() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 1)), torch.randn(3, 4, 8, 8)
    zo = ZeroOrder(model, lr=1e-2, noise=WINDOW)
    for after in (False, True):
        zo.step(lambda: model(x).square().mean())
        model.to(memory_format=torch.channels_last)
        model(x)
        if after:
            zo.close()
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


class Uses(nn.Module):
    """Every way to use a matrix: those with a form for low rank, a convolution, and a product of its transpose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(4, 8, 3), Conv1D(16, 8 * 36), Conv1D(16, 16)
        self.third, self.head = nn.Linear(16, 16), nn.Linear(16, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x)).flatten(1)
        return self.third(torch.tanh(self.second(torch.tanh(self.first(hidden))))) @ self.head.weight.t()


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
def test_gradients_are_those_of_an_ordinary_model(weight_decay: float) -> None:
    """Also if parameters are read before the backward pass."""
    trained, plain, x = Uses(), Uses(), torch.randn(5, 4, 8, 8)
    zo = ZeroOrder(trained, lr=1e-2, seed=3, noise=WINDOW, weight_decay=weight_decay)
    for _ in range(5):
        zo.step(lambda: (trained(x) - 1).square().mean())
    plain.load_state_dict(true_weights(zo))
    for model in (trained, plain):
        loss = (model(x) - 1).square().mean()
        assert all(parameter.norm().isfinite() for parameter in model.parameters())
        loss.backward()
    for name, parameter in plain.named_parameters():
        ours = trained.get_parameter(name).grad
        assert ours is not None, name
        assert torch.allclose(ours, parameter.grad, rtol=0.0, atol=1e-6), name


def test_what_would_be_lost_while_the_model_computes_with_the_window_is_an_error() -> None:
    zo, plain = waiting(PLACES[0])
    with torch.no_grad(), zo.effective():
        for write in (
            zo.close,
            zo.state_dict,
            lambda: step(zo, 5),
            lambda: zo.model.load_state_dict(plain.state_dict()),
        ):
            with pytest.raises(StateError, match=r"cannot be stepped, closed or saved, .* inside of zo.effective\(\)"):
                write()
    assert same_bits(plainly(zo.model), plainly(plain))
    zo.close()
    assert same_bits(plainly(zo.model), plainly(plain))


def test_a_context_of_effective_weights_adds_the_updates_once() -> None:
    """Also where a trainer's evaluation opens another one in it."""
    zo, _ = waiting(PLACES[0])
    loss = closure("llama", zo.model.eval())
    with torch.no_grad():
        expected = loss()
        with zo.effective(), zo.effective():
            assert torch.equal(loss(), expected)
        assert torch.equal(loss(), expected)


@pytest.mark.parametrize("settings", PLACES[3:], ids=str)
def test_a_streamed_weight_that_is_written_counts_in_the_next_forward(settings: dict[str, Any]) -> None:
    settings = {**settings, "noise": WINDOW}
    zo, plain = waiting(settings)
    with torch.no_grad():
        for model in (zo.model, plain):
            model.model.layers[0].mlp.up_proj.weight.mul_(-2.0)
        assert abs(closure("llama", zo.model.eval())() - closure("llama", plain.eval())()) <= 1e-6
    zo.close()


@EVERYWHERE
def test_a_deep_copy_computes_what_the_model_computes(settings: dict[str, Any]) -> None:
    zo = engine(**settings)
    for index in range(4):
        step(zo, index)
    copied = copy.deepcopy(zo.model).eval()
    zo.close()
    loss = closure("llama", copied)
    with torch.no_grad():
        assert torch.equal(loss(), closure("llama", zo.model.eval())())
    fresh = ZeroOrder(copied, lr=1e-3)
    fresh.step(loss)
    assert all(parameter.isfinite().all() for parameter in copied.parameters())


@EVERYWHERE
def test_an_average_of_the_weights_is_their_average(settings: dict[str, Any]) -> None:
    zo, alone = engine(**settings), engine(**settings)
    averaged = torch.optim.swa_utils.AveragedModel(tiny("llama"), multi_avg_fn=None)
    expected: dict[str, Tensor] = {}
    for index in range(5):
        step(zo, index)
        step(alone, index)
        averaged.update_parameters(zo.model)
        now = true_weights(alone)
        count = index + 1
        expected = {
            name: value if index == 0 else expected[name] + (value - expected[name]) / count
            for name, value in now.items()
        }
    for name, value in averaged.module.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=0.0, atol=1e-6)  # torch may sum in another order


def test_adapters_are_merged_with_the_last_window() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ends = []
    for close in (True, False):
        torch.manual_seed(1)
        model = get_peft_model(tiny("llama", tied=False), config)
        zo = ZeroOrder(model, lr=1e-2, eps=1e-2, noise="low_rank")
        for index in range(4):
            zo.step(closure("llama", model, index))
        if close:
            zo.close()
        ends.append(plainly(model.merge_and_unload()))
    assert same_bits(*ends)


@pytest.mark.parametrize("settings", [{"noise": WINDOW}, {"offload": "cpu"}], ids=str)
def test_metadata_and_no_ops_bring_nothing(settings: dict[str, Any]) -> None:
    zo = engine(**settings)
    step(zo, 0)
    behind = [p for p in zo.model.parameters() if isinstance(p, StandIn)]
    assert behind
    zo.model.to("cpu").to(torch.float32).requires_grad_(True).train()
    zo.model.zero_grad()
    assert sum(p.numel() * p.element_size() for p in zo.model.parameters())
    assert {(p.device.type, p.dtype, p.ndim > 0, p.is_leaf) for p in zo.model.parameters()}
    assert zo.model.num_parameters() > 0
    assert all(isinstance(p, StandIn) for p in behind)
    assert all(isinstance(p, nn.Parameter) for p in behind)


def test_of_a_model_larger_than_the_memory_one_block_is_there_at_a_time() -> None:
    zo = engine(offload="cpu")
    step(zo, 0)
    for parameter in zo.model.parameters():
        parameter.norm()
    assert {block.name for block, _ in zo.streaming.read} == {"model.layers.1"}
    held = [parameter.data for parameter in zo.model.parameters()]  # who holds on to what was read keeps it
    assert {block.name for block, _ in zo.streaming.read} == {"model.layers.0", "model.layers.1"}
    assert all(value.isfinite().all() for value in held)


def test_after_training_parameters_are_ordinary(tmp_path: Path) -> None:
    for settings in PLACES:
        zo = engine(**settings)
        step(zo, 0)
        zo.close()
        assert all(type(p) is nn.Parameter and not vars(p) for p in zo.model.parameters())


def test_a_stand_in_is_the_same_object_with_another_class() -> None:
    parameter, real = nn.Parameter(torch.zeros(())), torch.arange(6.0).view(2, 3)
    parameter.data = torch.zeros(()).expand(2, 3)

    def bring() -> None:
        ordinary(parameter)
        parameter.data = real

    stand_in(parameter, bring)
    assert isinstance(parameter, nn.Parameter)
    assert parameter.shape == (2, 3)
    assert isinstance(parameter, StandIn)
    assert (parameter + 1).sum().item() == 21
    assert type(parameter) is nn.Parameter


def test_functions_without_values_are_known_by_what_torch_calls_them() -> None:
    assert torch.Tensor.detach not in WITHOUT_VALUES
    assert torch.Tensor.data.__get__ not in WITHOUT_VALUES
    assert torch.Tensor.shape.__get__ in WITHOUT_VALUES
    assert torch.Tensor.is_cuda.__get__ in WITHOUT_VALUES

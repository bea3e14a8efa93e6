"""Law: memory that several tensors show is one slot, moved in all of them by a probe, once by a step; or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_helpers import in_memory
from torch import Tensor, nn

from zo_core import ModelError, SeedLog, SeedLogWriter, ZeroOrder, ZOConfig, ZOOptimizer, replay
from zo_core.records import Point
from zo_core.targets.memory import Chart, extent, shows_twice

LR, EPS, DECAY = 1e-2, 1e-2, 0.1
Cut = Callable[[Tensor], tuple[Tensor, Tensor]]

#: How two tensors are cut from memory of 24 elements; the first is trainable, and shows all that the second shows.
WHOLE: dict[str, Cut] = {
    "transposed": lambda m: (m.view(6, 4), m.view(6, 4).t()),
    "the first is the transposed one": lambda m: (m.view(6, 4).t(), m.view(6, 4)),
    "reshaped": lambda m: (m.view(6, 4), m.view(2, 12)),
    "flat": lambda m: (m.view(6, 4), m),
    "the first is flat": lambda m: (m, m.view(6, 4).t()),
    "permuted": lambda m: (m.view(2, 3, 4), m.view(2, 3, 4).permute(2, 0, 1)),
    "in steps": lambda m: (m.view(6, 4)[:, ::2], m.view(6, 4)[:, ::2].t()),
    "in a corner": lambda m: (m.view(6, 4)[1:5, 1:3], m.view(6, 4)[1:5, 1:3].t()),
}
#: The same, where the second shows less, or more.
PARTLY: dict[str, Cut] = {
    "a slice": lambda m: (m.view(6, 4), m.view(6, 4)[2]),
    "a column": lambda m: (m.view(6, 4), m.view(6, 4)[:, 1]),
    "all of it": lambda m: (m.view(6, 4)[2:4], m.view(6, 4)),
    "columns of all of it": lambda m: (m.view(6, 4)[:, 1:3], m.view(6, 4).t()),
    "some elements": lambda m: (m[:15].view(3, 5), m[10:20]),
}
KINDS = ("trainable", "frozen", "buffer", "attribute")
MODES: dict[str, dict[str, Any]] = {
    "rademacher": {},
    "gaussian": {"noise": "gaussian", "num_probes": 2},
    "momentum": {"rule": "momentum"},
    "fzoo": {"estimator": "fzoo"},
    "low_rank": {"noise": "low_rank", "num_probes": 2},
    "stacked": {"noise": "low_rank", "num_probes": 2, "stack_probes": True},
    "streamed": {"offload": "cpu"},
    "streamed low_rank": {"noise": "low_rank", "offload": "cpu"},
}


class Layer(nn.Module):
    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Sharing(nn.Module):
    """Its loss uses both tensors, each in a module of its own, with layers that can be streamed between the uses."""

    def __init__(self, cut: Cut, kind: str = "trainable", dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        first, second = cut(torch.randn(24, generator=generator).to(dtype))
        self.one, self.other = nn.Module(), nn.Module()
        self.one.weight = nn.Parameter(first)
        self.layers = nn.ModuleList(Layer(nn.Linear(8, 8, bias=False, dtype=dtype)) for _ in range(3))
        with torch.no_grad():
            for layer in self.layers:
                layer.inner.weight.copy_(torch.randn(8, 8, generator=generator) / 3).requires_grad_(False)
        if kind in ("trainable", "frozen"):
            self.other.weight = nn.Parameter(second, requires_grad=kind == "trainable")
        elif kind == "buffer":
            self.other.register_buffer("weight", second)
        else:
            self.other.weight = second

    def forward(self) -> Tensor:
        one, other = self.one.weight, self.other.weight
        hidden = torch.linspace(-1, 1, 8, dtype=one.dtype)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            weight = one if index == 0 else other
            hidden = hidden * torch.cos(weight.reshape(-1).repeat(8)[: hidden.numel()] * (1 + index))
        by_place = torch.arange(1.0, other.numel() + 1).view(other.shape)
        return hidden.float().sum() + (other.float() * by_place).sum().tanh() + one.float().pow(2).sum() / 9


class InPlace:
    """The obvious way: writes perturbed values into the memory itself, and what was there back."""

    def __init__(self, model: nn.Module, zo: ZeroOrder):
        self.model, self.zo = model.eval(), zo

    def direction(self, seed: int, scale: float) -> Tensor:
        (slot,) = self.zo.slots
        z = self.zo.noise.direction(slot.key, slot.tensor.shape, ((seed, scale),))
        return z.values(slot.tensor.shape, torch.device("cpu"))

    def loss(self, point: Point) -> float:
        weight = self.model.one.weight.data
        saved = weight.clone()
        weight.copy_(weight + self.direction(point.seed, point.scale))
        with torch.no_grad():
            result = float(self.model())
        weight.copy_(saved)
        return result


def held(model: Sharing) -> tuple[Tensor, Tensor]:
    return model.one.weight.detach().clone(), model.other.weight.detach().clone()


def shown_alike(model: Sharing, cut: Cut) -> bool:
    """Whether the two tensors are still cut from one piece of memory."""
    one, other = cut(torch.zeros(24))
    apart = other.data_ptr() - one.data_ptr()
    return model.other.weight.data_ptr() - model.one.weight.data_ptr() == apart


CASES = [(name, "trainable") for name in WHOLE] + [(n, kind) for n in (*WHOLE, *PARTLY) for kind in KINDS[1:]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_probe_shows_the_move_in_all_tensors_and_a_step_makes_it_once(name: str, kind: str, mode: str) -> None:
    cut = {**WHOLE, **PARTLY}[name]
    model, other = Sharing(cut, kind).eval(), Sharing(cut, kind).eval()
    zo = ZeroOrder(model, lr=LR, eps=EPS, weight_decay=DECAY, **MODES[mode])
    assert [slot.key for slot in zo.slots] == ["weight"] or [slot.key for slot in zo.slots] == ["one.weight"]
    reference = InPlace(other, ZeroOrder(other, ZOConfig(**{**MODES[mode], "offload": None})))
    before = held(model)
    points = (Point(11, EPS), Point(11, -EPS), Point(12, 0.0))
    found = [loss.item() for loss in zo.oracle.losses(points, model)]
    assert found == [reference.loss(point) for point in points]
    assert all(map(torch.equal, held(model), before))
    record = zo.step(model)
    assert found[0] != found[1]
    assert record.probes
    move = sum(reference.direction(p.seed, -LR * p.coefficient) for p in record.probes)
    decayed = before[0] * torch.tensor(1 - LR * DECAY, dtype=torch.float64).float()
    assert torch.equal(model.one.weight, decayed + move)
    assert shown_alike(model, cut)
    if mode == "stacked":
        assert zo.oracle.stacking == (model.one.weight.ndim == 1)  # a matrix would need a copy for each probe
    zo.close()
    assert shown_alike(model, cut)


@pytest.mark.parametrize("noise", ["rademacher", "low_rank"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_seed_log_gives_the_same_weights(name: str, noise: str, tmp_path: Path) -> None:
    model, again = Sharing(WHOLE[name]).eval(), Sharing(WHOLE[name]).eval()
    zo = ZeroOrder(model, lr=LR, eps=EPS, noise=noise)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for _ in range(3):
        zo.step(model)
    log.close()
    zo.close()
    replay(again, SeedLog.read(tmp_path / "log"))
    assert all(map(torch.equal, held(model), held(again)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_whole_copies_show_it_too(name: str, kind: str, mode: str) -> None:
    cut = {**WHOLE, **PARTLY}[name]
    model, other = Sharing(cut, kind).eval(), Sharing(cut, kind).eval()
    settings = {key: value for key, value in MODES[mode].items() if key not in ("offload", "stack_probes")}
    zo, reference = ZeroOrder(model, ZOConfig(**settings)), ZeroOrder(other, ZOConfig(**settings))
    zo.copy_whole()
    (found,) = zo.oracle.losses((Point(11, EPS),), model)
    assert found.item() == InPlace(other, reference).loss(Point(11, EPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", WHOLE)
def test_in_other_types_too(name: str, dtype: torch.dtype) -> None:
    model = Sharing(WHOLE[name], dtype=dtype).eval()
    zo = ZeroOrder(model, lr=1.0, eps=EPS)
    plus, minus = zo.oracle.losses((Point(11, EPS), Point(11, -EPS)), model)
    assert plus != minus
    zo.step(model)
    one, other = WHOLE[name](torch.zeros(24, dtype=dtype))
    one.copy_(model.one.weight.detach())
    assert torch.equal(other, model.other.weight)


@pytest.mark.parametrize("make", [ZOOptimizer, torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_over_all_parameters_moves_it_once(name: str, make: Any) -> None:
    model, alone = Sharing(WHOLE[name]).eval(), Sharing(WHOLE[name], "attribute").eval()
    weights = [list(m.parameters()) for m in (model, alone)]
    optimizers = [make([p for p in held if p.requires_grad], lr=LR, weight_decay=DECAY) for held in weights]
    engines = [ZeroOrder(m, optimizer=o) for m, o in zip((model, alone), optimizers, strict=True)]
    assert [len(group["params"]) for o in optimizers for group in o.param_groups] == [2, 1]
    for _ in range(3):
        found, expected = (zo.step(m) for zo, m in zip(engines, (model, alone), strict=True))
        assert found.projected_grad == expected.projected_grad
    assert torch.equal(model.one.weight, alone.one.weight)
    state = engines[0].state_dict()
    engines[0].load_state_dict(copy.deepcopy(state))


def test_an_optimizer_that_has_only_the_other_order_is_refused() -> None:
    model = Sharing(WHOLE["transposed"])
    with pytest.raises(ModelError, match=r"shape \[4, 6\].*'weight'.*\[6, 4\].*give it both"):
        ZeroOrder(model, optimizer=torch.optim.SGD([model.other.weight], lr=LR))
    assert ZeroOrder(model, optimizer=torch.optim.SGD([model.one.weight], lr=LR)).slots


@pytest.mark.parametrize("name", PARTLY)
def test_two_trainable_parameters_with_a_part_in_common_are_refused_by_name(name: str) -> None:
    model = Sharing(PARTLY[name])
    with pytest.raises(ModelError, match=r"'one.weight' and 'other.weight'.*requires_grad_\(False\)"):
        ZeroOrder(model)
    model.other.weight.requires_grad_(False)
    assert [slot.tensor for slot in ZeroOrder(model).slots] == [model.one.weight]


def test_the_same_bytes_as_another_type_are_refused() -> None:
    model = Sharing(WHOLE["flat"])
    model.other.weight = nn.Parameter(model.one.weight.data.view(torch.bfloat16))
    with pytest.raises(ModelError, match=r"'one.weight' and 'other.weight'"):
        ZeroOrder(model)
    model.other.weight.requires_grad_(False)
    with pytest.raises(
        ModelError, match=r"parameter 'other.weight' shares a part of its memory with 'one.weight'.*clone"
    ):
        ZeroOrder(model)


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(4).expand(3, 4), lambda: torch.randn(12).as_strided((5, 4), (2, 1))]
)
def test_a_parameter_that_shows_one_element_twice_is_refused(make: Callable[[], Tensor]) -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(make())
    with pytest.raises(ModelError, match=r"'weight' of shape .* one place in memory .*clone"):
        ZeroOrder(model)
    model.weight.requires_grad_(False)
    assert [slot.key for slot in ZeroOrder(model).slots] == ["bias"]


def cut_from_a_buffer(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    parts = flat.split([p.numel() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.data = part.view(parameter.shape)
    if kind == "attribute":
        model.flat = flat
    elif kind == "buffer":
        model.register_buffer("flat", flat)
    elif kind == "frozen":
        model.register_parameter("flat", nn.Parameter(flat, requires_grad=False))
    return model


@pytest.mark.parametrize("kind", ["nothing", "attribute"])
def test_parameters_beside_each_other_in_one_buffer_are_ordinary_ones(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    flat = cut_from_a_buffer(kind)
    torch.manual_seed(3)
    plain = cut_from_a_buffer("nothing")
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()
    x = torch.randn(2, 4)
    engines = [ZeroOrder(model, lr=LR) for model in (flat, plain)]
    assert all(slot.region is None for zo in engines for slot in zo.slots)
    for _ in range(2):
        found, expected = (zo.step(lambda m=zo.model: m(x).sum()) for zo in engines)
        assert found.as_dict() == expected.as_dict()
    assert all(map(torch.equal, flat.parameters(), plain.parameters()))
    assert ("attribute 'flat' is a view" in caplog.text) == (kind == "attribute")


@pytest.mark.parametrize("kind", ["buffer", "frozen"])
def test_what_shows_the_memory_of_several_slots_is_refused_by_name(kind: str) -> None:
    with pytest.raises(
        ModelError, match=r"'flat' shares a part of its memory with '0.weight' and '0.bias' and 2 more.*clone"
    ):
        ZeroOrder(cut_from_a_buffer(kind))


def test_columns_of_one_buffer_are_ordinary_parameters() -> None:
    model = nn.Sequential(*(nn.Linear(4, 6, bias=False) for _ in range(3)))
    flat = torch.randn(6, 12)
    for index, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[:, 4 * index : 4 * index + 4])
    zo = ZeroOrder(model)
    assert [(slot.key, slot.region) for slot in zo.slots] == [(f"{index}.weight", None) for index in range(3)]


def test_an_lstm_keeps_its_slots() -> None:
    zo = ZeroOrder(nn.LSTM(4, 4, num_layers=2))
    assert [slot.key for slot in zo.slots] == [name for name, _ in nn.LSTM(4, 4, num_layers=2).named_parameters()]
    assert all(len(slot.tensors) == 1 for slot in zo.slots)


def test_a_streamed_model_leaves_shared_memory_where_it_is() -> None:
    """Also what does not move: brought back, it would be two."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(4, 6, bias=False)
            self.up = nn.Linear(6, 4, bias=False)
            self.up.weight = nn.Parameter(self.down.weight.data.t())
            self.own = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(torch.tanh(self.up(self.down(x))))

    model = nn.Sequential(*(Block() for _ in range(3)))
    for block in model:
        block.down.weight.requires_grad_(False)
        block.up.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    x = torch.randn(2, 4)
    zo, other = ZeroOrder(model, lr=LR, offload="cpu"), ZeroOrder(plain, lr=LR)
    for _ in range(2):
        assert zo.step(lambda: model(x).sum()).loss == other.step(lambda: plain(x).sum()).loss
    assert not bool(in_memory(model[0].down.weight).isnan().any())
    assert bool(in_memory(model[0].own.weight).isnan().any())
    zo.close()
    assert all(block.up.weight.data_ptr() == block.down.weight.data_ptr() for block in model)
    # A second engine meets a model that is streamed, where parameters that stand for others are expanded.
    ZeroOrder(model, lr=LR, offload="cpu")
    assert len(ZeroOrder(model, lr=LR).slots) == 6


def test_slots_are_found_in_a_time_that_grows_with_the_number_of_parameters() -> None:
    """Counted, not timed: each tensor is looked at a bounded number of times."""
    calls = []
    met = Chart.met
    model = nn.ParameterList(nn.Parameter(part) for part in torch.randn(4, 4000).split(1, dim=1))
    try:
        Chart.met = lambda self, where: calls.append(1) or met(self, where)  # type: ignore[method-assign]
        assert len(ZeroOrder(model).slots) == 4000
    finally:
        Chart.met = met  # type: ignore[method-assign]
    assert len(calls) <= 4000


def test_extents() -> None:
    memory = torch.zeros(24)
    square = memory.view(4, 6)
    assert extent(square) == extent(square.t()) == extent(memory) == extent(memory.view(2, 3, 4).permute(1, 2, 0))
    assert extent(square[:, :3]) == extent(square[:, :3].t()) != extent(memory[:12])
    assert extent(memory[:12]) != extent(memory[1:13])
    assert extent(torch.empty(0)) is extent(torch.empty(3, device="meta")) is None
    assert not shows_twice(memory.as_strided((3, 2), (2, 3)))
    assert shows_twice(memory.as_strided((4, 3), (2, 3)))

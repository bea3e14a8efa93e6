"""Law: what a forward changes besides the weights is, for all probes, what it was before the step."""

from __future__ import annotations

import copy
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zo_core import Point, ZeroOrder
from zo_core.forward_state import ForwardState

WIDTH = 6


class Stateful(nn.Module):
    """Two blocks and a head; subclasses keep something from forward to forward, and the loss depends on it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.start()

    def start(self) -> None:
        """The state at the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.seen(x).pow(2).mean() + self.head(x).pow(2).mean()

    def seen(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Centre(Stateful):
    """A running centre in a buffer, moved in place before it is used (DINO)."""

    def start(self) -> None:
        self.register_buffer("centre", torch.zeros(WIDTH))

    def seen(self, x: Tensor) -> Tensor:
        self.centre.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return x - self.centre


class Reassigned(Centre):
    """The same, with a new tensor each time."""

    def seen(self, x: Tensor) -> Tensor:
        self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
        return x - self.centre


class PastTheVersion(Centre):
    """The same, written through ``.data``, which leaves the version counter as it is."""

    def seen(self, x: Tensor) -> Tensor:
        self.centre.data.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return x - self.centre


class Attribute(Centre):
    """The same, in a plain attribute."""

    def start(self) -> None:
        self.centre = torch.zeros(WIDTH)


class Queue(Stateful):
    """A queue of negatives with a pointer (MoCo)."""

    def start(self) -> None:
        self.register_buffer("queue", torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def seen(self, x: Tensor) -> Tensor:
        at = int(self.pointer)
        self.queue[at : at + 2] = x.detach()[:2]
        self.pointer[0] = (at + 2) % 8
        return x @ self.queue.t()


class Python(Stateful):
    """A number, a list of numbers and a queue of tensors."""

    def start(self) -> None:
        self.calls, self.scales, self.past = 0, [1.0], deque([torch.zeros(WIDTH)], maxlen=3)

    def seen(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scales.append(1.0 + 0.1 * self.calls)
        self.past.append(x.detach().mean(0))
        return x * self.scales[-1] - sum(self.past)


class Momentum(Stateful):
    """A frozen encoder that follows the trained one in every forward (ALBEF)."""

    def start(self) -> None:
        self.follower = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def seen(self, x: Tensor) -> Tensor:
        leader = self.blocks[0][0]
        for mine, theirs in zip(self.follower.parameters(), leader.parameters(), strict=True):
            mine.data = 0.9 * mine.data + 0.1 * theirs.data
        return x - self.follower(x)


KINDS = [Centre, Reassigned, PastTheVersion, Attribute, Queue, Python, Momentum]
PLACES: list[dict[str, Any]] = [{}, {"offload": "cpu"}, {"offload": "disk"}]


def state(model: Stateful) -> dict[str, Any]:
    """Everything that is no trained weight."""
    kept = {name: value for name, value in model.state_dict().items() if "blocks" not in name and "head" not in name}
    for name in ("centre", "calls", "scales", "past"):
        if hasattr(model, name):
            kept[name] = copy.deepcopy(getattr(model, name))
    return kept


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def data(index: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(index))


def written_out(zo: ZeroOrder, model: Stateful, point: Point, x: Tensor) -> tuple[float, dict[str, Any]]:
    """The loss of a copy of the model at a point, and the state that it leaves."""
    other = copy.deepcopy(model).eval()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = dict(other.named_parameters())
    with torch.no_grad():
        for slot in zo.slots:
            z = zo.noise.values(point.seed, slot.key, slot.tensor.shape, scale=point.scale)
            moved[names[id(slot.tensor)]].add_(z)
        loss = other(x).item()
    return loss, state(other)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_probe_begins_with_the_state_before_the_step(
    kind: type[Stateful], place: dict[str, Any], tmp_path: Path
) -> None:
    model, resident = kind(), kind()
    folder = {"offload_dir": str(tmp_path)} if place.get("offload") == "disk" else {}
    zo = ZeroOrder(model, lr=1e-2, eps=1e-2, num_probes=2, **place, **folder)
    reference = ZeroOrder(resident, lr=1e-2, eps=1e-2, num_probes=2)
    for step in range(5):
        seeds = tuple(zo.noise.seed(0, step, index) for index in range(2))
        points = reference.estimator.points(seeds, 1e-2)
        expected = [written_out(reference, resident, point, data(step)) for point in points]
        found = [float(loss) for loss in zo.losses([lambda step=step: model(data(step))])[0]]
        assert found == [loss for loss, _ in expected]
        zo.discard()
        model_state = state(model)
        assert same(model_state, expected[-1][1])
        restore(model, resident)
        record = zo.step(lambda step=step: model(data(step)))
        other = reference.step(lambda step=step: resident(data(step)))
        assert record.as_dict() == other.as_dict()
        assert same(state(model), state(resident))
        assert same(state(model), expected[-1][1])
    zo.close()
    assert same(model.state_dict(), resident.state_dict())


def restore(model: Stateful, like: Stateful) -> None:
    """Gives a model the state of another one."""
    for name, value in vars(copy.deepcopy(like)).items():
        if name in ("centre", "calls", "scales", "past"):
            setattr(model, name, value)
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(model.named_buffers(), like.named_buffers(), strict=True):
            mine.copy_(theirs)
        if isinstance(model, Momentum) and isinstance(like, Momentum):
            for mine, theirs in zip(model.follower.parameters(), like.follower.parameters(), strict=True):
                mine.copy_(theirs)


@pytest.mark.parametrize("settings", [{"noise": "low_rank"}, {"noise": "low_rank", "stack_probes": True}], ids=str)
@pytest.mark.parametrize("kind", [Centre, Reassigned, Queue, Python, Momentum])
def test_low_rank_and_stacked_probes_begin_alike_too(kind: type[Stateful], settings: dict[str, Any]) -> None:
    model, other = kind(), kind()
    zo = ZeroOrder(model, lr=1e-2, eps=1e-2, num_probes=2, **settings)
    separate = ZeroOrder(other, lr=1e-2, eps=1e-2, num_probes=2, noise="low_rank")
    for step in range(4):
        before = copy.deepcopy(state(other))
        found = zo.losses([lambda step=step: model(data(step))])[0]
        points = separate.estimator.points(tuple(zo.noise.seed(0, step, i) for i in range(2)), 1e-2)
        alone = []
        for point in points:  # each in a measurement of its own, from the same state
            back = copy.deepcopy(other)
            with separate.hidden():
                alone.append(separate.oracle.losses((point,), lambda step=step: other(data(step)))[0].item())
            restore(other, back)
            assert same(state(other), before)
        # Stacked probes sum in another order; the others are the same to the last bit.
        close = 64 * torch.finfo(torch.float32).eps if "stack_probes" in settings else 0.0
        assert [loss.item() for loss in found] == pytest.approx(alone, rel=close, abs=close)
        zo.discard()
        restore(model, other)
        zo.step(lambda step=step: model(data(step)))
        separate.step(lambda step=step: other(data(step)))
        restore(model, other)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    copies: list[int] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **how: (copies.append(self.numel()), clone(self, **how))[1])
    return copies


def test_nothing_is_copied_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Centre()
    follow = ForwardState(model, [id(parameter) for parameter in model.parameters()])
    follow.begin()
    copies = counted(monkeypatch)
    for _ in range(5):
        assert not follow.rewind()
        follow.begin()
    assert copies == []
    model(data(0))
    assert follow.rewind()
    follow.begin()
    assert copies == []  # what was put back has the copy that it came from


def test_a_tensor_that_is_too_large_to_copy_in_advance_is_kept_from_the_next_step_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("zo_core.forward_state.IN_ADVANCE", 0)
    model = Centre()
    follow = ForwardState(model, [])
    follow.begin()
    model(data(0))
    follow.rewind()
    assert "centre was written by a forward for the first time" in caplog.text
    follow.begin()
    before = model.centre.clone()
    model(data(1))
    assert not torch.equal(model.centre, before)
    assert follow.rewind()
    assert torch.equal(model.centre, before)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("place", PLACES[:2], ids=str)
def test_micro_batches_find_what_those_before_them_left(place: dict[str, Any]) -> None:
    model, resident = Queue(), Queue()
    zo, reference = ZeroOrder(model, lr=1e-2, eps=1e-2, **place), ZeroOrder(resident, lr=1e-2, eps=1e-2)
    for step in range(3):
        closures = [lambda index=index: model(data(index)) for index in (2 * step, 2 * step + 1)]
        zo.measure_all(closures)
        for index in (2 * step, 2 * step + 1):
            reference.measure(lambda index=index: resident(data(index)))
        assert zo.apply().as_dict() == reference.apply().as_dict()
        assert same(state(model), state(resident))


@pytest.mark.parametrize("place", [*PLACES[:2], {"stack_probes": True, "noise": "low_rank"}], ids=str)
def test_what_a_closure_counts_itself_counts_once(place: dict[str, Any]) -> None:
    model, count, seen = Centre(), [0], []
    zo = ZeroOrder(model, lr=1e-2, eps=1e-2, num_probes=2, **place)
    zo.carry(lambda: count[0], lambda value: count.__setitem__(0, value))

    def closure() -> Tensor:
        seen.append(count[0])
        count[0] += 1
        return model(data(0))

    for step in range(3):
        seen.clear()
        zo.step(closure)
        assert set(seen) == {step}
        assert count == [step + 1]
    zo.measure_all([closure, closure])
    assert count == [5]


class Patching(Stateful):
    """Changes itself while its loss is computed, and back: a probe in between must not see it (Matryoshka losses)."""

    def start(self) -> None:
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 2.0
        try:
            return super().forward(x)
        finally:
            self.scale = 1.0

    def seen(self, x: Tensor) -> Tensor:
        assert self.scale == 2.0
        return x * self.scale


def test_probes_in_turns_do_not_see_each_other_s_changes() -> None:
    model, resident = Patching(), Patching()
    zo, reference = ZeroOrder(model, lr=1e-2, offload="cpu"), ZeroOrder(resident, lr=1e-2)
    for step in range(3):
        record = zo.step(lambda step=step: model(data(step)))
        assert record.as_dict() == reference.step(lambda step=step: resident(data(step))).as_dict()
    assert model.scale == 1.0


class SetsUp(Stateful):
    """Installs hooks in its first forward, and notes that it has (transformers' recorders of hidden states)."""

    def start(self) -> None:
        self.ready = False
        self.seen_by_hooks: Any = Seen()

    def seen(self, x: Tensor) -> Tensor:
        if not self.ready:
            for block in self.blocks:
                block.register_forward_hook(lambda *_: self.seen_by_hooks.note())
            self.ready = True
        return x


class Seen:
    """No state of the module."""

    count = 0

    def note(self) -> None:
        self.count += 1


@pytest.mark.parametrize("place", PLACES[:2], ids=str)
def test_a_forward_that_sets_the_model_up_does_it_once(place: dict[str, Any]) -> None:
    model = SetsUp()
    zo = ZeroOrder(model, lr=1e-2, **place)
    for step in range(3):
        zo.step(lambda step=step: model(data(step)))
    zo.close()
    assert model.ready
    assert [len(block._forward_hooks) for block in model.blocks] == [1, 1]
    before = model.seen_by_hooks.count
    model(data(0))
    assert model.seen_by_hooks.count == before + 2

"""Law: in a window the weights are not written, all see them as if they were, and nothing depends on who looks."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from models import batch, closure, tiny
from torch import Tensor, nn
from traces import same_bits, weights

from zo_core import LowRank, Probe, StateError, StepRecord, ZeroOrder
from zo_core.updates.window import projected

CPU = torch.device("cpu")
NOISE = LowRank(refresh=4)
RULES = ("sgd", "momentum")


def engine(model: nn.Module, **settings: object) -> ZeroOrder:
    return ZeroOrder(model, **{"noise": NOISE, "lr": 1e-3, "seed": 5, **settings})


def run(zo: ZeroOrder, steps: int, name: str = "llama") -> list[StepRecord]:
    return [zo.step(closure(name, zo.model, zo.step_count)) for _ in range(steps)]


def evaluated(model: nn.Module, index: int = 99) -> float:
    with torch.no_grad():
        return model.eval()(**batch("llama", index=index)).loss.item()


def in_memory(model: nn.Module) -> dict[str, Tensor]:
    """What the parameters point at inside of a window, without bringing what they count as."""
    with torch._C.DisableTorchFunctionSubclass():
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# The window


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("num_probes", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_weights_are_those_of_the_formula(rule: str, num_probes: int, weight_decay: float) -> None:
    model = tiny("llama")
    before = in_memory(model)
    zo = engine(model, rule=rule, num_probes=num_probes, weight_decay=weight_decay)
    records = run(zo, 9)
    zo.close()
    rank, beta, decay = 2, torch.tensor(0.9), torch.tensor(1 - 1e-3 * weight_decay)
    for slot in zo.slots:
        w = before[next(name for name, p in model.named_parameters() if p is slot.tensor)]
        if w.ndim < 2:
            continue
        old: list[Tensor] = []
        for start in range(0, 9, 4):
            window = records[start : start + 4]
            rights = [NOISE.right(probe.seed, slot.key, w.shape, CPU) for probe in window[0].probes]
            factors = [torch.zeros(len(w), rank) for _ in rights]
            if start == 0:
                momenta = [torch.zeros(len(w), rank) for _ in rights]
            else:
                momenta = [projected(m, *pair, rank) for m, *pair in zip(momenta, old, rights, strict=True)]
            old, shrink = rights, 1.0
            for record in window:
                if decay != 1.0:
                    shrink *= decay.item()
                for i, probe in enumerate(record.probes):
                    left = NOISE.left(probe.seed, slot.key, w.shape, CPU)
                    factors[i] = factors[i] * decay
                    if rule == "momentum":
                        scale = torch.tensor(probe.coefficient / math.sqrt(rank)).float()
                        momenta[i] = momenta[i] * beta + left * scale
                        factors[i] = factors[i] + momenta[i] * torch.tensor(-1e-3)
                    else:
                        scale = torch.tensor(-1e-3 * probe.coefficient / math.sqrt(rank)).float()
                        factors[i] = factors[i] + left * scale
            total = torch.zeros(w.shape)
            for left, right in zip(factors, rights, strict=True):
                for k in range(rank):
                    total = total + left[:, k : k + 1] * right[k]
            w = w * torch.tensor(shrink).float() + total
        assert torch.equal(slot.tensor, w), slot.key


@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_update_goes_along_the_directions_that_the_probes_took(num_probes: int) -> None:
    # Published code draws another V for the update than for the probe in the steps that begin a window.
    model = nn.Linear(5, 7, bias=False).double()
    slope = torch.randn(7, 5, dtype=torch.float64)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(model.weight + 0)
        return (seen[-1] * slope).sum()

    zo = engine(model, num_probes=num_probes, lr=1e-2, eps=1e-2)
    before = model.weight.detach().clone()
    for _ in range(9):
        record = zo.step(loss)
        with torch.no_grad(), zo.effective():
            after = model.weight + 0
        del seen[: len(seen) % 2]  # the first step measures one of its points twice
        z = [(plus - minus) / 2e-2 for plus, minus in zip(seen[::2], seen[1::2], strict=True)]
        moved = sum(-1e-2 * probe.coefficient * one for probe, one in zip(record.probes, z, strict=True))
        assert torch.allclose(after - before, moved, atol=1e-6)
        assert moved.abs().max() > 1e-4
        before = after.clone()
        seen.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside_a_window_no_matrix_in_memory_is_written(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    before = in_memory(model)
    zo = engine(model)
    run(zo, 4)
    after = in_memory(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        name for name, value in before.items() if value.ndim == 1
    ]
    run(zo, 1)  # the first step of the next window writes the sum
    final = in_memory(model)
    assert all(not torch.equal(before[name], final[name]) for name in before)


@pytest.mark.parametrize("rule", RULES)
def test_an_evaluation_and_an_exported_copy_show_the_same_weights(rule: str) -> None:
    model = tiny("llama")
    zo = engine(model, rule=rule)
    start = evaluated(model)
    run(zo, 3)
    seen = evaluated(model)
    exported = tiny("llama")
    exported.load_state_dict(model.state_dict())
    assert abs(seen - evaluated(exported)) <= 1e-6
    assert abs(seen - start) >= 1e-3
    # The same in a submodule's own forward, and for a weight that is reached for in a forward.
    ids = batch("llama")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(model.model(ids)[0], exported.eval().model(ids)[0], atol=1e-5)
        with zo.effective():
            assert torch.equal(model.lm_head.weight + 0, exported.lm_head.weight)
    zo.close()
    assert same_bits(weights(model), weights(exported))
    assert abs(seen - evaluated(model)) <= 1e-6


def test_looking_does_not_change_the_run() -> None:
    plain, watched = tiny("llama"), tiny("llama")
    one, other = engine(plain, rule="momentum"), engine(watched, rule="momentum")
    records = run(one, 10)
    found = []
    for _ in range(10):
        found += run(other, 1)
        evaluated(watched)
        watched.train()
        watched.state_dict()
        other.state_dict()
        other.flush()
    assert [r.as_dict() for r in found] == [r.as_dict() for r in records]
    assert same_bits(weights(plain), weights(watched))


def test_gradients_can_be_taken_at_the_weights_as_they_should_be() -> None:
    model = tiny("mlp")
    zo = engine(model)
    run(zo, 3, "mlp")
    exported = tiny("mlp")
    exported.load_state_dict(model.state_dict())
    for m in (model, exported):
        m.eval()
        closure("mlp", m)().backward()
    for a, b in zip(model.parameters(), exported.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_tied_weights_stay_tied_in_an_export() -> None:
    model = tiny("llama", tied=True)
    run(engine(model), 2)
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_small_updates_of_sixteen_bit_weights_are_not_swallowed() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    zo = engine(model, lr=1e-7)
    before = in_memory(model)
    sums = {name: torch.zeros(value.shape) for name, value in before.items() if value.ndim > 1}
    for _ in range(2):
        run(zo, 4)
        for slot in zo.slots:
            if (waiting := zo.updaters.waiting(slot)) is not None:
                name = next(name for name, p in model.named_parameters() if p is slot.tensor)
                sums[name] += waiting.values(slot.tensor.shape, CPU)
    run(zo, 1)
    moved = torch.cat([(in_memory(model)[name].float() - before[name].float()).flatten() for name in sums])
    wanted = torch.cat([value.flatten() for value in sums.values()])
    # The rounding of an update by s to steps of u is right on average, with a variance of at most u |s|.
    step = 2.0**-8 * max(value.abs().max().item() for value in before.values() if value.ndim > 1)
    bound = 5 * math.sqrt(step * wanted.abs().sum().item() * wanted.abs().max().item())
    assert abs(((moved - wanted) * wanted.sign()).sum().item()) * wanted.abs().max().item() <= bound


def test_momentum_is_projected_to_the_next_bases() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 2, 500), generator=generator).float() * 2 - 1
    m = torch.randn(7, 2, generator=generator)
    found = projected(m, signs[0], signs[1], 2)
    assert torch.allclose(found, m @ (signs[0] @ signs[1].t()) / 500, atol=1e-6)
    assert torch.allclose(
        projected(m, signs[0], signs[0], 2)[:, 0], m[:, 0] + m[:, 1] * (signs[0, 0] @ signs[0, 1]) / 500
    )


# Streaming, replay, checkpoints


def test_pending_updates_are_added_where_the_weights_are() -> None:
    """The factor of a streamed matrix stays on the device, and a state dict is made of the values on the host."""
    model = tiny("llama")
    zo = engine(model)
    run(zo, 1)
    slot = next(slot for slot, window in zo.updaters.windows.of.items() if window.factor is not None)
    waiting = zo.updaters.windows.waiting(slot)
    assert waiting is not None
    elsewhere = torch.device("meta")
    for dtype in (torch.float32, torch.bfloat16):
        assert all(part.device == elsewhere for part in waiting.factors_in(dtype, elsewhere))
    theta = torch.empty(slot.tensor.shape, device=elsewhere)
    assert waiting.add_to(theta, out=torch.empty_like(theta)).device == elsewhere
    zo.close()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_streamed_run_is_the_resident_one_bit_for_bit(where: str, rule: str) -> None:
    settings = {"rule": rule, "num_probes": 2, "weight_decay": 0.1}
    resident, streamed = tiny("llama"), tiny("llama")
    one, other = engine(resident, **settings), engine(streamed, offload=where, **settings)
    assert [r.as_dict() for r in run(other, 6)] == [r.as_dict() for r in run(one, 6)]
    assert evaluated(streamed) == evaluated(resident)
    assert same_bits(weights(streamed), weights(resident))
    assert [r.as_dict() for r in run(other, 3)] == [r.as_dict() for r in run(one, 3)]
    other.close()
    one.close()
    assert same_bits(weights(streamed), weights(resident))


def test_blocks_are_written_once_in_a_window() -> None:
    model = tiny("llama")
    zo = engine(model, offload="disk")
    written = []
    for _ in range(12):
        run(zo, 1)
        zo.flush()
        written.append(zo.streaming.bytes_written)
    size = sum(block.nbytes for block in zo.streaming.blocks)
    assert written == [0] * 4 + [size] * 4 + [2 * size] * 4
    zo.close()


@pytest.mark.parametrize("rule", RULES)
def test_the_probes_alone_give_the_weights_again(rule: str) -> None:
    trained, model = tiny("llama", dtype=torch.bfloat16), tiny("llama", dtype=torch.bfloat16)
    zo, again = engine(trained, rule=rule, num_probes=2), engine(model, rule=rule, num_probes=2)
    for record in run(zo, 10):
        seeds = [NOISE.seed(5, record.step, i) for i in range(2)]
        again._update(tuple(Probe(seed, p.coefficient) for seed, p in zip(seeds, record.probes, strict=True)))
    assert same_bits(weights(trained), weights(model))
    zo.close()
    again.close()
    assert same_bits(weights(trained), weights(model))


@pytest.mark.parametrize("where", [None, "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_resumed_inside_a_window_continues_bit_for_bit(where: str | None, dtype: torch.dtype) -> None:
    model, other = tiny("llama", dtype=dtype), tiny("llama", dtype=dtype)
    zo = engine(model, rule="momentum", offload=where)
    run(zo, 6)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "zo": zo.state_dict()}, file)
    expected = run(zo, 7)
    file.seek(0)
    kept = torch.load(file)
    resumed = engine(other, rule="momentum", offload=where)
    run(resumed, 1)  # what is there before does not matter
    other.load_state_dict(kept["model"])
    resumed.load_state_dict(kept["zo"])
    assert [r.as_dict() for r in run(resumed, 7)] == [r.as_dict() for r in expected]
    assert same_bits(weights(other), weights(model))
    zo.close()
    resumed.close()


def test_a_checkpoint_of_another_rank_is_refused() -> None:
    zo = engine(tiny("mlp"))
    run(zo, 2, "mlp")
    kept = zo.state_dict()
    for noise in (LowRank(3), "rademacher"):
        with pytest.raises(StateError, match=r"of a run with noise=.*, and this one has noise="):
            engine(tiny("mlp"), noise=noise).load_state_dict(kept)
    waiting = kept["optimizer"].pop("zo")["windows"]  # version 0.1, which leaves the shapes alone
    kept["optimizer"]["state"] = waiting
    for noise in (LowRank(3), "rademacher"):
        with pytest.raises(StateError, match="low-rank updates of another noise"):
            engine(tiny("mlp"), noise=noise).load_state_dict(kept)


def test_weights_that_are_loaded_are_the_weights() -> None:
    model, fresh = tiny("llama"), tiny("llama")
    run(engine(model), 3)
    model.load_state_dict(fresh.state_dict())
    assert same_bits(weights(model), weights(fresh))
    assert evaluated(model) == evaluated(fresh)


# Ends and beginnings


def test_closing_leaves_an_ordinary_model() -> None:
    model = tiny("llama")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._state_dict_hooks) for m in model.modules()]
    zo = engine(model)
    run(zo, 3)
    exported = weights(model)
    zo.close()
    assert same_bits(in_memory(model), {name: exported[name] for name in in_memory(model)})
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._state_dict_hooks) for m in model.modules()
    ]


def test_a_second_engine_begins_where_the_first_one_was() -> None:
    model = tiny("llama")
    run(engine(model), 3)
    exported = weights(model)
    second = engine(model, lr=0.0)
    assert same_bits(weights(model), exported)
    twin = copy.deepcopy(model)
    assert second.step(closure("llama", model)).loss == engine(twin).step(closure("llama", twin)).loss


def test_a_copy_of_the_model_is_one_of_its_own() -> None:
    model = tiny("llama")
    zo = engine(model)
    run(zo, 3)
    twin, seen = copy.deepcopy(model), evaluated(model)
    model.train()
    run(zo, 3)
    assert evaluated(twin) == seen != evaluated(model)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    assert evaluated(torch.load(file, weights_only=False)) == seen


def test_a_model_with_unseen_parts_trains_with_copies_of_everything() -> None:
    model, other = tiny("unseen"), tiny("unseen")
    zo, copying = engine(model), engine(other)
    copying.oracle.copy_whole()
    assert [r.as_dict() for r in run(zo, 6, "unseen")] == [r.as_dict() for r in run(copying, 6, "unseen")]
    assert same_bits(weights(model), weights(other))


def test_rules_whose_updates_are_not_of_low_rank_are_applied_at_once() -> None:
    for settings in ({"rule": "sign"}, {"optimizer": torch.optim.SGD}):
        model = tiny("mlp")
        if "optimizer" in settings:
            settings["optimizer"] = torch.optim.SGD(model.parameters(), lr=1e-3)
            settings["lr"] = None
        before = in_memory(model)
        run(engine(model, **settings), 1, "mlp")
        assert all(not torch.equal(value, in_memory(model)[name]) for name, value in before.items())


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
def test_every_estimator_goes_downhill(estimator: str, tmp_path: Path) -> None:
    model = tiny("mlp")
    zo = engine(model, estimator=estimator, lr=3e-2, num_probes=4, eps=1e-3)
    model.eval()
    losses = [zo.step(closure("mlp", model)).loss for _ in range(60)]
    assert losses[-1] < losses[0] - 0.02

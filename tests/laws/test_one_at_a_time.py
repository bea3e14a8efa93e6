"""Law: a direction that moves one block, or one weight, estimates that part of the gradient and moves nothing else."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, bare_loop, differing, texts
from lightning_helpers import QUIET, Wrapped, batches, fitted, sgd
from models import closure, tiny
from reference import f32
from torch import nn
from traces import same_bits, weights

from hf_zo import ZOTrainer
from zo_core import (
    ConfigError,
    Coordinates,
    OneBlock,
    Probe,
    SeedLogWriter,
    ZeroOrder,
    ZOConfig,
    derive_seed,
    replay,
)
from zo_core.noise.sampled import block_of

pytestmark = QUIET
ALL: dict[str, Any] = {"rule": "momentum", "num_probes": 2, "weight_decay": 0.1}
BOTH = pytest.mark.parametrize(
    "noise",
    ["coordinates", "one_block", {"name": "one_block", "order": "random", "of": {"name": "low_rank", "refresh": 1}}],
    ids=["coordinates", "one_block", "random, low rank"],
)


def engine(model: nn.Module, noise: Any, **settings: Any) -> ZeroOrder:
    return ZeroOrder(model, **{"noise": noise, "lr": 1e-3, "eps": 1e-3, "seed": 5, **settings})


class InAnotherOrder(nn.Module):
    """A model whose parameters have the same names and values, in the order of a file that sorts them by name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for name, value in sorted(model.state_dict().items()):
            *path, last = name.split(".")
            home: nn.Module = self
            for part in path:
                if part not in dict(home.named_children()):
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            home.register_parameter(last, nn.Parameter(value.clone()))


@BOTH
def test_a_replay_does_not_depend_on_the_order_of_the_parameters(noise: Any, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)))
    base = InAnotherOrder(model)
    assert [name for name, _ in base.named_parameters()] != [name for name, _ in model.named_parameters()]
    zo = engine(model, noise, rule="momentum")
    log = SeedLogWriter.attach(zo, tmp_path / "seedlog.zo")
    for step in range(4):
        zo.step(lambda step=step: model(torch.full((2, 3), step + 1.0)).square().mean())  # type: ignore[misc]
    log.close()
    replay(base, tmp_path / "seedlog.zo")
    assert all(torch.equal(base.state_dict()[name], value) for name, value in model.state_dict().items())


# Coordinates


def coordinate_wise(model: nn.Module, loss: Any, lr: float, eps: float) -> None:
    """One step of the plain formula: each weight by its own difference of losses, those of a pair summed in order."""
    parameters = [p.data.view(-1) for p in model.parameters()]
    count = sum(len(p) for p in parameters)
    root, moves = math.sqrt(count), []
    for values in parameters:
        for at in range(len(values)):
            found, before = [], values[at].clone()
            for side in (eps, -eps):
                values[at] = before + f32(side * root)
                with torch.no_grad():
                    found.append(loss().item())
                values[at] = before
            g = (found[0] - found[1]) / (2 * eps)
            coefficient = float(f32(g / count))
            moves.append((values, at, f32(float(-lr * coefficient) * root)))
    for values, at, move in moves:
        values[at] += move


def test_all_coordinates_of_a_step_are_the_plain_formula() -> None:
    fast, slow = tiny("mlp"), tiny("mlp").eval()
    count = sum(p.numel() for p in fast.parameters())
    zo = engine(fast, "coordinates", num_probes=count)
    for step in range(2):
        zo.step(closure("mlp", fast, step))
        coordinate_wise(slow, closure("mlp", slow, step), 1e-3, 1e-3)
    assert same_bits(weights(fast), weights(slow))


def test_the_estimate_is_the_gradient() -> None:
    model = tiny("mlp").double()
    count = sum(p.numel() for p in model.parameters())
    loss = closure("mlp", model)
    model.eval()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(model.parameters()))])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    engine(model, "coordinates", num_probes=count, eps=1e-5, lr=1.0).step(loss)
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (moved - gradient).abs().max() <= 1e-6 * gradient.abs().max()


def test_a_slice_of_coordinates_is_consecutive_and_every_weight_has_its_turn() -> None:
    model = nn.Linear(3, 2)
    zo = engine(model, "coordinates", num_probes=3)
    seen = torch.zeros(8)
    for step in range(400):
        seeds = [zo.noise.seed(5, step, i) for i in range(3)]
        rows = torch.stack(
            [torch.cat([zo.noise.values(s, k.key, k.tensor.shape).flatten() for k in zo.slots]) for s in seeds]
        )
        (places,) = zip(*[row.nonzero()[:, 0].tolist() for row in rows], strict=True)
        assert set(rows[rows != 0].tolist()) == {f32(math.sqrt(8)).item()}
        assert [(place - places[0]) % 8 for place in places] == [0, 1, 2]
        seen[list(places)] += 1
    # Binomial, 400 draws with probability 3/8: five standard deviations.
    assert (seen - 150).abs().max() <= 5 * math.sqrt(400 * 3 / 8 * 5 / 8)


def test_other_weights_stay_and_decay_is_that_of_all() -> None:
    model = tiny("mlp")
    before = weights(model)
    zo = engine(model, "coordinates", num_probes=2)
    zo.step(closure("mlp", model))
    assert sum(int((value != before[name]).sum()) for name, value in weights(model).items()) <= 2
    decayed = tiny("mlp")
    engine(decayed, "coordinates", num_probes=2, weight_decay=0.5).step(closure("mlp", decayed))
    apart = [(value - f32(1 - 1e-3 * 0.5) * before[name]).abs() for name, value in weights(decayed).items()]
    assert sum(int((part > 1e-6).sum()) for part in apart) <= 2


def test_many_weights_are_an_error_with_their_number() -> None:
    with pytest.raises(ConfigError, match=r"262,656 weights move.*at most 131,072"):
        ZeroOrder(nn.Linear(512, 512), noise="coordinates")


# One block


@pytest.mark.parametrize("order", ["turn", "random"])
def test_a_direction_moves_one_block_along_the_other_noise(order: str) -> None:
    model = tiny("llama", layers=3)
    zo = engine(model, {"name": "one_block", "order": order}, num_probes=2)
    names = list(dict.fromkeys(block_of(slot.key) for slot in zo.slots))
    chosen = []
    for step in range(40):
        for index in range(2):
            seed = zo.noise.seed(5, step, index)
            moving = {block_of(slot.key) for slot in zo.slots if not zo.direction(slot, seed).still}
            assert len(moving) == 1
            chosen.append(names.index(*moving))
            slot = next(slot for slot in zo.slots if block_of(slot.key) in moving)
            z = zo.direction(slot, seed).gradient(slot.tensor)
            plain = engine(tiny("llama", layers=3), "rademacher")
            own = plain.noise.values(derive_seed(5, step, index), slot.key, slot.tensor.shape)
            assert torch.equal(z, own * f32(math.sqrt(len(names))))
    firsts, seconds = chosen[::2], chosen[1::2]
    assert all((b - a) % len(names) == 1 for a, b in zip(firsts, seconds, strict=True))
    turn = all((b - a) % len(names) == 1 for a, b in pairwise(firsts))
    assert turn == (order == "turn")
    assert set(firsts) == set(range(len(names)))


def test_as_many_directions_as_blocks_are_one_estimate_for_each_block() -> None:
    model = tiny("mlp").double()
    loss = closure("mlp", model)
    count = len({block_of(name) for name, _ in model.named_parameters()})
    zo = engine(model, "one_block", num_probes=count)
    before = weights(model)
    seeds = [zo.noise.seed(5, 0, index) for index in range(count)]
    directions = [{slot.key: zo.direction(slot, seed) for slot in zo.slots} for seed in seeds]
    values = {
        key: next(d[key].gradient(before[key]) for d in directions if not d[key].still) / math.sqrt(count)
        for key in before
    }
    record = zo.step(loss)
    for seed, probe in zip(seeds, record.probes, strict=True):
        assert probe.seed == seed
    for key, value in weights(model).items():
        ((own, probe),) = [(d, p) for d, p in zip(directions, record.probes, strict=True) if not d[key].still]
        assert own[key].slot == key
        # g of the block along its own z: the root of the number of blocks and the mean over directions cancel.
        slope = probe.coefficient * math.sqrt(count)
        assert torch.allclose(value, before[key] - 1e-3 * slope * values[key], rtol=0, atol=1e-9)


def test_blocks_that_do_not_move_are_not_touched() -> None:
    model = tiny("llama", layers=3)
    zo = engine(model, "one_block", rule="momentum", weight_decay=0.1)
    for step in range(6):
        before = weights(model)
        zo.step(closure("llama", model, step))
        seed = zo.noise.seed(5, step, 0)
        moving = {id(slot.tensor) for slot in zo.slots if not zo.direction(slot, seed).still}
        changed = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == moving


def test_weight_decay_is_spread_over_the_steps_in_which_a_block_moves() -> None:
    model = tiny("mlp")
    blocks = len({block_of(name) for name, _ in model.named_parameters()})
    for count, share in ((1, 1 / blocks), (blocks, 1.0), (2 * blocks, 1.0)):
        moves = engine(model, "one_block", num_probes=count, weight_decay=0.2)
        probes = tuple(Probe(moves.noise.seed(5, 0, index), 1.0) for index in range(count))
        found = {decay for _, _, _, decay in moves.directions.moves(moves.slots, probes)}
        assert found == {0.2 / share}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"order": "up"}, "order='up'"),
        ({"of": "sampled"}, "chooses blocks"),
        ({"of": "coordinates"}, "write noise='coordinates'"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ZOConfig(noise={"name": "one_block", **given})


# Both


@BOTH
def test_streamed_replayed_and_resumed_runs_are_the_same_bits(noise: Any, tmp_path: Path) -> None:
    whole, streamed, part = tiny("llama"), tiny("llama"), tiny("llama")
    zo, other = engine(whole, noise, **ALL), engine(streamed, noise, offload="cpu", **ALL)
    SeedLogWriter.attach(zo, tmp_path / "log")
    for step in range(4):
        zo.step(closure("llama", whole, step))
        other.step(closure("llama", streamed, step))
    zo.close()
    other.close(torch.device("cpu"))
    assert same_bits(weights(streamed), weights(whole))
    base = tiny("llama")
    replay(base, tmp_path / "log")
    assert same_bits(weights(base), weights(whole))
    first = engine(part, noise, **ALL)
    for step in range(2):
        first.step(closure("llama", part, step))
    state = copy.deepcopy(first.state_dict())
    second = engine(part, noise, **ALL)
    second.load_state_dict(state)
    for step in range(2, 4):
        second.step(closure("llama", part, step))
    second.close()
    assert same_bits(weights(part), weights(whole))


@BOTH
def test_both_trainers_run_it_as_the_bare_loop(noise: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    bare, model = tiny("llama"), tiny("llama")
    bare_loop(bare, args, texts(), noise=noise)
    trainer = ZOTrainer(model=model, args=args, train_dataset=texts(), zo_config=ZOConfig(noise=noise))
    trainer.train()
    trainer.zo.close()
    assert not differing(weights(model), weights(bare))
    bare = tiny("llama")
    zo = ZeroOrder(bare, noise=noise, lr=1e-3)
    for each in batches():
        zo.step(lambda each=each: bare(**each).loss)
    zo.close()
    module = Wrapped(optimizer=sgd(1e-3))
    assert not differing(fitted(tmp_path, module, {"noise": noise}, max_epochs=1), weights(bare))


@pytest.mark.parametrize("noise", ["coordinates", "one_block"])
def test_it_follows_what_moves(noise: str, tmp_path: Path) -> None:
    model = tiny("llama")
    zo = engine(model, noise, num_probes=3)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    zo.step(closure("llama", model))
    seen = weights(model)
    model.model.layers[0].requires_grad_(False)  # a new log begins
    alone, base = tiny("llama"), tiny("llama")
    alone.load_state_dict(seen)
    base.load_state_dict(seen)
    alone.model.layers[0].requires_grad_(False)
    other = engine(alone, noise, num_probes=3)
    other.at(1)
    for step in range(1, 5):
        zo.step(closure("llama", model, step))
        other.step(closure("llama", alone, step))
    log.close()
    assert same_bits(weights(alone), weights(model))
    replay(base, tmp_path / "log")
    assert same_bits(weights(base), weights(model))


def test_a_noise_that_knows_its_model_is_written_as_one_that_does_not() -> None:
    for noise in (OneBlock(order="random"), Coordinates()):
        zo = engine(tiny("mlp"), noise)
        assert zo.noise == noise
        assert hash(zo.noise) == hash(noise)
        assert ZOConfig(noise=zo.noise).to_dict() == ZOConfig(noise=noise).to_dict()

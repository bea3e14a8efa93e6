"""Law: a step moves the blocks that it draws, on average as much as without sampling, and touches no others."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, differing, texts
from hf_helpers import weights as values_of
from models import closure, tiny
from offload_helpers import places, scheduled
from torch import Tensor, nn
from traces import left_as_found, same_bits, weights

from hf_zo import ZOTrainer
from zo_core import (
    NOISES,
    ConfigError,
    Point,
    Sampled,
    SeedLogWriter,
    StepRecord,
    ZeroOrder,
    ZOConfig,
    derive_seed,
    replay,
)
from zo_core.noise import Passes, compile_backend
from zo_core.noise.changes import Change, Pass
from zo_core.noise.sampled import block_of
from zo_core.streaming import DiskStore

ALL: dict[str, Any] = {"rule": "momentum", "num_probes": 2, "weight_decay": 0.1}
LOW_RANK = {"name": "sampled", "of": {"name": "low_rank", "rank": 2, "refresh": 3}}
OF = ["rademacher", "gaussian", "sparse", {"name": "low_rank", "rank": 2, "refresh": 3}]
EVERY_OF = pytest.mark.parametrize("of", OF, ids=lambda of: of if isinstance(of, str) else of["name"])


def engine(model: nn.Module, noise: Any = "sampled", **settings: Any) -> ZeroOrder:
    return ZeroOrder(model, **{"noise": noise, "lr": 1e-3, "eps": 1e-2, "seed": 5, **settings})


def run(zo: ZeroOrder, steps: int, name: str = "llama") -> list[StepRecord]:
    return [zo.step(closure(name, zo.model, zo.step_count)) for _ in range(steps)]


def drawn(zo: ZeroOrder, seed: int) -> set[str]:
    assert isinstance(zo.noise, Sampled)
    return {slot.key for slot in zo.slots if zo.noise.draws(seed, slot.key)}


def seed_with(zo: ZeroOrder, *, some: bool) -> int:
    """The first step whose draw is empty, or has some slots and not all."""
    for step in range(1000):
        count = len(drawn(zo, zo.noise.seed(zo.seed, step, 0)))
        if (0 < count < len(zo.slots)) if some else count == 0:
            return step
    raise AssertionError


# The draw


@pytest.mark.parametrize(
    ("slot", "block"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("model.layers.13.mlp.experts.7.w1", "model.layers.13"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0"),
        ("0.self_attn.q_proj.weight", "0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "model.norm"),
        ("weight", ""),
    ],
)
def test_a_block_is_a_repeated_layer_or_else_a_module(slot: str, block: str) -> None:
    assert block_of(slot) == block


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_blocks_are_drawn_with_the_stated_probability_and_independently(share: float) -> None:
    noise, steps = Sampled(share), 4000
    blocks = [f"layers.{i}.weight" for i in range(6)]
    found = torch.tensor(
        [[float(noise.draws(noise.seed(3, step, 0), block)) for block in blocks] for step in range(steps)]
    ).double()
    centred = found - share
    error = math.sqrt(share * (1 - share) / steps)
    assert centred.mean(0).abs().max().item() <= 5 * error
    # Products of two independent indicators around their means, and of a block with itself one step later.
    for products in [centred[:, i] * centred[:, j] for i in range(6) for j in range(i)] + [centred[1:] * centred[:-1]]:
        assert products.mean(0).abs().max().item() <= 5 * share * (1 - share) / math.sqrt(steps - 1)


def test_the_draw_belongs_to_the_step_and_all_slots_of_a_block_share_it() -> None:
    zo = engine(tiny("llama"), num_probes=3)
    draws = []
    for step in range(30):
        seeds = [zo.noise.seed(zo.seed, step, i) for i in range(3)]
        assert len(set(seeds)) == 3
        assert drawn(zo, seeds[0]) == drawn(zo, seeds[1]) == drawn(zo, seeds[2])
        draws.append(drawn(zo, seeds[0]))
        for key in draws[-1]:
            assert {s.key for s in zo.slots if block_of(s.key) == block_of(key)} <= draws[-1]
    assert len({frozenset(draw) for draw in draws}) > 5


@EVERY_OF
def test_share_one_is_the_other_noise(of: Any) -> None:
    models = tiny("llama"), tiny("llama")
    for model, noise in zip(models, (of, {"name": "sampled", "share": 1.0, "of": of}), strict=True):
        zo = engine(model, noise, **ALL)
        run(zo, 5)
        zo.close()
    assert same_bits(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("of", ["rademacher", "gaussian"])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_estimate_is_unbiased_and_has_the_stated_second_moment(of: str, num_probes: int) -> None:
    sizes = {"embed.weight": 3, "layers.0.a": 2, "layers.0.b": 4, "layers.1.a": 2}
    blocks = [("embed.weight",), ("layers.0.a", "layers.0.b"), ("layers.1.a",)]
    n, d, samples, share = num_probes, sum(sizes.values()), 1200, 0.4
    noise = Sampled(share, of)
    gradient = torch.linspace(-1.0, 2.0, d, dtype=torch.float64)

    def z(seed: int) -> Tensor:
        return torch.cat([noise.values(seed, key, torch.Size([size])) for key, size in sizes.items()]).double()

    directions = torch.stack([torch.stack([z(noise.seed(0, s, i)) for i in range(n)]) for s in range(samples)])
    found = ((directions @ gradient).unsqueeze(2) * directions).mean(1)
    parts = dict(zip(sizes, gradient.split(list(sizes.values())), strict=True))
    expected = 0.0
    for block in blocks:
        size = sum(sizes[key] for key in block)
        norm = sum(parts[key].square().sum().item() for key in block)
        expected += norm * (d - size + (size + n + NOISES.resolve(of).kurtosis - 2) / share) / n
    squares = found.square().sum(1)
    assert abs(squares.mean().item() - expected) <= 5 * squares.std().item() / math.sqrt(samples)
    for estimated, true in zip(found.T, gradient.tolist(), strict=True):
        assert abs(estimated.mean().item() - true) <= 5 * estimated.std().item() / math.sqrt(samples)


# What is not drawn


@pytest.mark.parametrize("rule", ["sgd", "momentum", "sign"])
@EVERY_OF
def test_blocks_that_are_not_drawn_are_neither_copied_nor_written(
    of: Any, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    zo = engine(model, {"name": "sampled", "of": of}, rule=rule, num_probes=2, weight_decay=0.1)
    copied: list[int] = []
    pool = zo.oracle.realisation.pool
    take = pool.take
    monkeypatch.setattr(pool, "take", lambda like: (copied.append(like.numel()), take(like))[1])
    by_key = {slot.key: slot for slot in zo.slots}
    for step in range(8):
        before = {key: slot.tensor.detach().clone() for key, slot in by_key.items()}
        versions = {key: slot.tensor.data._version for key, slot in by_key.items()}
        copied.clear()
        record = run(zo, 1)[0]
        chosen = drawn(zo, record.seed)
        # A matrix of a low-rank direction is not copied at all; everything else once for each of the four probes, and
        # once more in the first step, which measures one point twice.
        expected = [by_key[key].tensor.numel() for key in chosen if isinstance(of, str) or before[key].ndim == 1]
        assert sorted(copied) == sorted((4 if step else 5) * expected)
        for key, slot in by_key.items():
            if key not in chosen:
                assert torch.equal(slot.tensor, before[key])
                assert slot.tensor.data._version == versions[key]
            elif isinstance(of, str) and record.projected_grad:
                assert not torch.equal(slot.tensor, before[key])


@pytest.mark.parametrize("noise", ["sampled", LOW_RANK], ids=["rademacher", "low_rank"])
def test_blocks_that_are_not_drawn_are_not_written_to_disk(
    noise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    put = DiskStore.put
    zo = engine(tiny("llama"), noise, offload="disk", offload_dir=str(tmp_path), **ALL)
    monkeypatch.setattr(DiskStore, "put", lambda self, block, *how: (written.append(block), put(self, block, *how)))
    visits = 0
    for _ in range(10):
        record = run(zo, 1)[0]
        zo.flush()
        names = {f"model.{block_of(key)}" for key in drawn(zo, record.seed) if block_of(key).startswith("layers")}
        assert set(written) <= names
        if noise == "sampled":  # low-rank updates wait for the end of a window
            assert sorted(written) == sorted(names)
        visits += len(written)
        written.clear()
    assert 0 < visits < 20  # two blocks, ten steps
    zo.close()


@pytest.mark.parametrize("estimator", ["spsa", "fzoo"])
def test_a_step_that_draws_nothing_moves_nothing(estimator: str) -> None:
    model = tiny("mlp")
    zo = engine(model, Sampled(0.2), estimator=estimator, num_probes=2, rule="momentum", weight_decay=0.5, lr=0.1)
    zo.step_count = step = seed_with(zo, some=False)
    with left_as_found(model):
        record = zo.step(closure("mlp", model))
    assert record.projected_grad == 0.0
    assert zo.step_count == step + 1
    assert not any(zo.optimizer.state.values())


def test_a_weight_used_out_of_sight_is_found_out_although_the_first_draws_left_it_alone() -> None:
    model = tiny("unseen")
    zo = engine(model, Sampled(0.3))
    records = run(zo, 12, "unseen")
    assert all(math.isfinite(record.loss) for record in records)
    assert not any(record.skipped for record in records)


def test_weight_decay_is_weighted_like_the_update() -> None:
    model = tiny("mlp").double()
    zo = engine(model, Sampled(0.25), lr=0.1, weight_decay=0.5)
    zo.step_count = seed_with(zo, some=True)
    before = {slot.key: slot.tensor.detach().clone() for slot in zo.slots}
    record = zo.step(lambda: 1.0)
    decay = torch.tensor(1 - 0.1 * 0.5 / 0.25).float().item()
    for slot in zo.slots:
        expected = before[slot.key] * decay if slot.key in drawn(zo, record.seed) else before[slot.key]
        assert torch.equal(slot.tensor, expected)


def test_a_torch_optimizer_has_no_gradient_for_what_is_not_drawn() -> None:
    model = tiny("mlp")
    inner = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    zo = ZeroOrder(model, noise="sampled", optimizer=inner, seed=5)
    zo.step_count = seed_with(zo, some=True)
    before = {slot.key: slot.tensor.detach().clone() for slot in zo.slots}
    record = zo.step(closure("mlp", model))
    for slot in zo.slots:
        moved = slot.key in drawn(zo, record.seed)
        assert torch.equal(slot.tensor, before[slot.key]) != moved
        assert (slot.tensor in inner.state) == moved


def test_probes_are_at_the_stated_values_also_where_the_low_rank_is_not_multiplied_out() -> None:
    for noise in ("sampled", LOW_RANK):
        model = tiny("functional_tied_head").double()
        zo = engine(model, noise)
        step = seed_with(zo, some=True)
        seed = zo.noise.seed(zo.seed, step, 0)
        found = zo.oracle.losses([Point(seed, 1e-2)], closure("functional_tied_head", model))[0].item()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for slot in ZeroOrder(other).slots:
                slot.tensor.add_(zo.noise.values(seed, slot.key, slot.tensor.shape, scale=1e-2))
            assert found == pytest.approx(closure("functional_tied_head", other)().item(), rel=1e-8)
            assert found != pytest.approx(closure("functional_tied_head", model)().item(), rel=1e-8)


def test_drawn_blocks_and_masks_keep_the_backend_which_has_no_compiled_form_for_masks() -> None:
    theta, terms = torch.randn(8), ((Sampled(1.0).seed(0, 0, 0), 1.0),)
    for noise, fused in ((Sampled(1.0, "gaussian"), True), (Sampled(1.0, "sparse"), False)):
        direction = noise.direction("w", theta.shape, terms, Passes(backend="compile"))
        assert direction.backend == "compile"
        assert compile_backend.supports(Pass(theta, direction, Change(), theta)) == fused


# Anywhere, and again


@pytest.mark.parametrize(
    ("noise", "dtype", "settings"),
    [
        ("sampled", torch.float32, ALL),
        ({"name": "sampled", "share": 0.3, "of": "gaussian"}, torch.bfloat16, {"num_probes": 4, "weight_decay": 0.1}),
        ({"name": "sampled", "of": "sparse"}, torch.bfloat16, ALL),
        (LOW_RANK, torch.bfloat16, ALL),
    ],
    ids=["rademacher", "gaussian", "sparse", "low_rank"],
)
def test_resident_and_streamed_are_one(
    noise: Any, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    found: list[Any] = []
    for place in places(tmp_path):
        model = tiny("llama", dtype=dtype)
        losses = scheduled(engine(model, noise, **settings, **place), 5)
        found.append((losses, weights(model)))
    for losses, final in found[1:]:
        assert losses == found[0][0]
        assert same_bits(final, found[0][1])


@EVERY_OF
@pytest.mark.parametrize("tier", [None, "disk"])
def test_a_resumed_run_continues_bit_for_bit(tier: str | None, of: Any) -> None:
    place = {} if tier is None else {"offload": tier}
    noise = {"name": "sampled", "of": of}
    straight, again = (engine(tiny("llama"), noise, **ALL, **place) for _ in range(2))
    run(straight, 4)
    file = io.BytesIO()
    torch.save({"model": straight.model.state_dict(), "zo": straight.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    again.model.load_state_dict(kept["model"])
    again.load_state_dict(kept["zo"])
    for zo in (straight, again):
        run(zo, 5)
        zo.close()
    assert same_bits(weights(straight.model), weights(again.model))


@EVERY_OF
def test_replay_is_exact(of: Any, tmp_path: Path) -> None:
    zo = engine(tiny("llama"), {"name": "sampled", "of": of}, **ALL)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    seen = [weights(zo.model)]
    for _ in range(8):
        run(zo, 1)
        seen.append(weights(zo.model))
    log.close()
    for until in (8, 3):
        model = tiny("llama")
        assert replay(model, tmp_path / "log", until=until) == until
        assert same_bits(weights(model), seen[until])


def test_under_the_trainer_a_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    def trainer(path: Path, **changes: Any) -> ZOTrainer:
        args = arguments(path, num_train_epochs=2, **changes)
        config = ZOConfig(noise=Sampled(0.4, "sparse"), lr=1e-3, rule="momentum")
        return ZOTrainer(model=tiny("llama"), args=args, train_dataset=texts(12), zo_config=config)

    straight = trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    straight.train()
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert differing(values_of(straight.model), values_of(again.model)) == []


def test_steps_go_downhill_in_all_blocks() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    for layer in model:
        nn.init.eye_(layer.weight)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    zo = engine(model, num_probes=4, lr=1e-2, eps=1e-3)
    losses = [float(zo.step(lambda: (model(x) + x).square().mean())) for _ in range(80)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(layer.weight, torch.eye(4)) for layer in model)


# Settings


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"name": "sampled", "share": 0.0}, ["share=0.0", "above 0 and at most 1", "probability", "0.25"]),
        ({"name": "sampled", "share": 1.01}, ["share=1.01"]),
        ({"name": "sampled", "share": None}, ["share=None"]),
        ({"name": "sampled", "of": "sampled"}, ["of='sampled'", "product"]),
        ({"name": "sampled", "of": "coordinates"}, ["of='coordinates'", "write noise='coordinates'"]),
        ({"name": "sampled", "of": "one_block"}, ["of='one_block'", "write noise='one_block'"]),
        ({"name": "sampled", "of": {"name": "low_rank", "rank": 0}}, ["rank=0", "at least 1"]),
        ({"name": "sampled", "quantile": 0.5}, ["'sampled'", "quantile", "share, of"]),
    ],
    ids=str,
)
def test_what_cannot_work_says_what_to_write(noise: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ZOConfig(noise=noise)
    assert [word for word in words if word not in str(caught.value)] == []


def test_nested_noises_go_through_json_and_back() -> None:
    inner = {"name": "sparse", "quantile": 0.2, "of": "gaussian"}
    config = ZOConfig(noise={"name": "sampled", "share": 0.25, "of": inner})
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain["noise"] == {"name": "sampled", "share": 0.25, "of": inner}
    twin = ZOConfig.from_dict(plain)
    assert twin.resolve() == config.resolve()
    assert NOISES.resolve(NOISES.resolve(config.noise)) == Sampled(0.25, inner)
    assert hash(Sampled(0.25, inner)) == hash(Sampled(0.25, inner))
    assert copy.deepcopy(NOISES.resolve(config.noise)).wrapped == NOISES.resolve(inner)
    assert Sampled().seed(0, 3, 1) & ((1 << 64) - 1) == derive_seed(0, 3, 1)

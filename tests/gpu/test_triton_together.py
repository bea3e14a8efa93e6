"""Laws: passes over many tensors in one launch, and whole runs, give the bits of eager ones.

Where these run is said in `test_triton.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import batch, tiny
from torch import Tensor

from zo_core import ZeroOrder
from zo_core.noise import Direction
from zo_core.noise.changes import Change, Pass, add_all, flush, together
from zo_core.noise.parts import Part
from zo_core.rules import Momentum, Sgd, Sign

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton_passes import (  # noqa: E402
    DEVICE,
    DTYPES,
    INTERPRETED,
    MARKS,
    NOISES,
    SCALINGS,
    SIZES,
    direction,
    masked,
    same,
    terms,
    weights,
)

from zo_core.noise import triton_backend  # noqa: E402  (they import triton)

pytestmark = MARKS


# Many tensors

tensors = st.lists(
    st.tuples(
        st.sampled_from([0, *SIZES[:-1]]),
        st.sampled_from(list(DTYPES)),
        st.sampled_from([Sgd(), Momentum(), Sign()]),
    ),
    min_size=1,
    max_size=6 if INTERPRETED else 40,
)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
@settings(max_examples=4, suppress_health_check=list(HealthCheck), deadline=None)
@given(chosen=tensors)
def test_passes_over_many_tensors_equal_those_over_each(
    noise: str, count: int, chosen: list[tuple[int, str, Any]]
) -> None:
    """Groups with a rate and weight decay of their own, in one launch for each kind of pass."""
    expected, found = [], []
    for device, held, backend in ((torch.device("cpu"), expected, "eager"), (DEVICE, found, "triton")):
        with together():
            for index, (size, dtype, rule) in enumerate(chosen):
                theta, state = weights(DTYPES[dtype], size).to(device), {}
                along = replace(direction(noise, count, slot=f"layers.{index}"), backend=backend)
                rule.update(theta, state, along, 1e-2 / (1 + index), 0.1 * index)
                held.append([theta, *state.values()])
    for left, right in zip(expected, found, strict=True):
        assert all(same(a, b) for a, b in zip(left, right, strict=True))


def test_passes_that_are_alike_take_one_launch(launches: list[int]) -> None:
    slots = [weights(torch.bfloat16, 16 * n).to(DEVICE) for n in range(1, 20)]
    with together():
        for index, theta in enumerate(slots):
            Momentum().update(theta, {}, direction("rademacher", slot=str(index)), 1e-3 * (index + 1), 0.0)
        assert launches == []
    assert launches == [19]


def test_both_copies_of_many_tensors_take_one_launch(launches: list[int]) -> None:
    slots = [weights(torch.float16, 16 * n).to(DEVICE) for n in range(1, 9)]
    copies = [[torch.empty_like(theta) for theta in slots] for _ in range(2)]
    with together():
        for (sign, made), (index, theta) in itertools.product(zip((1.0, -1.0), copies, strict=True), enumerate(slots)):
            direction("rademacher", 1, None, str(index)).scaled(sign).add_to(theta, out=made[index])
    assert launches == [16]
    for (sign, made), (index, theta) in itertools.product(zip((1.0, -1.0), copies, strict=True), enumerate(slots)):
        along = replace(direction("rademacher", 1, None, str(index)).scaled(sign), backend="eager")
        assert same(along.add_to(theta.cpu().clone()), made[index])


def one_of(sizes: list[int], index: int, **changes: Any) -> tuple[list[Tensor], list[Direction]]:
    """The weights of a layer and their directions, of which one is changed."""
    values = [weights(torch.bfloat16, size) for size in sizes]
    along = [direction("rademacher", 1, None, f"layer.{at}") for at in range(len(sizes))]
    along[index] = replace(along[index], **changes)
    return values, along


MASKED = masked(direction("rademacher", 1, None, "layer.1"), 0.3)
LAYERS: dict[str, tuple[list[Tensor], list[Direction]]] = {
    "all alike": one_of([2048, 16, 1040], 0),
    "an odd size": one_of([2048, 17, 1040], 0),
    "nothing in one": one_of([2048, 0, 1040], 0),
    "two dtypes": ([weights(torch.float32, 64), *one_of([16, 32], 0)[0]], one_of([64, 16, 32], 0)[1]),
    "an address between": one_of([32, 16, 32], 0),
    "columns first": (
        [weights(torch.bfloat16, 512).view(16, 32).t(), *one_of([16, 32], 0)[0]],
        one_of([512, 16, 32], 0)[1],
    ),
    "a scaling": one_of([16, 32, 48], 1, scaling=SCALINGS[1]),
    "a part": one_of([16, 32, 48], 1, part=Part(torch.Size([4, 32]), (1, 0), (1, 32))),
    "stochastic rounding": one_of([16, 32, 48], 1, rounding_seed=7),
    "another noise": one_of([16, 32, 48], 1, noise=NOISES["gaussian"]),
    "another coefficient": one_of([16, 32, 48], 1, terms=((9, -1e-2),)),
    "two terms": one_of([16, 32, 48], 1, terms=terms(2)),
    "a limit": (one_of([16, 32, 48], 0)[0], [*one_of([16, 32, 48], 0)[1][:1], MASKED, *one_of([16, 32, 48], 0)[1][2:]]),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_has_the_copies_of_its_tensors(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows that are prepared where all are alike, and otherwise in those that `run` makes."""
    values, along = LAYERS[case]
    ran: list[int] = []
    run = triton_backend.run
    monkeypatch.setattr(triton_backend, "run", lambda passes: (ran.append(len(passes)), run(passes)))
    sources = [
        torch.cat([value[:1], value]).to(DEVICE)[1:] if "between" in case else value.to(DEVICE) for value in values
    ]
    there = [torch.empty_like(source) for source in sources]
    add_all(along, sources, there)
    assert bool(ran) is (case != "all alike")
    for value, one, found in zip(values, along, there, strict=True):
        assert same(replace(one, backend="eager").add_to(value.clone()), found)


@pytest.mark.parametrize("noise", NOISES)
def test_prepared_rows_are_those_that_any_pass_has(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[int]] = []
    monkeypatch.setattr(triton_backend, "_launch_rows", lambda v, numbers, *much: rows.append([v, *much, *numbers]))
    sources = [weights(torch.float16, 16 * size).to(DEVICE) for size in (70, 1, 65)]
    there = [torch.empty_like(theta) for theta in sources]
    for seed, c in ((3, 1e-3), (3, -1e-3), (2**62, 0.0), (2**62, -0.0)):
        along = [Direction(NOISES[noise], str(at), ((seed, c),), None, "triton") for at in range(3)]
        assert triton_backend.add_alike(along, sources, there)
        triton_backend.run([Pass(*one) for one in zip(sources, along, [Change()] * 3, there, strict=True)])
    assert len(rows) == 8
    assert rows[::2] == rows[1::2]


def test_what_reads_the_weights_of_an_earlier_pass_sees_what_it_wrote(launches: list[int]) -> None:
    """Twice over one tensor; a copy of it; an eager pass over it; a pass over a part; and into what was read."""
    results = []
    for device, backend in ((torch.device("cpu"), "eager"), (DEVICE, "triton")):
        theta, copy, other = (weights(torch.float32, size).to(device) for size in (1040, 1040, 64))
        along = replace(direction("rademacher"), backend=backend)
        with together():
            along.add_to(theta)
            along.add_to(theta, 0.9)
            along.add_to(other)
            along.add_to(theta, out=copy)
            replace(along, backend="eager").add_to(copy)
            along.add_to(copy[112:208])
            along.add_to(copy, out=other.new_empty(1040))
            along.add_to(theta, out=copy)
            flush()
            theta.mul_(2)
            along.add_to(theta)
        results.append([theta, copy, other])
    assert launches == [1, 2, 1, 1, 1, 1, 1]
    assert all(same(a, b) for a, b in zip(*results, strict=True))


# Whole runs


def loss_of(name: str, model: torch.nn.Module) -> Callable[[], Tensor]:
    inputs = {key: value.to(DEVICE) for key, value in batch(name, next(model.parameters()).dtype).items()}

    def loss() -> Tensor:
        output = model(**inputs)
        return (output if isinstance(output, Tensor) else output.loss).float()

    return loss


@pytest.mark.parametrize(
    ("name", "rule", "noise", "probes", "offload"),
    [
        ("mlp", "sgd", "rademacher", 1, None),
        ("mlp", "momentum", "gaussian", 2, None),
        ("mlp", "sign", {"name": "sparse", "quantile": 0.3}, 1, None),
        ("llama", "momentum", "rademacher", 1, "cpu"),
    ],
)
def test_a_run_gives_the_weights_of_an_eager_one(
    name: str, rule: str, noise: Any, probes: int, offload: str | None, launches: list[int]
) -> None:
    found = []
    for backend in ("eager", "triton"):
        model = tiny(name, dtype=torch.bfloat16).to(DEVICE if offload is None else "cpu")
        how = {"offload": offload, "device": None if offload is None else str(DEVICE)}
        zo = ZeroOrder(model, lr=1e-2, rule=rule, noise=noise, num_probes=probes, weight_decay=0.1, **how)
        zo.directions.backend = backend
        run = loss_of(name, model)
        losses = [float(zo.step(run)) for _ in range(2 if name == "mlp" else 1)]
        zo.close()
        found.append((losses, [p.detach().cpu() for p in model.parameters()]))
    assert max(launches) > 1
    assert found[0][0] == found[1][0]
    assert all(same(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_the_copies_of_a_layer_take_one_launch(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_core.probing.layers.MODULE_BY_MODULE", frozenset())  # as on a GPU
    model = tiny("llama").to(DEVICE)
    zo = ZeroOrder(model, lr=1e-2)
    zo.directions.backend = "triton"
    zo.step(loss_of("llama", model))  # looks at the layers
    launches.clear()
    zo.step(loss_of("llama", model))
    sizes = [len(layer.own) for layer in zo.oracle.realisation.layers.values()]
    assert len(sizes) > 1
    assert launches.count(sizes[0]) == 2 * len(sizes)  # for each of the two probes


def test_the_update_of_a_resident_model_takes_a_launch_for_all_tensors_that_are_alike(launches: list[int]) -> None:
    model = tiny("mlp").to(DEVICE)
    zo = ZeroOrder(model, lr=1e-2, rule="momentum")
    zo.directions.backend = "triton"
    zo.measure(loss_of("mlp", model))
    launches.clear()
    zo.optimizer.step()
    assert sum(launches) == len(zo.slots) > 4
    assert len(launches) <= 2  # numbers of elements that are multiples of 16, and others

"""Laws: Triton's kernels give the bits of the eager passes, one at a time or many in one launch.

On a GPU the laws run under the mark ``gpu``. Without one, `test_interpreter.py` runs this file in Triton's interpreter,
in a process of its own, because TRITON_INTERPRET must be set before Triton is imported. The interpreter computes
with numpy: what it cannot show (the compiler, fused multiply-add, subnormals on the device, launches) is left to
the GPU.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import batch, tiny
from torch import Tensor

from zo_core import ZeroOrder
from zo_core.noise import Direction, Gaussian, Rademacher, changes
from zo_core.noise.changes import Change, Pass, add_all, flush, together
from zo_core.noise.direction import Scaling, float32
from zo_core.noise.hashing import rounding_bits, words
from zo_core.noise.mailbox import Mailbox
from zo_core.noise.parts import Part
from zo_core.noise.sparse import SparseDirection
from zo_core.rules import Momentum, Sgd, Sign

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from zo_core.noise import triton_backend, triton_kernels  # noqa: E402  (they import triton)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device: none is available"),
]
real = pytest.mark.skipif(INTERPRETED, reason="what the interpreter cannot show")

NOISES = {"rademacher": Rademacher(), "gaussian": Gaussian()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALINGS = [None, Scaling(relative=True, floor=1e-3), Scaling(relative=False, floor=1e-3)]
#: Sizes on both sides of a word's and of a program's elements.
SIZES = [1, 15, 31, 32, 33, 1000, 1024, 1040, 2500]
LARGE = [(1 << 18) + 7, 5_000_000]
#: Parts of 40 x 66 values, by name: with any strides, of one dimension or more.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed columns": lambda t: t.view(40, 66)[:, 1:-1].t(),
    "from the second on": lambda t: t[1:],
    "every third": lambda t: t[::3],
    "one column": lambda t: t.view(40, 66)[:, 5],
    "a column as a matrix": lambda t: t.view(40, 66)[:, 5:6],
}
HIGH = (0, (1 << 18) - 64, 1 << 18, 1 << 31, (1 << 32) - 64, 1 << 32, 3 << 33)


@pytest.fixture(autouse=True)
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels do the passes with backend "triton", on the CPU too, and none of them is replaced by the eager pass."""
    triton_backend._failed.clear()
    if INTERPRETED:
        found = changes.fused_backend
        monkeypatch.setattr(
            changes, "fused_backend", lambda name, theta: triton_backend if name == "triton" else found(name, theta)
        )
    yield
    assert triton_backend._failed == set()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of passes in every launch."""
    seen: list[int] = []
    one, rows = triton_backend._launch_one, triton_backend._launch_rows
    monkeypatch.setattr(triton_backend, "_launch_one", lambda v, work: (seen.append(1), one(v, work)))
    monkeypatch.setattr(
        triton_backend, "_launch_rows", lambda v, n, count, p: (seen.append(count), rows(v, n, count, p))
    )
    return seen


def weights(dtype: torch.dtype, size: int) -> Tensor:
    """Weights of every magnitude, subnormal ones and both zeros included."""
    generator = torch.Generator().manual_seed(size)
    lowest = -8 if dtype == torch.float16 else -42
    exponents = torch.rand(size, generator=generator, dtype=torch.float64) * (1 - lowest) + lowest
    theta = (torch.randn(size, generator=generator, dtype=torch.float64) * 10**exponents).to(dtype)
    theta[::7] = 0.0
    theta[3::7] = -0.0
    return theta


def scales(dtype: torch.dtype, size: int) -> Tensor:
    """Positive scales on both sides of the floor, and zeros."""
    theta = (torch.randn(size, generator=torch.Generator().manual_seed(size)).abs() * 10 ** -torch.rand(size) * 4).to(
        dtype
    )
    theta[::7] = 0.0
    return theta


def same(left: Tensor, right: Tensor) -> bool:
    """Equality of the bits, which tells 0.0 from -0.0."""
    whole = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.cpu().contiguous().view(whole), right.cpu().contiguous().view(whole))


def terms(count: int) -> tuple[tuple[int, float], ...]:
    return tuple((9 + 2**40 * k, (-1) ** k * 3e-3 / (1 + k % 7)) for k in range(count))


def direction(noise: str, count: int = 1, rounding: int | None = 5, slot: str = "layer.weight") -> Direction:
    return Direction(NOISES[noise], slot, terms(count), rounding, "triton")


def masked(plain: Direction, quantile: float) -> Direction:
    fields = {name: getattr(plain, name) for name in ("noise", "slot", "terms", "rounding_seed", "backend", "scaling")}
    return SparseDirection(**fields, quantile=quantile)


def change(kind: Any, size: int, decay: float = 1.0) -> Change:
    momentum = torch.randn(size, generator=torch.Generator().manual_seed(size)) if kind == "momentum" else None
    return Change(kind, float32(decay), float32(-1e-2), float32(0.9), momentum)


def moved(one: Change, device: torch.device) -> Change:
    return replace(one, momentum=None if one.momentum is None else one.momentum.to(device, copy=True))


def check(theta: Tensor, along: Direction, by: Change, out: bool = False) -> None:
    """The kernel and the eager pass on the CPU give the same bits, in weights and momentum."""
    expected, eager = theta.clone(), moved(by, torch.device("cpu"))
    replace(along, backend="eager").apply(expected, eager)
    there, here = moved(by, DEVICE), theta.to(DEVICE, copy=True)
    result = torch.empty_like(here) if out else here
    along.apply(here, there, result)
    assert same(expected, result)
    assert not out or same(theta, here)
    assert eager.momentum is None or same(eager.momentum, there.momentum)


cases = st.fixed_dictionaries(
    {
        "size": st.sampled_from(SIZES if INTERPRETED else [*SIZES, LARGE[0]]),
        "count": st.sampled_from([1, 2, 3, 6]),
        "rounding": st.sampled_from([None, 5]),
        "decay": st.sampled_from([1.0, 0.999]),
        "kind": st.sampled_from(["add", "sign", "momentum"]),
        "scaling": st.sampled_from(SCALINGS),
        "quantile": st.sampled_from([None, 0.3]),
        "out": st.booleans(),
    }
)
several = settings(max_examples=20 if INTERPRETED else 14, suppress_health_check=list(HealthCheck), deadline=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@several
@given(case=cases)
def test_any_pass_equals_the_eager_one(noise: str, dtype: str, case: dict[str, Any]) -> None:
    make = weights if case["scaling"] is None else scales
    theta = make(DTYPES[dtype], case["size"])
    along = replace(direction(noise, case["count"], case["rounding"]), scaling=case["scaling"])
    if case["quantile"] is not None:
        along = masked(along, case["quantile"])
    check(theta, along, change(case["kind"], theta.numel(), case["decay"]), case["out"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_probes_and_updates_of_every_size(noise: str, dtype: str) -> None:
    sizes = SIZES if INTERPRETED else [*SIZES, *LARGE]
    for size, rounding, decay in itertools.product(sizes, (None, 5), (1.0, 0.999)):
        check(weights(DTYPES[dtype], size), direction(noise, 1, rounding), change("add", size, decay), out=True)


@pytest.mark.parametrize("kind", ["add", "momentum"])
@pytest.mark.parametrize("count", [32, 33, 50])
def test_many_terms(count: int, kind: str) -> None:
    size = 1000 if INTERPRETED else 300_000
    for noise, dtype in (("rademacher", torch.bfloat16), ("gaussian", torch.float32)):
        check(weights(dtype, size), direction(noise, count), change(kind, size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_ties(noise: str, dtype: str) -> None:
    """Weights and signs that end half-way between two values."""
    step = torch.finfo(DTYPES[dtype]).eps
    theta = (1 + torch.arange(1000, dtype=torch.float64).remainder(100) * step).to(DTYPES[dtype])
    check(theta, replace(direction(noise, rounding=None), terms=((3, step / 2),)), Change())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, dtype: str) -> None:
    whole = weights(DTYPES[dtype], 40 * 66)
    there = whole.to(DEVICE, copy=True)
    for noise, kind in (("rademacher", "add"), ("gaussian", "momentum")):
        by = change(kind, VIEWS[view](whole).numel(), 0.999)
        replace(direction(noise, 3), backend="eager").apply(VIEWS[view](whole), moved(by, torch.device("cpu")))
        direction(noise, 3).apply(VIEWS[view](there), moved(by, DEVICE))
        assert same(whole, there)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_and_infinity_survive(dtype: str) -> None:
    for kind in ("add", "momentum"):
        theta = torch.tensor([float("nan"), float("inf"), -float("inf")] * 100, dtype=DTYPES[dtype], device=DEVICE)
        direction("rademacher").apply(theta, moved(change(kind, 300), DEVICE))
        assert theta[0::3].isnan().all()
        assert theta[1::3].eq(float("inf")).all()
        assert theta[2::3].eq(-float("inf")).all()


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


# Words


@triton.jit
def words_kernel(out, first, key0, key1, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    if ROUNDING:
        word = triton_kernels._rounding_bits(tl.load(first), index.to(tl.uint32), key0, key1, 16)
    else:
        word = triton_kernels._words(tl.load(first), index.to(tl.uint32), key0, key1)
    tl.store(out + index, word.to(tl.int32))


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("start", HIGH)
def test_words_on_both_sides_of_32_bits(start: int, rounding: bool) -> None:
    key, cpu = (-123456789, 987654321), torch.device("cpu")
    out = torch.empty(64, dtype=torch.int32, device=DEVICE)
    # In memory, because the interpreter stores scalar arguments from 2**31 to 2**32 as 32 bits.
    first = torch.tensor([start], dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](out, first, *key, ROUNDING=rounding, BLOCK=64)
    wanted = rounding_bits(key, 16, start, 64, cpu) if rounding else words(key, start, 64, cpu)
    assert torch.equal(out.cpu(), wanted)


# What the interpreter cannot show


@real
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
def test_eager_passes_on_the_device_equal_those_on_the_cpu(noise: str, dtype: str) -> None:
    for size, kind, rounding in itertools.product([*SIZES, *LARGE], ("add", "momentum", "sign"), (None, 5)):
        theta, by = weights(DTYPES[dtype], size), change(kind, size, 0.999)
        along = replace(direction(noise, 2, rounding), backend="eager")
        there = theta.cuda()
        along.apply(there, moved(by, DEVICE))
        along.apply(theta, by)
        assert same(theta, there)


@real
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_launches_do_not_wait_for_the_device(noise: str, count: int) -> None:
    slots = [weights(torch.bfloat16, 5000).cuda() for _ in range(3)]
    states: list[dict[str, Any]] = [{} for _ in slots]

    def run() -> None:
        with together():
            for theta, state in zip(slots, states, strict=True):
                Momentum().update(theta, state, direction(noise, count), 1e-3, 0.0)
        direction(noise, count).add_to(slots[0])

    run()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_left_to_eager() -> None:
    theta = torch.zeros(8, device=DEVICE)
    move = direction("rademacher")
    assert triton_backend.supports(Pass(theta, move, Change(), theta))
    assert not triton_backend.supports(Pass(theta.double(), move, Change(), theta.double()))
    assert not triton_backend.supports(Pass(theta, replace(move, offset=0), Change(), theta))


def test_a_kernel_that_fails_is_replaced_by_the_eager_pass(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("ptxas fatal: no\nmore lines")

    monkeypatch.setattr(triton_backend, "_launch", fails)
    theta = weights(torch.bfloat16, 100)
    there = theta.to(DEVICE, copy=True)
    replace(direction("gaussian"), backend="eager").add_to(theta)
    direction("gaussian").add_to(there)
    assert same(theta, there)
    direction("gaussian").add_to(there)
    (record,) = caplog.records
    assert "ptxas fatal: no" in record.getMessage()
    assert "more lines" not in record.getMessage()
    triton_backend._failed.clear()


@pytest.mark.parametrize("count", [1, 7, 224, 1024, 1025, 5000])
def test_a_kernel_fetches_a_table_out_of_host_memory(count: int) -> None:
    numbers = [(-1) ** at * (at << 40) + at for at in range(count)]
    box = Mailbox(not INTERPRETED, lambda: None, 8192)
    values = torch.zeros(count + 1, dtype=torch.int64, device=DEVICE)
    box.put(numbers, partial(triton_backend._fetch, values[:count]))
    assert values.tolist() == [*numbers, 0]


@real
def test_tables_do_not_wait_for_copies() -> None:
    """A copy of a second is under way in the same direction."""
    large = torch.empty(1 << 33, dtype=torch.uint8, device=DEVICE)
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    triton_backend._on_device([1, 2, 3], DEVICE)
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for part in large.split(len(host)):
            part.copy_(host, non_blocking=True)
        end = aside.record_event()
    values = triton_backend._on_device([4, 5, 6], DEVICE)
    here = torch.cuda.current_stream().record_event()
    here.synchronize()
    assert not end.query()
    assert values.tolist() == [4, 5, 6]
    torch.cuda.synchronize()

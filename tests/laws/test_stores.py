"""Law: a store gives back the bytes it was given, and a failed write leaves the block from before."""

from __future__ import annotations

import mmap
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_helpers import deep
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zo_core import ConfigError, StateError, ZeroOrder
from zo_core.streaming import store as stores
from zo_core.streaming import tensor_file
from zo_core.streaming.slab import ALIGNMENT, Slab, slab_bytes, specs_of
from zo_core.streaming.store import DiskStore, RamStore


def block(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "half": torch.randn(33, generator=generator).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.randn((), generator=generator),
    }


def read(store: RamStore | DiskStore) -> dict[str, Tensor]:
    into = {name: torch.full_like(tensor, -1) for name, tensor in store.whole("a.0").items()}
    store.read("a.0", into)
    return {name: into[name] for name in block(0)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=["ram", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RamStore | DiskStore:
    made = RamStore() if request.param == "ram" else DiskStore(tmp_path)
    made.put("a.0", block(0))
    return made


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> RamStore:
    """A store whose memory every driver would take."""
    monkeypatch.setattr(RamStore, "_registered", lambda self, size: mmap.mmap(-1, size))
    made = RamStore(pinned=True)
    made.put("a.0", block(0))
    for name in MOMENTUM:
        made.add_zeros("a.0", name, torch.Size([3, 5]), torch.float32)
    return made


MOMENTUM = ("one", "two", "three")


class Copies(TorchDispatchMode):
    """Counts the copies from one tensor to another, by bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.sizes.append(args[0].numel() * args[0].element_size())
        return func(*args, **(kwargs or {}))


def test_what_was_put_is_read(store: RamStore | DiskStore) -> None:
    assert same(read(store), block(0))
    assert same(store.whole("a.0"), block(0))


def test_what_was_written_is_read(store: RamStore | DiskStore) -> None:
    store.write("a.0", block(1), block(1).keys())
    assert same(read(store), block(1))


def test_host_memory_takes_only_what_changed() -> None:
    store = RamStore()
    store.put("a.0", block(0))
    store.write("a.0", block(1), {"matrix"})
    assert same(read(store), {**block(0), "matrix": block(1)["matrix"]})


def slot(values: dict[str, Tensor]) -> Slab:
    """An arena slot with these values, and momentum behind them."""
    specs = specs_of(values | {name: torch.zeros(3, 5) for name in MOMENTUM})
    filled = Slab(torch.full((slab_bytes(specs) + 64,), 1, dtype=torch.uint8), specs)
    for name, tensor in values.items():
        filled[name].copy_(tensor)
    return filled


@pytest.mark.parametrize(
    "names",
    [set(), {"matrix"}, {"half", "scalar"}, {"two", "three", "scalar"}, None],
    ids=["none", "one", "two", "three", "all"],
)
def test_registered_memory_takes_only_what_changed_in_as_few_copies_as_that_is_apart(
    names: set[str] | None, registered: RamStore
) -> None:
    into = slot(block(0))
    with Copies() as seen:
        registered.read("a.0", into)
    assert seen.sizes == [slab_bytes(specs_of(block(0))), 3 * ALIGNMENT]
    assert same({name: into[name] for name in block(0)}, block(0))
    assert not any(into[name].any() for name in MOMENTUM)
    changed = slot(block(1))
    everything = dict(changed)
    names = set(everything) if names is None else names
    with Copies() as seen:
        registered.write("a.0", changed, names)
    runs = {0: 0, 1: 1, 2: 1, 3: 2, len(everything): 2}[len(names)]
    assert len(seen.sizes) == runs
    zeros = {name: torch.zeros(3, 5) for name in MOMENTUM}
    expected = {name: value if name in names else (block(0) | zeros)[name] for name, value in everything.items()}
    assert same(registered.whole("a.0"), expected)
    registered.read("a.0", into)
    assert same(dict(into), expected)


def test_tensors_in_a_slab_do_not_seem_to_be_tied(registered: RamStore) -> None:
    """Whoever saves tensors takes those of one storage for one tensor, or saves all of it for each."""
    held = [tensor for tensor in registered.whole("a.0").values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == len(held)
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in held)


def test_a_slab_is_as_large_as_its_tensors_and_they_are_aligned() -> None:
    for seed in range(3):
        filled = slot(block(seed))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in filled.values())
        assert all(begin % ALIGNMENT == 0 for begin in filled.begins.values())
        room = slab_bytes(specs_of(dict(filled)))
        assert room <= sum(t.numel() * t.element_size() for t in filled.values()) + ALIGNMENT * len(filled)


class Driver:
    """A driver that registers a few pieces of memory, and then refuses."""

    def __init__(self, limit: int):
        self.limit, self.known, self.ended, self.flags = limit, set[int](), list[int](), set[int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.flags.add(flags)
        if len(self.known) == self.limit:
            return 2
        assert size % mmap.PAGESIZE == address % mmap.PAGESIZE == 0
        self.known.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.ended.append(address)


def check(code: int) -> None:
    if code:
        raise RuntimeError(f"out of memory ({code})")


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_memory_that_the_driver_refuses_is_ordinary_memory(
    limit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver, cleared = Driver(limit), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(stores, "_clear_error", lambda: cleared.append(len(driver.known)))
    store = RamStore(pinned=True)
    store.put("a.0", block(0))
    store.put("a.1", block(1))
    store.add_zeros("a.0", "momentum", torch.Size([7, 5]), torch.float32)
    momentum = store.whole("a.0")["momentum"]
    assert cleared == ([] if limit == 3 else [limit])
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(cleared)
    assert not momentum.any()
    assert same(read(store), block(0))
    assert same(store.whole("a.1"), block(1))
    store.write("a.0", block(1), block(1).keys())
    assert same(read(store), block(1))
    store.put("a.0", block(2))  # from a state dict
    assert same(read(store), block(2))
    assert driver.flags == {stores.PORTABLE}
    del store, momentum
    assert sorted(driver.ended) == sorted(driver.known)


def test_a_pending_error_is_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ones(*_: Any, device: str) -> Tensor:
        asked.append(device)
        raise RuntimeError("CUDA error: the one from before")

    monkeypatch.setattr(torch, "ones", ones)
    stores._clear_error()
    assert asked == ["cuda"]


def test_a_write_that_fails_leaves_the_block_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path)
    store.put("a.0", block(0))

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "write_file", full)
    with pytest.raises(StateError, match=r"No space left.*offload_dir"):
        store.write("a.0", block(1), block(1).keys())
    assert same(read(store), block(0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.0.safetensors"]


def test_a_file_of_ours_is_the_file_of_safetensors(tmp_path: Path) -> None:
    values = {f"of {dtype}": torch.arange(24).view(2, 12).to(dtype) for dtype in tensor_file.DTYPES.values()}
    values |= block(0) | {"turned": torch.arange(6.0).view(2, 3).t(), "grad": torch.ones(3, requires_grad=True)}
    tensor_file.write_file(values, tmp_path / "ours")
    save_file({name: tensor.detach().contiguous() for name, tensor in values.items()}, tmp_path / "theirs")
    assert same(load_file(tmp_path / "ours"), load_file(tmp_path / "theirs"))
    begins = {name: piece.begin for name, piece in tensor_file.read_header(tmp_path / "ours").items()}
    assert all(begins[name] % tensor.element_size() == 0 for name, tensor in values.items())


def test_writing_a_block_makes_no_copy_of_it(tmp_path: Path) -> None:
    """Python's and numpy's memory is counted; torch's is, too, where tensors become bytes."""
    large = {"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20)}
    tracemalloc.start()
    try:
        tensor_file.write_file(large, tmp_path / "large")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        DiskStore(tmp_path / "taken")


@pytest.mark.parametrize("soon", [0, 1 << 30])
def test_small_blocks_are_copied_by_the_caller_and_large_ones_by_a_thread(
    soon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_core.streaming.store.SOON_BYTES", soon)
    resident, inputs = deep()
    streamed, _ = deep()
    zos = ZeroOrder(resident, lr=1e-3), ZeroOrder(streamed, lr=1e-3, offload="cpu")
    store, names = zos[1].streaming.store, set()
    read = store.read
    monkeypatch.setattr(store, "read", lambda *args: (names.add(threading.current_thread().name), read(*args)))
    losses = [[float(zo.step(lambda zo=zo: zo.model(**inputs).loss)) for _ in range(3)] for zo in zos]
    zos[1].close()
    assert losses[0] == losses[1]
    assert all(map(torch.equal, resident.parameters(), streamed.parameters()))
    assert any(name.startswith("zo-offload") for name in names) == (soon == 0)


def test_registered_memory_is_copied_by_the_caller_and_refused_memory_is_not() -> None:
    store = RamStore(pinned=False)
    store.pinned = store.registers = True
    assert store.returns_soon(1 << 40)
    store.registers = False  # after the driver has refused, a copy waits for the device
    assert not store.returns_soon(1)
    assert not DiskStore().returns_soon(1)


def test_a_fork_that_ends_leaves_the_files_of_its_parent() -> None:
    store = DiskStore()
    store.put("a", block(0))
    if not (child := os.fork()):
        del store  # as at the end of the interpreter
        os._exit(0)
    os.waitpid(child, 0)
    assert store.whole("a").keys() == block(0).keys()
    folder = store.folder
    del store
    assert not folder.exists()

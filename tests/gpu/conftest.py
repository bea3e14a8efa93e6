"""Fixtures of the laws of Triton's kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zo_core.noise import changes


@pytest.fixture
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels do the passes with backend "triton", on the CPU too, and none of them is replaced by the eager pass."""
    from triton_passes import INTERPRETED

    from zo_core.noise import triton_backend

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
    from zo_core.noise import triton_backend

    seen: list[int] = []
    one, rows = triton_backend._launch_one, triton_backend._launch_rows
    monkeypatch.setattr(triton_backend, "_launch_one", lambda v, work: (seen.append(1), one(v, work)))
    monkeypatch.setattr(
        triton_backend, "_launch_rows", lambda v, n, count, p: (seen.append(count), rows(v, n, count, p))
    )
    return seen

"""The learning gate: within 4,000 forwards, from at most 0.75 to at least 0.97 on held-out data."""

from __future__ import annotations

import copy

import pytest

from benchmarks.learning import FORWARDS, METHODS, Method, TinyTransformer, accuracy, adapt, pretrained


@pytest.fixture(scope="module", params=[0, 1, 2])
def start(request: pytest.FixtureRequest) -> tuple[int, TinyTransformer]:
    return request.param, pretrained(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_shifted_task_is_learnt_with_forward_passes_only(start: tuple[int, TinyTransformer], method: Method) -> None:
    seed, model = start[0], copy.deepcopy(start[1])
    assert accuracy(model) <= 0.75
    reached, forwards = adapt(model, method, seed, goal=0.97)
    assert reached >= 0.97
    assert forwards <= FORWARDS

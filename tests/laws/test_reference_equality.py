"""Law: the engine's losses, projected gradients and weights are those of plain MeZO, bit for bit."""

from __future__ import annotations

import copy

import pytest
from models import FAMILIES, closure, tiny
from probing import PLAIN
from reference import Step, mezo
from torch.optim.lr_scheduler import LambdaLR
from traces import same_bits, weights

from zo_core import NOISES, ZeroOrder

LR, EPS = 1e-3, 1e-3


def decayed(step: int) -> float:
    return 1.0 / (1.0 + 0.1 * step)


@pytest.mark.parametrize(
    ("tied", "steps"),
    [
        pytest.param(True, 30, id="tied-30"),
        pytest.param(False, 30, id="untied-30"),
        pytest.param(True, 200, id="tied-200", marks=pytest.mark.slow),
        pytest.param(False, 200, id="untied-200", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_with_a_schedule_and_weight_decay_equals_the_reference(name: str, tied: bool, steps: int) -> None:
    fast, slow = tiny(name, tied), tiny(name, tied)
    expected = mezo(slow, closure(name, slow), [LR * decayed(step) for step in range(steps)], EPS, weight_decay=0.1)

    zo = ZeroOrder(fast, lr=LR, eps=EPS, weight_decay=0.1)
    schedule = LambdaLR(zo.optimizer, decayed)
    found = []
    for _ in range(steps):
        record = zo.step(closure(name, fast))
        found.append(Step(record.loss, record.projected_grad))
        schedule.step()

    assert found == expected
    assert same_bits(weights(fast), weights(slow))
    assert expected[-1].loss < expected[0].loss  # and it is training, not standing still


@pytest.mark.parametrize("noise", PLAIN)
@pytest.mark.parametrize("num_probes", [1, 3])
def test_every_noise_and_number_of_probes_equals_the_reference(noise: str, num_probes: int) -> None:
    fast = tiny("llama")
    slow = copy.deepcopy(fast)
    z = NOISES.resolve(noise)
    expected = mezo(slow, closure("llama", slow), [LR] * 20, EPS, num_probes, weight_decay=0.1, seed=7, noise=z)

    zo = ZeroOrder(fast, lr=LR, eps=EPS, weight_decay=0.1, seed=7, noise=noise, num_probes=num_probes)
    records = [zo.step(closure("llama", fast)) for _ in range(20)]

    assert [Step(record.loss, record.projected_grad) for record in records] == expected
    assert same_bits(weights(fast), weights(slow))

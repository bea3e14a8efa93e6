"""Law: weight decay has the rate of the gradient, never takes a whole weight, and is undone where it can be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import closure, tiny
from test_normaliser import engine
from test_rollback import largest_difference
from traces import same_bits, weights

from zo_core import StateError, ZeroOrder
from zo_core.normaliser import CURVATURE
from zo_core.records import Probe, Rollback


@pytest.mark.parametrize("loss", [1.0, 1e-9])
def test_weight_decay_has_the_rate_of_the_gradient(loss: float) -> None:
    """``(1 - lr wd / sqrt(v)) theta``, as in SGD with the rate ``lr / sqrt(v)``, and with a small v ``lr wd``."""
    decayed, zo = (engine(normalise=CURVATURE, lr=0.25, weight_decay=decay) for decay in (0.1, 0.0))
    for index in range(3):
        before = weights(decayed.model)
        zo.model.load_state_dict(decayed.model.state_dict())
        for each in (decayed, zo):
            each.step(lambda each=each, index=index: closure("mlp", each.model, index)() * loss)
        assert zo.normaliser == decayed.normaliser
        root = math.sqrt(zo.normaliser.mean_square)
        assert (root > 1.0) == (loss == 1.0)
        for name, weight in weights(decayed.model).items():
            wanted = weights(zo.model)[name].double() - 0.025 / max(root, 1.0) * before[name].double()
            # Two results of one rounding, and the factor of the decay, which is a float32 close to 1.
            assert (weight.double() - wanted).abs().max() <= 2**-22 * before[name].abs().max()


def test_a_step_whose_weight_decay_leaves_nothing_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    zo = engine(normalise="gradient", lr=3.0, weight_decay=0.5, brake=None)
    before, state = weights(zo.model), zo.normaliser.saved()
    record = zo.step(closure("mlp", zo.model, 0))
    assert record.skipped == "weight decay would take away 1.5 times the weights; lower weight_decay or lr"
    assert record.skipped in caplog.text
    assert same_bits(weights(zo.model), before)
    assert zo.normaliser.saved() == state


@pytest.mark.parametrize(
    "rule", ["sgd", {"name": "momentum", "beta": 0.0}, {"name": "sgd", "decay_to": "start"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_weight_decay_has_taken_comes_back_or_is_not_asked_for(dtype: torch.dtype, rule: Any) -> None:
    """Each step leaves 97.5%: after 1,000 of them, going back would divide rounding errors by 1e-11."""
    steps = 300 if dtype == torch.float32 else 60
    model = tiny("mlp", dtype=dtype)
    zo = ZeroOrder(model, lr=0.1, weight_decay=0.25, brake="rollback", rule=rule, noise="gaussian")
    seen = []
    for step in range(steps):
        seen.append(weights(model))
        zo.repeat((Probe(zo.noise.seed(0, step, 0), 0.01 * (-1) ** step),), 1.0)
        zo.optimizer.step()
    history, share = zo.braking.history, 1 / 256 if dtype == torch.float32 else 1 / 2
    kept = len(history.packed)
    assert kept == steps - history.floor == math.floor(math.log(share) / math.log(0.975))
    zo.repeat((), 1.0, rollback=Rollback(history.floor, 0.5))
    zo.optimizer.step()
    largest = max(float(weight.abs().max()) for weight in seen[history.floor].values())
    # A rounding at each step, of numbers no larger than these, which going back has divided by what was left.
    bound = kept / share * torch.finfo(dtype).eps * largest
    assert largest_difference(weights(model), seen[history.floor]) <= bound
    zo.repeat((), 1.0, rollback=Rollback(history.floor - 1, 0.25))
    with pytest.raises(StateError, match="the updates are known from step"):
        zo.optimizer.step()

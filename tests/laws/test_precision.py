"""Law: losses are float32 whatever the weights are, and no cache or mode of torch's mixes the probes."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, batch, closure, tiny
from probing import EPS, POINTS, measure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from traces import same_bits, weights

from zo_core import NOISES, ZeroOrder
from zo_core.probing import as_scalar

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize("where", ["around the step", "inside the closure"])
@pytest.mark.parametrize("name", ["llama", "bert", "functional_tied_head", "attention"])
def test_the_weight_cache_of_autocast_does_not_mix_the_probes(name: str, where: str) -> None:
    def projected_grad(cache_enabled: bool) -> float:
        model = tiny(name)
        loss = closure(name, model)
        context = torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled)

        def inside() -> Tensor:
            with context if where == "inside the closure" else nullcontext():
                return loss()

        zo = ZeroOrder(model, lr=1e-3, eps=EPS)
        with context if where == "around the step" else nullcontext():
            zo.step(inside)
            return zo.step(inside).projected_grad  # the second step also needs the updated weights

    assert projected_grad(cache_enabled=True) == projected_grad(cache_enabled=False) != 0.0


@pytest.mark.parametrize("name", ["llama", "functional_tied_head", "unseen"])
def test_forwards_between_measurements_and_steps_use_the_weights_of_their_time(name: str) -> None:
    def losses(cache_enabled: bool) -> list[float]:
        model = tiny(name)
        zo = ZeroOrder(model, lr=1e-2, eps=EPS)
        loss = closure(name, model.eval())
        found = []
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            for _ in range(2):
                found.append(loss().item())
                zo.measure(loss)
                found.append(loss().item())
                zo.optimizer.step()
        return [*found, loss().item()]

    found = losses(cache_enabled=True)
    assert found == losses(cache_enabled=False)
    assert found[0] == found[1] != found[2] == found[3] != found[4]


@EVERY_DTYPE
@pytest.mark.parametrize("name", [*FAMILIES, "mlp"])
def test_losses_of_half_precision_models_are_computed_in_float32(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(name, dtype=dtype)
    dtypes = []

    def loss() -> Tensor:
        value = closure(name, model)()
        dtypes.append(value.dtype)
        return value

    measure(model, loss)
    assert dtypes == [torch.float32] * len(POINTS)
    assert not caplog.messages


def test_the_upcast_loss_is_that_of_the_upcast_logits() -> None:
    model = tiny("mlp", dtype=torch.bfloat16)
    logits = []
    handle = model.head.register_forward_hook(lambda module, args, output: logits.append(output))
    found = measure(model, closure("mlp", model))
    handle.remove()
    labels = batch("mlp")["labels"]
    assert [F.cross_entropy(value.float(), labels).item() for value in logits] == found


def test_a_loss_in_half_precision_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1).to(torch.bfloat16)
    zo = ZeroOrder(model, lr=1e-2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            zo.step(lambda: model(torch.ones(1, 4, dtype=torch.bfloat16)).mean())
    assert len(caplog.messages) == 1
    assert "bfloat16" in caplog.messages[0]
    assert "float32" in caplog.messages[0]


@pytest.mark.usefixtures("cold_caches")
@pytest.mark.parametrize("noise", list(NOISES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
@pytest.mark.parametrize("first", ["inference", "normal"])
def test_steps_inside_inference_mode_are_the_same_steps(first: str, rule: str, dtype: torch.dtype, noise: str) -> None:
    """Lightning's sanity check, for one, may be the first to run the model, in inference mode."""
    model, other = tiny("functional_tied_head", dtype=dtype), tiny("functional_tied_head", dtype=dtype)
    inside, outside = (ZeroOrder(m, lr=1e-3, rule=rule, noise=noise, num_probes=2) for m in (model, other))
    for step in range(4):
        with torch.inference_mode(mode=(step % 2 == 0) == (first == "inference")):
            inside.step(closure("functional_tied_head", model))
        outside.step(closure("functional_tied_head", other))
    assert same_bits(weights(model), weights(other))
    assert not any(p.is_inference() for p in model.parameters())
    closure("functional_tied_head", model)().backward()


def test_losses_of_a_device_without_float64_are_summed_on_the_host() -> None:
    """Real devices of Apple refuse float64; fake tensors only say where their results are."""
    with FakeTensorMode():
        for device, wanted in (("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")):
            loss = as_scalar(torch.empty(1, device=device))
            assert (loss.device.type, loss.dtype, loss.shape) == (wanted, torch.float64, torch.Size([]))

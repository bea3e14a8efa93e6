"""Law: a measurement gives the loss at theta + scale * z, in any model, unmodified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import EVERY, FAMILIES, Unseen, closure, tiny
from probing import EPS, PLAIN, POINTS, counted, measure, moved
from torch import Tensor, nn
from torch.utils import cpp_extension
from traces import left_as_found, same_bits, weights

from zo_core import ZeroOrder
from zo_core.probing import as_scalar

Project = Callable[[Tensor, Tensor], Tensor]

JIT = "ignore:.*torch.jit.*"  # TorchScript is deprecated; as long as torch has it, it should work


@pytest.mark.parametrize(("name", "tied"), [(name, True) for name in EVERY] + [(name, False) for name in FAMILIES])
def test_the_loss_is_that_of_a_copy_whose_weights_were_set(name: str, tied: bool) -> None:
    model = tiny(name, tied)
    found = measure(model, closure(name, model))
    # What the measurement switches off by looking at all torch functions, the copy has to do without as well.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for point, loss in zip(POINTS, found, strict=True):
            other = moved(model, point)
            with torch.no_grad():
                assert closure(name, other)().item() == loss
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("noise", PLAIN)
def test_every_noise_perturbs_along_itself(noise: str) -> None:
    model = tiny("mlp")
    found = ZeroOrder(model, noise=noise).oracle.losses(POINTS, closure("mlp", model))
    with torch.no_grad():
        expected = [closure("mlp", moved(model, point, noise))().item() for point in POINTS]
    assert [loss.item() for loss in found] == expected


@pytest.mark.parametrize("name", ["llama", "functional_tied_head", "attention"])
def test_sixteen_bit_weights_are_perturbed_to_the_nearest(name: str) -> None:
    model = tiny(name, dtype=torch.bfloat16)
    seen: list[dict[str, Tensor]] = []
    module = next(m for m in model.modules() if m._parameters)
    handle = module.register_forward_hook(lambda m, args, output: seen.append(weights(m)))
    measure(model, closure(name, model), POINTS[:2])
    handle.remove()
    for point, found in zip(POINTS[:2], seen, strict=True):
        other = moved(model, point)
        path = next(path for path, m in model.named_modules() if m is module)
        assert same_bits(found, weights(other.get_submodule(path)))


def test_frozen_parameters_are_not_perturbed() -> None:
    model = tiny("mlp")
    model.inner.requires_grad_(False)
    seen = []
    handle = model.inner[0].register_forward_hook(lambda m, args, output: seen.append(m.weight.detach().clone()))
    losses = measure(model, closure("mlp", model), POINTS[:2])
    handle.remove()
    assert all(torch.equal(weight, model.inner[0].weight) for weight in seen)
    assert losses[0] != losses[1]


def test_a_weight_given_straight_to_a_loss_function_is_the_perturbed_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    calls: list[int] = []

    def loss() -> Tensor:
        a, b = model["a"], model["b"]
        return F.mse_loss(a.weight, target=b.weight) + a.bias.log_softmax(0)[0]

    zo = ZeroOrder(model)
    found = [value.item() for value in zo.oracle.losses(POINTS, counted(loss, calls))]
    for point, value in zip(POINTS, found, strict=True):
        other = moved(model, point)
        a, b = other["a"], other["b"]
        assert (F.mse_loss(a.weight, b.weight) + a.bias.log_softmax(0)[0]).item() == value
    assert len(calls) == len(POINTS)
    assert not zo.oracle.realisation.whole


def test_questions_about_shape_or_dtype_make_no_copy() -> None:
    model = tiny("mlp")
    loss = closure("mlp", model)
    served = []

    def nosy() -> Tensor:
        value = loss()
        weight = model.head.weight
        served.append((weight.shape, weight.dtype, weight.device, weight.numel(), weight.size(0), weight.dim()))
        with torch._C.DisableTorchFunction():
            assert weight.stride() == (0, 0)  # still the placeholder, which takes no memory
        return value

    assert measure(model, nosy, POINTS[:2]) == measure(model, loss, POINTS[:2])
    assert served[0] == (torch.Size([3, 16]), torch.float32, torch.device("cpu"), 48, 3, 2)


def test_the_closure_runs_once_per_point() -> None:
    model = tiny("mlp")
    calls: list[int] = []
    measure(model, counted(closure("mlp", model), calls))
    assert len(calls) == len(POINTS)


def test_a_closure_may_return_the_same_tensor_each_time() -> None:
    model = tiny("mlp")
    loss, kept = closure("mlp", model), torch.zeros((), dtype=torch.float64)
    assert measure(model, lambda: kept.copy_(loss().detach())) == measure(model, loss)


def test_at_most_the_layers_in_use_and_the_tied_ones_have_copies() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    alive = []

    def look(module: nn.Module, args: object, output: object) -> None:
        with torch._C.DisableTorchFunction():  # or the question itself would be served
            alive.append([m.weight.data_ptr() for m in model if not m.weight.isnan().any()])

    handles = [layer.register_forward_hook(look) for layer in model]
    measure(model, lambda: model(torch.ones(1, 4)).sum(), POINTS[:1])
    for handle in handles:
        handle.remove()
    assert [len(pointers) for pointers in alive] == [1] * 5
    assert len({pointer for pointers in alive for pointer in pointers}) == 1  # one buffer goes round


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_slot_of_a_transformer_is_copied_once_per_probe(name: str, tied: bool) -> None:
    model = tiny(name, tied)
    zo = ZeroOrder(model)
    copied: list[str] = []
    direction = zo.oracle.realisation.direction
    zo.oracle.realisation.direction = lambda slot, point: (copied.append(slot.key), direction(slot, point))[1]
    zo.oracle.losses(POINTS[:1], closure(name, model))
    unused = {"shared.weight"} if (name, tied) == ("t5", False) else set()
    assert sorted(copied) == sorted({slot.key for slot in zo.slots} - unused)


def test_a_forward_that_fails_and_is_caught_gives_its_copies_back() -> None:
    model = tiny("mlp")
    loss = closure("mlp", model)

    def careful() -> Tensor:
        with pytest.raises(RuntimeError):
            model.inner(torch.ones(5, 5))  # of the wrong size for the first layer
        with torch._C.DisableTorchFunction():
            assert model.inner[0].weight.isnan().all()
        return loss()

    assert measure(model, careful, POINTS[:2]) == measure(model, loss, POINTS[:2])


# Weights used where neither hooks nor torch functions show them


def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def in_torchscript(folder: Path) -> Project:
    return torch.jit.script(scripted)


def in_cpp(folder: Path) -> Project:
    if shutil.which("c++") is None or not cpp_extension.is_ninja_available():
        pytest.skip("needs a C++ compiler and ninja")
    source = "at::Tensor project(at::Tensor x, at::Tensor weight) { return at::matmul(x, weight.t()); }"
    return cpp_extension.load_inline("project", source, functions=["project"], build_directory=str(folder)).project


@pytest.mark.parametrize(
    "how",
    [
        None,
        pytest.param(in_torchscript, marks=pytest.mark.filterwarnings(JIT)),
        pytest.param(in_cpp, marks=pytest.mark.slow),
    ],
)
def test_a_model_with_unseen_parts_says_once_that_it_needs_whole_copies(
    how: Callable[[Path], Project] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if how is not None:
        monkeypatch.setattr(Unseen, "project", staticmethod(how(tmp_path)))
    model, calls = tiny("unseen"), []
    zo = ZeroOrder(model, lr=1e-2, eps=EPS)
    with torch.no_grad():
        expected = [closure("unseen", moved(model, point))().item() for point in POINTS]
    assert [loss.item() for loss in zo.oracle.losses(POINTS, counted(closure("unseen", model), calls))] == expected
    assert [r for r in caplog.messages if "cannot be observed" in r] == caplog.messages[:1] == caplog.messages
    assert len(calls) == 1 + len(POINTS)  # the first probe was repeated
    for _ in range(2):
        calls.clear()
        zo.step(counted(closure("unseen", model), calls))
    assert len(calls) == 2  # in the second step, since the first may look at more
    assert len(caplog.messages) == 1


def test_the_weights_that_a_custom_operator_is_given_are_seen() -> None:
    model, calls = tiny("custom_op"), []
    zo = ZeroOrder(model)
    zo.oracle.losses(POINTS, counted(closure("custom_op", model), calls))
    assert not zo.oracle.realisation.whole
    assert len(calls) == len(POINTS)


@pytest.mark.filterwarnings(JIT)
def test_a_script_module_is_perturbed_as_a_whole() -> None:
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    plain = nn.Sequential(*layers)
    model = nn.Sequential(layers[0], torch.jit.script(layers[1]))
    x = torch.ones(1, 8)
    found = measure(model, lambda: model(x).sum())
    assert found == measure(plain, lambda: plain(x).sum())
    assert len(set(found)) == len(found)


@pytest.mark.slow
@pytest.mark.filterwarnings(JIT)
def test_a_compiled_model_is_perturbed_as_a_whole() -> None:
    model = tiny("mlp")
    plain = measure(model, closure("mlp", model))
    compiled = torch.compile(model, backend="eager")
    assert measure(compiled, closure("mlp", compiled)) == plain
    model.compile(backend="eager")
    assert measure(model, closure("mlp", model)) == plain


def test_a_loss_that_is_nan_for_its_own_reasons_is_nan_and_no_weight_is_blamed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model)
    with left_as_found(model):
        found = zo.oracle.losses(POINTS, lambda: closure("mlp", model)() * float("nan"))
    assert all(loss.isnan() for loss in found)
    assert not caplog.messages
    assert not zo.oracle.realisation.whole


# What a closure may return


@pytest.mark.parametrize(
    "value", [2.5, 5 / 2, np.float32(2.5), torch.tensor(2.5), torch.tensor([[2.5]], dtype=torch.bfloat16), "2.5"]
)
def test_one_number_in_any_form_is_a_loss(value: object) -> None:
    scalar = as_scalar(value)
    assert scalar.dtype == torch.float64
    assert scalar.shape == ()
    assert scalar.item() == 2.5

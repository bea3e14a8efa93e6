"""Law: a measurement gives the loss at theta + scale * z and leaves no trace, in any model and by any way out."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import EVERY, FAMILIES, closure, tiny
from torch import Tensor, nn
from traces import generators, left_as_found, same_bits, weights

from zo_core import NOISES, LossError, Point, ZeroOrder
from zo_core.oracle import as_scalar

EPS = 1e-2
POINTS = (Point(11, EPS), Point(11, -EPS), Point(12, 0.0), Point(12, 3 * EPS))
EVERY_MODEL = pytest.mark.parametrize("name", EVERY)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def moved(model: nn.Module, point: Point, noise: str = "rademacher") -> nn.Module:
    """A copy in eval mode whose weights were set to theta + scale * z, the obvious way."""
    zo = ZeroOrder(other := copy.deepcopy(model))
    for slot in zo.slots:
        z = NOISES.resolve(noise).z(point.seed, slot.key, 0, slot.tensor.numel(), scale=point.scale)
        slot.tensor.data.copy_(slot.tensor.data + z.view(slot.tensor.shape).to(slot.tensor.dtype))
    return other.eval()


def measure(model: nn.Module, loss: Callable[[], object], points: tuple[Point, ...] = POINTS) -> list[float]:
    return [value.item() for value in ZeroOrder(model).oracle.losses(points, loss)]


def counted(loss: Callable[[], Tensor], calls: list[int]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        calls.append(1)
        return loss()

    return run


# The loss at a point


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


@pytest.mark.parametrize("noise", list(NOISES))
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
        other = moved_in_float32(model, point)
        path = next(path for path, m in model.named_modules() if m is module)
        assert same_bits(found, weights(other.get_submodule(path)))


def moved_in_float32(model: nn.Module, point: Point) -> nn.Module:
    other = copy.deepcopy(model)
    for slot in ZeroOrder(other).slots:
        z = NOISES.resolve("rademacher").z(point.seed, slot.key, 0, slot.tensor.numel(), scale=point.scale)
        slot.tensor.data.copy_((slot.tensor.data.float() + z.view(slot.tensor.shape)).to(slot.tensor.dtype))
    return other


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


def test_a_model_with_scripted_parts_says_once_that_it_needs_whole_copies(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("scripted")
    zo = ZeroOrder(model, eps=EPS)
    calls: list[int] = []
    for _ in range(3):
        zo.step(counted(closure("scripted", model), calls))
    assert [r for r in caplog.messages if "cannot be observed" in r] == caplog.messages[:1] == caplog.messages
    assert len(calls) == 1 + 2 * 3  # the first probe was repeated


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_script_module_is_perturbed_as_a_whole() -> None:
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    plain = nn.Sequential(*layers)
    model = nn.Sequential(layers[0], torch.jit.script(layers[1]))
    x = torch.ones(1, 8)
    found = measure(model, lambda: model(x).sum())
    assert found == measure(plain, lambda: plain(x).sum())
    assert len(set(found)) == len(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
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


# No trace


@EVERY_DTYPE
@EVERY_MODEL
def test_weights_buffers_objects_modes_and_hooks_are_what_they_were(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype=dtype)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    before = generators()
    with left_as_found(model):
        measure(model, closure(name, model))
    assert generators() == before


@pytest.mark.parametrize("name", ["llama", "functional_tied_head", "convnet", "scripted"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_exception_in_the_middle_of_the_forward_restores_everything(name: str, at: int) -> None:
    model = tiny(name)
    inner = [module for module in model.modules() if module._parameters][-2]
    calls: list[int] = []
    forward = inner.forward

    def fails(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        if len(calls) == at + 1:
            raise ZeroDivisionError("in the middle")
        return forward(*args, **kwargs)

    zo = ZeroOrder(model, eps=EPS, num_probes=2)
    if name == "scripted":
        inner = model.head  # the one that is called
        forward = inner.forward
    inner.forward = fails
    with left_as_found(model), pytest.raises(ZeroDivisionError, match="in the middle"):
        zo.step(closure(name, model))
    assert zo.step_count == 0
    del inner.forward
    found = zo.step(closure(name, model))
    fresh = tiny(name)
    assert found == ZeroOrder(fresh, eps=EPS, num_probes=2).step(closure(name, fresh))
    assert same_bits(weights(model), weights(fresh))


def test_keyboard_interrupt_restores_everything() -> None:
    model = tiny("mlp")

    def loss() -> Tensor:
        closure("mlp", model)()
        raise KeyboardInterrupt

    with left_as_found(model), pytest.raises(KeyboardInterrupt):
        measure(model, loss)


def test_a_loss_that_is_refused_restores_everything() -> None:
    model = tiny("mlp")
    with left_as_found(model), pytest.raises(LossError):
        measure(model, lambda: closure("mlp", model)().expand(2))


def test_users_hooks_stay_and_see_the_perturbed_weights() -> None:
    model = tiny("mlp")
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    model.head.register_forward_hook(lambda module, args, output: seen.append(module.weight.detach().clone()))
    with left_as_found(model):
        measure(model, closure("mlp", model), POINTS[:1])
    expected = moved(model, POINTS[0]).head.weight
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], expected)


def test_gradients_that_were_there_stay_and_none_are_made() -> None:
    model = tiny("mlp")
    model.head.bias.grad = torch.ones(3)
    measure(model, closure("mlp", model))
    assert torch.equal(model.head.bias.grad, torch.ones(3))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.bias"]
    assert torch.is_grad_enabled()
    closure("mlp", model)().backward()  # and autograd still works on these parameters
    assert model.head.weight.grad is not None


# Modes and randomness


def test_probes_run_in_eval_mode_unless_dropout_is_asked_for() -> None:
    model = tiny("convnet")
    model.head.eval()
    seen: list[list[bool]] = []
    loss = closure("convnet", model)

    def looks() -> Tensor:
        seen.append([module.training for module in (model, model.norm, model.dropout, model.head)])
        return loss()

    ZeroOrder(model).step(looks)
    ZeroOrder(model, dropout=True).step(looks)
    assert seen == [[False] * 4] * 2 + [[True, False, True, False]] * 2


@pytest.mark.parametrize("dropout", [True, False])
def test_batchnorm_statistics_do_not_move(dropout: bool) -> None:
    model = tiny("convnet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    zo = ZeroOrder(model, lr=1e-2, dropout=dropout)
    for _ in range(3):
        zo.step(closure("convnet", model))
    assert same_bits(dict(model.named_buffers()), before)
    assert model.norm.training


def test_all_probes_share_their_random_numbers_and_a_step_draws_what_one_forward_draws() -> None:
    model = tiny("bert")
    other = copy.deepcopy(model)
    drawn = []

    def loss() -> Tensor:
        value = closure("bert", model)()
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return value

    start = torch.get_rng_state(), np.random.get_state(), random.getstate()
    ZeroOrder(model, dropout=True, num_probes=3).step(loss)
    after = generators()
    torch.set_rng_state(start[0])
    np.random.set_state(start[1])
    random.setstate(start[2])
    assert generators() != after
    with torch.no_grad():
        closure("bert", other)()
    once = (torch.rand(()).item(), np.random.rand(), random.random())
    assert generators() == after
    assert drawn == [once] * 6


def test_dropout_masks_are_the_same_on_both_sides() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    masks = []

    def loss() -> Tensor:
        output = model(torch.ones(64, 4))
        masks.append(output == 0)
        return output.sum()

    ZeroOrder(model, dropout=True).step(loss)
    assert torch.equal(masks[0], masks[1])
    assert 0 < masks[0].float().mean() < 1
    ZeroOrder(model, dropout=True).step(loss)
    assert not torch.equal(masks[0], masks[2])  # another step, another mask


# Precision


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


@pytest.mark.parametrize("name", ["llama", "functional_tied_head", "scripted"])
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
    loss = closure("mlp", model)
    found = measure(model, loss)
    handle.remove()
    labels = loss.__closure__[0].cell_contents["labels"]  # type: ignore[index]
    assert [F.cross_entropy(value.float(), labels).item() for value in logits] == found


def test_a_loss_in_half_precision_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1).to(torch.bfloat16)
    zo = ZeroOrder(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            zo.step(lambda: model(torch.ones(1, 4, dtype=torch.bfloat16)).mean())
    assert len(caplog.messages) == 1
    assert "bfloat16" in caplog.messages[0]
    assert "float32" in caplog.messages[0]


@pytest.mark.parametrize("first", ["inference", "normal"])
def test_steps_inside_inference_mode_are_the_same_steps(first: str) -> None:
    """Lightning's sanity check, for one, may be the first to run the model, in inference mode."""
    model, other = tiny("llama"), tiny("llama")
    inside, outside = (ZeroOrder(m, lr=1e-3, rule="momentum") for m in (model, other))
    for step in range(4):
        with torch.inference_mode(mode=(step % 2 == 0) == (first == "inference")):
            inside.step(closure("llama", model))
        outside.step(closure("llama", other))
    assert same_bits(weights(model), weights(other))
    assert not any(p.is_inference() for p in model.parameters())
    closure("llama", model)().backward()


# What a closure may return


@pytest.mark.parametrize(
    "value", [2.5, 5 / 2, np.float32(2.5), torch.tensor(2.5), torch.tensor([[2.5]], dtype=torch.bfloat16), "2.5"]
)
def test_one_number_in_any_form_is_a_loss(value: object) -> None:
    scalar = as_scalar(value)
    assert scalar.dtype == torch.float64
    assert scalar.shape == ()
    assert scalar.item() == 2.5

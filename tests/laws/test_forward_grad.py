"""Law: `forward_grad` is the product of the gradient with each direction, and an error where that cannot be had."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import arguments, bare_loop, differing, texts
from lightning_helpers import QUIET, Wrapped, batches, fitted, sgd
from models import closure, tiny
from torch import Tensor, nn
from traces import generators, left_as_found, same_bits, weights

from hf_zo import ZOTrainer
from zo_core import ConfigError, LossError, ModelError, Point, SeedLogWriter, ZeroOrder, ZOConfig, ZOOptimizer, replay
from zo_core.exchange import shares

pytestmark = QUIET
NOISES: list[Any] = ["rademacher", "gaussian", "sparse", {"name": "sampled", "share": 0.7}, "low_rank"]


def engine(model: nn.Module, **settings: Any) -> ZeroOrder:
    return ZeroOrder(model, **{"estimator": "forward_grad", "lr": 1e-2, "eps": 1e-3, **settings})


def products(zo: ZeroOrder, name: str) -> list[tuple[float, float]]:
    """For each direction of the next step ``z . grad L`` by backpropagation, and the sum of the absolute terms."""
    other = tiny(name, dtype=zo.slots[0].tensor.dtype).eval()
    other.load_state_dict(zo.model.state_dict())
    parameters = dict(other.named_parameters())
    gradients = torch.autograd.grad(closure(name, other)(), list(parameters.values()))
    of = dict(zip(parameters, gradients, strict=True))
    names = {id(parameter): key for key, parameter in zo.model.named_parameters()}
    found = []
    for index in range(zo.num_probes):
        seed, terms = zo.noise.seed(zo.seed, zo.step_count, index), [torch.zeros(1)]
        for slot in zo.slots:
            direction = zo.direction(slot, seed)
            if not direction.still:
                along = direction.gradient(slot.tensor.detach()).double() * of[names[id(slot.tensor)]]
                terms.append(along.flatten())
        every = torch.cat(terms)
        found.append((every.sum().item(), every.abs().sum().item()))
    return found


@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "functional_tied_head", "attention", "encoder", "kept_view", "convnet"])
def test_slopes_are_products_with_the_gradient(name: str, noise: Any) -> None:
    model = tiny(name).double()
    loss = closure(name, model)
    zo = engine(model, noise=noise)
    for _ in range(1 if noise == "low_rank" else 3):  # which adds updates of a window in float32
        ((expected, size),) = products(zo, name)
        record = zo.step(loss)
        # The two sides are rounded to float64, and so are sums over the network, of some hundred terms each.
        bound = 2.0**-52 * (abs(record.loss) / zo.eps + 256 * size)
        assert abs(record.projected_grad - expected) <= bound
        assert abs(record.probes[0].coefficient - expected) <= bound + 2.0**-24 * abs(expected)
    assert record.projected_grad != 0.0


def test_several_directions_and_groups_with_an_eps_of_their_own() -> None:
    model = tiny("mlp").double()
    loss = closure("mlp", model)
    groups = [{"params": model.inner.parameters(), "eps": 4e-3}, {"params": model.head.parameters()}]
    zo = ZeroOrder(model, estimator="forward_grad", num_probes=3, optimizer=ZOOptimizer(groups, lr=1e-2, eps=1e-3))
    expected = products(zo, "mlp")
    record = zo.step(loss)
    for probe, (slope, size) in zip(record.probes, expected, strict=True):
        assert abs(3 * probe.coefficient - slope) <= 2.0**-24 * abs(slope) + 1e-12 * size


def test_pending_updates_of_low_rank_windows_count() -> None:
    model = tiny("kept_view").double()
    zo = engine(model, noise={"name": "low_rank", "rank": 2, "refresh": 50})
    for step in range(3):
        zo.step(closure("kept_view", model, step))
    ((expected, size),) = products(zo, "kept_view")
    record = zo.step(closure("kept_view", model))
    assert abs(record.projected_grad - expected) <= 2.0**-23 * size


def test_the_slopes_of_micro_batches_add_up() -> None:
    models = tiny("mlp"), tiny("mlp")
    pieces, whole = (engine(model) for model in models)
    for index in range(4):
        pieces.measure(closure("mlp", models[0], index))
    record = pieces.optimizer.step()
    expected = whole.step(lambda: sum(closure("mlp", models[1], index)().double() for index in range(4)))
    assert record.loss == pytest.approx(expected.loss, rel=2.0**-51)
    # A tangent's values on both sides are rounded to float64, and of sums of four of them the last steps are.
    assert abs(record.projected_grad - expected.projected_grad) <= 8 * 2.0**-53 * record.loss / pieces.eps


@pytest.mark.parametrize("settings", [{}, {"normalise": "curvature"}, {"rule": "momentum"}], ids=str)
def test_steps_without_a_rate_go_downhill(settings: dict[str, Any]) -> None:
    model = tiny("mlp")
    zo = ZeroOrder(model, estimator="forward_grad", num_probes=4, **settings)
    assert zo.normaliser is not None
    assert zo.normaliser.name == settings.get("normalise", "gradient")
    losses = [float(zo.step(closure("mlp", model))) for _ in range(60)]
    assert losses[-1] < 0.95 * losses[0]


def test_a_score_has_the_slope_of_minus_the_loss() -> None:
    models = tiny("mlp"), tiny("mlp")
    loss, score = (closure("mlp", model) for model in models)
    records = engine(models[0]).step(loss), engine(models[1], maximize=True).step(lambda: 0.0 - score())
    assert records[0].projected_grad == records[1].projected_grad
    assert records[0].loss == records[1].loss


@pytest.mark.parametrize("name", ["llama", "t5", "convnet"])
def test_a_step_leaves_no_trace_but_its_update_and_runs_the_closure_once_a_direction(name: str) -> None:
    model = tiny(name)
    calls = []

    def drawing() -> Tensor:
        calls.append(torch.rand(()).item())
        return closure(name, model)() * (1 + 0 * calls[-1])

    zo = engine(model, num_probes=2, dropout=True)
    zo.step(drawing)
    torch.manual_seed(3)
    before, calls[:] = generators(), []
    with left_as_found(model):
        zo.measure(drawing)
    assert len(calls) == 2
    assert len(set(calls)) == 1
    after = generators()
    torch.manual_seed(3)
    assert generators() == before
    torch.rand(())
    model_alone = tiny(name)
    if name == "convnet":
        model_alone.norm.eval()  # as in probes
    closure(name, model_alone)()
    assert generators() == after


def test_a_run_replays_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, part = tiny("llama"), tiny("llama")
    zo = engine(whole, num_probes=2)
    SeedLogWriter.attach(zo, tmp_path / "log")
    for step in range(4):
        zo.step(closure("llama", whole, step))
    base = tiny("llama")
    replay(base, tmp_path / "log")
    assert same_bits(weights(base), weights(whole))
    first = engine(part, num_probes=2)
    for step in range(2):
        first.step(closure("llama", part, step))
    second = engine(part, num_probes=2)
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        second.step(closure("llama", part, step))
    assert same_bits(weights(part), weights(whole))


def test_both_trainers_run_it_as_the_bare_loop(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=1e-2, gradient_accumulation_steps=2)
    bare, model = tiny("llama"), tiny("llama")
    bare_loop(bare, args, texts(), estimator="forward_grad")
    ZOTrainer(model=model, args=args, train_dataset=texts(), zo_config=ZOConfig(estimator="forward_grad")).train()
    assert not differing(weights(model), weights(bare))
    bare = tiny("llama")
    zo = engine(bare, lr=1e-3)
    for each in batches():
        zo.step(lambda each=each: bare(**each).loss)
    module = Wrapped(optimizer=sgd(1e-3))
    assert not differing(fitted(tmp_path, module, {"estimator": "forward_grad"}, max_epochs=1), weights(bare))


# Where there is no derivative


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize(
    ("name", "operation"),
    [("recurrent", "mkldnn_rnn_layer"), ("parametrised", "_weight_norm_interface"), ("custom_op", "zo_tests.project")],
)
def test_an_operation_without_a_forward_derivative_is_named(name: str, operation: str) -> None:
    model = tiny(name)
    with left_as_found(model), pytest.raises(ModelError, match=f"{operation}.* has no forward derivative.*'spsa'"):
        engine(model).step(closure(name, model))


def test_a_function_with_a_backward_alone_is_named() -> None:
    model = tiny("mlp")
    loss = closure("mlp", model)
    with left_as_found(model), pytest.raises(ModelError, match="Doubled has no forward derivative"):
        engine(model).step(lambda: Doubled.apply(loss()))


def test_code_that_uses_weights_unseen_is_an_error() -> None:
    model = tiny("unseen")
    with left_as_found(model), pytest.raises(ModelError, match="cannot be observed"):
        engine(model).step(closure("unseen", model))


def test_a_loss_without_a_derivative_is_an_error() -> None:
    model = tiny("mlp")
    loss = closure("mlp", model)
    with pytest.raises(LossError, match="returned a float"):
        engine(model).step(lambda: loss().item())
    with pytest.raises(LossError, match="carries no derivative"):
        engine(model).step(lambda: loss().detach())


def test_a_derivative_that_is_not_that_of_the_value_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mlp")
    loss = closure("mlp", model)
    engine(model).step(loss)
    assert not caplog.records
    engine(model).step(lambda: loss() + loss().detach())  # as of two kernels one of which drops the derivative
    assert "by differentiation" in caplog.text


def test_what_cannot_be_differentiated_is_an_error_of_the_settings() -> None:
    with pytest.raises(ConfigError, match="stack_probes=True has no use with estimator='forward_grad'"):
        ZOConfig(estimator="forward_grad", noise="low_rank", stack_probes=True)


@pytest.mark.parametrize(
    ("name", "place", "settings"),
    [
        ("t5", "cpu", {"num_probes": 1, "weight_decay": 0.1}),
        ("llama", "cpu", {"num_probes": 3, "dropout": True, "rule": "momentum"}),
        ("llama", "disk", {"noise": "one_block", "num_probes": 2}),
        ("llama", "cpu", {"noise": {"name": "low_rank", "rank": 2, "refresh": 2}, "num_probes": 2}),
        ("llama", "cpu", {"normalise": "curvature", "lr": None}),
    ],
    ids=str,
)
def test_streamed_weights_give_the_bits_of_resident_ones(
    name: str, place: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for where in ({}, {"offload": place, "offload_dir": str(tmp_path) if place == "disk" else None}):
        model, numbers = tiny(name), []
        zo = engine(model, **settings, **where)
        torch.manual_seed(0)
        for step in range(3):
            zo.measure_all([closure(name, model, 2 * step), closure(name, model, 2 * step + 1)])
            record = zo.optimizer.step()
            numbers.append([record.loss, record.projected_grad, *(probe.coefficient for probe in record.probes)])
        zo.close()
        found.append((numbers, weights(model), generators()))
    assert found[0][0] == found[1][0]
    assert not differing(found[1][1], found[0][1])
    assert found[0][2] == found[1][2]


def test_a_streamed_step_reads_each_layer_once_for_all_directions() -> None:
    model, runs = tiny("llama", layers=3), []
    zo = engine(model, offload="cpu", num_probes=3)
    zo.step(closure("llama", model))
    assert zo.streaming is not None
    layer = zo.streaming.blocks[0].module
    with_hook = layer.register_forward_hook(lambda *_: runs.append(1))
    before = zo.streaming.bytes_read
    zo.step(closure("llama", model))
    with_hook.remove()
    assert len(runs) == 3
    assert zo.streaming.bytes_read - before <= sum(block.nbytes for block in zo.streaming.blocks)


def test_streamed_weights_where_no_dual_tensor_can_be_seen_are_named() -> None:
    class Rounds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

    model = tiny("llama")
    zo = engine(model, offload="cpu")
    with pytest.raises(ModelError, match="Rounds"):
        zo.step(lambda: Rounds.apply(closure("llama", model)()))
    zo.step(closure("llama", model))


def test_a_loss_that_is_not_finite_skips_the_step() -> None:
    model = tiny("mlp")
    loss = closure("mlp", model)
    record = engine(model).step(lambda: loss() * math.nan)
    assert record.skipped is not None
    assert "not finite" in record.skipped


def test_both_slopes_of_a_direction_are_found_by_one_process() -> None:
    """They are one forward; dealt out singly, each process would run that of every direction."""
    seeds = [11, 12, 13, 14]
    points = [Point(seed, scale, linear=True) for seed in seeds for scale in (1.0, -1.0)]
    assert shares("points", points, seeds, 2) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert shares("points", points[:2], seeds[:1], 2) == [(0,), (1,)]
    plain = [Point(point.seed, point.scale) for point in points]
    assert shares("points", plain, seeds, 2) == [(0, 2, 4, 6), (1, 3, 5, 7)]

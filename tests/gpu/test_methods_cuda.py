"""Laws of the methods on CUDA: a streamed run is the resident one, and its record gives the same weights on a CPU.

What no GPU shares with a CPU is the rounding of a forward. So losses are compared between runs on the device, and
weights also with those that a CPU computes from the probes that the device has measured, bit for bit.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import batch, tiny
from torch import Tensor, nn

from zo_core import StepRecord, ZeroOrder
from zo_core.noise import Passes, Rademacher
from zo_core.noise.changes import Change
from zo_core.noise.parts import Part

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is available"),
]

METHODS: dict[str, dict[str, Any]] = {
    "one_block": {"noise": "one_block", "num_probes": 2},
    "coordinates": {"noise": "coordinates", "num_probes": 3},
    "decay_to start": {"rule": {"name": "sgd", "decay_to": "start"}, "weight_decay": 0.1},
    "momentum, decay_to start": {"rule": {"name": "momentum", "decay_to": "start"}, "weight_decay": 0.1},
    "forward_grad": {"estimator": "forward_grad", "num_probes": 2},
}
STREAMED = [name for name in METHODS if name != "forward_grad"]


def moved(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny("llama", tied=False, dtype=dtype)


def run(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> tuple[list[StepRecord], dict[str, Tensor]]:
    """The records of three steps, and the weights after them."""
    zo = ZeroOrder(model, **{"lr": 1e-2, "brake": None, **settings})
    records = [zo.step(lambda: model(**inputs).loss.float()) for _ in range(3)]
    zo.flush()
    weights = moved(model)
    zo.close()
    return records, weights


def repeated(model: nn.Module, records: list[StepRecord], **settings: Any) -> dict[str, Tensor]:
    """The weights that a CPU computes from the probes of the records."""
    zo = ZeroOrder(model, **{"lr": 1e-2, "brake": None, **settings})
    for record in records:
        zo.repeat(record.probes, record.loss)
        zo.optimizer.step()
    return moved(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_cpu_computes_the_same_weights_from_the_probes(method: str, dtype: torch.dtype) -> None:
    model = llama(dtype)
    other, inputs = copy.deepcopy(model), {name: value.to(DEVICE) for name, value in batch("llama").items()}
    records, weights = run(model.to(DEVICE), inputs, **METHODS[method])
    assert all(record.probes and math.isfinite(record.loss) for record in records)
    assert equal(repeated(other, records, **METHODS[method]), weights)


@pytest.mark.parametrize("method", STREAMED)
def test_a_streamed_run_is_the_resident_one(method: str) -> None:
    inputs = {name: value.to(DEVICE) for name, value in batch("llama").items()}
    found = [
        run(llama().to(place), inputs, **METHODS[method], **how)
        for place, how in ((DEVICE, {}), ("cpu", {"offload": "cpu", "device": DEVICE}))
    ]
    numbers = [[(record.loss, record.probes) for record in records] for records, _ in found]
    assert numbers[0] == numbers[1]
    assert equal(found[0][1], found[1][1])


def test_exact_slopes_are_those_of_backpropagation() -> None:
    model = llama().to(DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in batch("llama").items()}
    zo = ZeroOrder(model, lr=1e-3, estimator="forward_grad", brake=None)
    z = {slot.key: zo.direction(slot, zo.noise.seed(zo.seed, 0, 0)) for slot in zo.slots}
    model(**inputs).loss.backward()
    slope = math.fsum(
        float((slot.tensor.grad * z[slot.key].values(slot.shape, slot.tensor.device)).sum()) for slot in zo.slots
    )
    assert zo.step(lambda: model(**inputs).loss).projected_grad == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["add", "sign", "momentum"])
def test_a_part_of_a_tensor_moves_as_on_a_cpu(kind: Any, dtype: torch.dtype) -> None:
    """What a process holds of a weight that is dealt to several, with the backend of a GPU."""
    part = Part(torch.Size((70, 64)), (3, 16), (40, 32))
    theta = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    ends = []
    for device in ("cpu", DEVICE):
        mine = Rademacher().direction("w", part.whole, ((3, 1e-2), (4, -2e-2)), Passes(9, "triton", part=part))
        momentum = torch.ones(40 * 32, device=device) if kind == "momentum" else None
        change = Change(kind, rate=-0.5, beta=0.5, momentum=momentum)
        ends.append(
            [mine.apply(theta.to(device, copy=True), change).cpu(), *([] if momentum is None else [momentum.cpu()])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_beside_backpropagation_the_rest_moves_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    other = copy.deepcopy(model)
    inputs, labels = torch.randn(32, 8), torch.arange(32) % 4
    before, there = moved(model), (inputs.to(DEVICE), labels.to(DEVICE))
    zo = ZeroOrder(model.to(DEVICE), lr=1e-2, brake=None, backprop=("4",), backprop_lr=1e-2)
    records = [zo.step(lambda: F.cross_entropy(model(there[0]), there[1])) for _ in range(8)]
    assert float(records[-1]) < float(records[0])
    weights = moved(model)
    assert not torch.equal(weights["4.weight"], before["4.weight"])
    other[4].requires_grad_(requires_grad=False)
    forward_only = repeated(other, records)
    rest = [name for name in weights if not name.startswith("4.")]
    assert all(
        torch.equal(weights[name], forward_only[name]) and not torch.equal(weights[name], before[name]) for name in rest
    )


def test_an_adapter_along_the_activations() -> None:
    pytest.importorskip("peft")
    from hf_zo import activation_adapter

    inputs = {name: value.to(DEVICE) for name, value in batch("llama").items()}
    base = llama().to(DEVICE).eval()
    with torch.no_grad():
        untouched = base(**inputs).logits.clone()
    model = activation_adapter(base, [inputs], 2).eval()
    down = {name: value for name, value in model.named_parameters() if "lora_A" in name}
    assert down
    assert all(value.device.type == DEVICE and bool(value.isfinite().all()) for value in down.values())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, untouched)  # B is zero
    other = copy.deepcopy(model).cpu()
    records, weights = run(model, inputs)
    assert equal(repeated(other, records), weights)
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)

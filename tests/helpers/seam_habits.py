"""Direct checks of undocumented behaviour of libraries that we rely on: the second half of `seams.py`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import seam_runs as runs
import torch
from seam_watch import Habit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STRATEGY = "lightning_zo/strategy.py"


def _hooks_are_counted(_: Path) -> bool:
    from zo_core.forward_state import HOOKS

    layer = nn.Linear(2, 2)
    counts = [sum(len(vars(layer)[name]) for name in HOOKS)]
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        register(lambda *_: None)
        counts.append(sum(len(vars(layer)[name]) for name in HOOKS))
    return all(a < b for a, b in pairwise(counts))


def _versions(_: Path) -> bool:
    tensor = torch.zeros(2)
    before = tensor._version
    silent = tensor.data
    silent += 1
    same = tensor._version == before
    tensor.add_(1)
    return same and tensor._version > before


def _one_storage(_: Path) -> bool:
    tensor, other = torch.zeros(2), torch.zeros(2)
    views = tensor.untyped_storage(), tensor[1:].untyped_storage()
    return views[0]._cdata == views[1]._cdata != other.untyped_storage()._cdata


def _global_hooks(_: Path) -> bool:
    from torch.optim import optimizer as module

    handles = [
        module.register_optimizer_step_pre_hook(lambda *_: None),
        module.register_optimizer_step_post_hook(lambda *_: None),
    ]
    try:
        return bool(module._global_optimizer_pre_hooks and module._global_optimizer_post_hooks)
    finally:
        for handle in handles:
            handle.remove()


class _Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def _moves_ask(_: Path) -> bool:
    layer = nn.Linear(2, 2)
    with _Seen() as seen:
        layer.to(torch.float64)
    return torch._has_compatible_shallow_copy_type in seen.functions


def _reads_a_truth(_: Path) -> bool:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[Any] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        bool(torch.ones(()).bool())
    return torch.ops.aten._local_scalar_dense.default in seen


def _keyed_modes_go(_: Path) -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from zo_core.dispatch import watched_by, watchers

    with FakeTensorMode():
        modes = watchers()
    with watched_by(modes):
        fake = torch.ones(2)
    return type(fake) is not Tensor and not watchers()


def _sanitizer_finds(_: Path) -> bool:
    from torch.cuda._sanitizer import EventHandler

    races = []
    for waits in (False, True):
        books = EventHandler()
        books._handle_stream_creation(1)
        books._handle_kernel_launch(0, set(), {8}, set(), "written", {8: []})
        books._handle_event_creation(5)
        books._handle_event_record(5, 0)
        if waits:
            books._handle_event_wait(5, 1)
        books._handle_event_deletion(5)
        found = books._handle_kernel_launch(1, {8}, set(), set(), "read", {8: []})
        races.append([error.previous_access.operator for error in found])
    return races == [["written"], []]


def _compiled(_: Path) -> bool:
    in_place, wrapped = nn.Linear(2, 2), torch.compile(nn.Linear(2, 2))
    in_place.compile()
    names = [name.partition(".")[0] for name in wrapped.state_dict()]
    alike = isinstance(wrapped, torch._dynamo.OptimizedModule) and set(names) == {"_orig_mod"}
    return alike and in_place._compiled_call_impl is not None


def _lightning_compiled(_: Path) -> bool:
    from lightning.pytorch.utilities.compile import from_compiled
    from lightning_helpers import Wrapped

    return bool(from_compiled(torch.compile(Wrapped("mlp")))._compiler_ctx) and not Wrapped("mlp")._compiler_ctx


def _torchao_names(_: Path) -> bool:
    from torchao.utils import TorchAOBaseTensor
    from torchao_models import Quantised

    from zo_core.targets.torchao import FIT

    weight: Any = Quantised().blocks[0].up.weight
    return isinstance(weight, TorchAOBaseTensor) and type(weight).__name__ in FIT and isinstance(weight.scale, Tensor)


def _factors_have_names(_: Path) -> bool:
    from models import tiny
    from peft.tuners.lora import LoraLayer

    from hf_zo import low_rank_adapter

    layers = [module for module in low_rank_adapter(tiny("llama")).modules() if isinstance(module, LoraLayer)]
    return bool(layers) and all(isinstance(layer.lora_A["default"].weight, nn.Parameter) for layer in layers)


def _accelerate_logs(_: Path) -> bool:
    from accelerate import big_modeling

    return bool(big_modeling.logger.name == "accelerate.big_modeling")


HABITS = [
    *(
        Habit(
            f"torch.nn.modules.module:{name}",
            "zo_core/probing/recorded.py",
            "a hook of all modules sees the forwards of each probe, so none is left out",
            runs.global_hooks,
        )
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
    ),
    Habit("torch:nn.Module.hooks", "zo_core/forward_state.py", "hooks of a forward's own", _hooks_are_counted),
    Habit("torch:Tensor._version", "zo_core/forward_state.py", "counts writes in place, not through .data", _versions),
    *(
        Habit("torch:UntypedStorage._cdata", f"{file}.py", "tells memory from other memory", _one_storage)
        for file in ("zo_core/cache", "zo_core/probing/scratch", "zo_core/streaming/streaming", "hf_zo/estimate/trace")
    ),
    *(
        Habit(f"torch.optim.optimizer:{name}", "zo_core/rules/torch_rule.py", "hooks of all optimizers", _global_hooks)
        for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    ),
    Habit("torch:_has_compatible_shallow_copy_type", "zo_core/stand_ins.py", "asked by Module.to", _moves_ask),
    Habit("torch.utils._python_dispatch:_mode_key", "zo_core/dispatch.py", "modes of torch's own", _keyed_modes_go),
    *(
        Habit(f"torch.cuda._sanitizer:{name}", "tests/helpers/simulated_device.py", "finds races", _sanitizer_finds)
        for name in (
            "EventHandler",
            "_handle_stream_creation",
            "_handle_event_creation",
            "_handle_event_record",
            "_handle_event_wait",
            "_handle_event_deletion",
            "_handle_kernel_launch",
        )
    ),
    Habit("torch.ops.aten:_local_scalar_dense", "hf_zo/estimate/trace.py", "bool(tensor) on meta", _reads_a_truth),
    *(
        Habit(f"torch:{name}", f"zo_core/{file}.py", "tells compiled modules", _compiled)
        for name, file in (
            ("nn.Module._compiled_call_impl", "probing/materialise"),
            ("_dynamo.OptimizedModule", "probing/materialise"),
            ("_orig_mod", "targets/base"),
        )
    ),
    Habit(
        "lightning:LightningModule._compiler_ctx",
        "lightning_zo/strategy.py",
        "tells compiled modules",
        _lightning_compiled,
    ),
    *(
        Habit(
            f"lightning:log.{end}",
            "lightning_zo/journal.py",
            "the names under which a monitored value is logged: or a repeated step has no value for a checkpoint",
            lambda path: {"found", "found_step", "found_epoch"} <= runs.logged_names(path),
        )
        for end in ("_step", "_epoch")
    ),
    Habit(
        "lightning:multiple optimizers",
        "lightning_zo/strategy.py",
        "Lightning's words, for which ours stand",
        runs.two_optimizers,
    ),
    Habit(
        "torchao:utils.TorchAOBaseTensor",
        "zo_core/targets/torchao.py",
        "names of classes and scales",
        _torchao_names,
    ),
    Habit("peft:tuners.lora.LoraLayer.lora_A", "hf_zo/low_rank.py", "holds the directions", _factors_have_names),
    Habit("accelerate:big_modeling", "hf_zo/offload.py", "the logger that is quiet for a while", _accelerate_logs),
]

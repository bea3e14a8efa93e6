"""The table of undocumented names of libraries that we rely on: one row per name, with the file and the reason.

An upgrade that drops or renames one of these need not raise an error: an override is no longer called, or a flag is no
longer read. `tests/project/test_seams.py` makes each row a test, and fails for a name that is missing here.
"""

from __future__ import annotations

from typing import Any

import seam_runs as runs
from seam_watch import Seam

MIXIN, STRATEGY = "hf_zo/mixin.py", "lightning_zo/strategy.py"
PROCESSES = "lightning_zo/processes.py"
HF, PL = "transformers:Trainer", "lightning.pytorch.strategies:SingleDeviceStrategy"


def overridden(attribute: str, why: str) -> Seam:
    return Seam(f"{HF}.{attribute}", MIXIN, why, runs.trainer, ours="hf_zo.mixin:ZOTrainerMixin", reader="transformers")


def of_strategy(attribute: str, why: str, **more: Any) -> Seam:
    given = {"ours": "lightning_zo.strategy:ZOStrategy", "reader": "lightning", **more}
    return Seam(f"{PL}.{attribute}", STRATEGY, why, runs.strategy, **given)


def functorch(attribute: str) -> Seam:
    why = "stacked probes wrap and unwrap values of all copies without a copy of them, at the level of their own vmap"
    return Seam(f"torch._C._functorch:{attribute}", "zo_core/probing/stacked.py", why, runs.stacked)


SEAMS = [
    # transformers
    overridden("_move_model_to_device", "or a model that is to be streamed goes to the device as a whole"),
    overridden("_save_checkpoint", "or the seed log knows of no checkpoint, and a repeated step overwrites one"),
    overridden("_clip_grad_norm", "or gradients that do not exist are clipped, and grad_norm is logged"),
    overridden("_get_grad_norm", "or grad_norm is logged beside the projected gradient"),
    Seam(
        f"{HF}._load_scaler",
        MIXIN,
        "or a checkpoint of backpropagation in fp16 cannot be resumed from: there is no scaler to load it into",
        runs.resumed,
        ours="hf_zo.mixin:ZOTrainerMixin",
        reader="transformers",
    ),
    overridden("create_accelerator_and_postprocess", "or fp16 has a GradScaler, which fails without gradients"),
    Seam(f"{HF}._get_output_dir", MIXIN, "the folder of a run, also of a hyperparameter search", runs.trainer),
    Seam(f"{HF}._tr_loss", MIXIN, "or one loss that is not a number stays in all later logs", runs.trainer),
    Seam(
        f"{HF}.compute_loss",
        "hf_zo/loss_calls.py",
        "replaced on the object while training_step runs: or nothing is measured",
        runs.trainer,
        reader="transformers",
    ),
    Seam(
        f"{HF}.create_optimizer",
        MIXIN,
        "replaced on the object: or an optimizer that a subclass makes is stepped without an engine",
        runs.trainer,
        reader="transformers",
    ),
    Seam(
        "transformers:PreTrainedModel._hf_peft_config_loaded",
        "hf_zo/quantised.py",
        "set while a trainer is made: or Trainer refuses a quantised model whose scales are trained",
        runs.int4_trainer,
        reader="transformers",
    ),
    Seam(
        "transformers:PreTrainedModel._from_config",
        "hf_zo/estimate/skeleton.py",
        "makes a model of the class that a configuration names, in a given dtype",
        runs.estimate,
    ),
    Seam(
        "transformers:PreTrainedModel._no_split_modules",
        "zo_core/streaming/blocks.py",
        "names the layers of a model; without it containers of like modules are looked for",
        runs.streamed,
    ),
    Seam(
        "transformers:TrainingArguments._n_gpu",
        "hf_zo/checks.py",
        "set to 1: or a process that sees several GPUs wraps the model in DataParallel",
        runs.several_gpus,
        reader="transformers",
    ),
    # accelerate
    Seam(
        "accelerate:Accelerator.prepare_model",
        "hf_zo/preparing.py",
        "replaced on the object: or several processes wrap the model in DistributedDataParallel",
        runs.trainer,
        reader="accelerate",
    ),
    Seam(
        "accelerate:Accelerator.prepare_optimizer",
        "hf_zo/preparing.py",
        "replaced on the object: or the momentum of all streamed layers goes to the device at once",
        runs.trainer,
        reader="accelerate",
    ),
    Seam(
        "accelerate:Accelerator.backward",
        "hf_zo/loss_calls.py",
        "replaced on the object: or the scale of the loss stays unknown, and there would be a backward pass",
        runs.trainer,
        reader="transformers",
    ),
    Seam("accelerate:Accelerator.scaler", MIXIN, "set to None: or fp16 fails", runs.trainer, reader="accelerate"),
    Seam(
        "accelerate:Accelerator._dataloaders",
        "hf_zo/auto_lr.py",
        "put back after the range test: or its loader would be asked for the end of an epoch",
        runs.range_test,
    ),
    Seam(
        "accelerate.data_loader:DataLoaderAdapter.base_dataloader",
        "hf_zo/auto_lr.py",
        "the loader inside: or the range test tells the accelerator that an epoch has begun",
        runs.range_test,
    ),
    Seam("torch.nn:Module._hf_hook", "hf_zo/offload.py", "where accelerate has its hook", runs.opened_in_place),
    Seam(
        "accelerate.hooks:AlignDevicesHook.weights_map",
        "hf_zo/offload.py",
        "says where the weights of a checkpoint are: or it cannot be opened in place",
        runs.opened_in_place,
    ),
    Seam("accelerate.utils.offload:PrefixedDataset.dataset", "hf_zo/offload.py", "see above", runs.opened_in_place),
    Seam("accelerate.utils:OffloadedWeightsLoader.index", "hf_zo/offload.py", "see above", runs.opened_in_place),
    Seam(
        "torch.nn:Module.hf_device_map",
        "hf_zo/offload.py",
        "deleted: or Trainer takes the model for a parallel one",
        runs.opened_in_place,
    ),
    *(
        Seam(
            f"accelerate.hooks:AlignDevicesHook.{name}",
            "zo_core/targets/dispatched.py",
            "or a model whose weights are elsewhere is trained without them",
            runs.dispatched,
        )
        for name in ("offload", "place_submodules", "weights_map")
    ),
    # peft, trl
    Seam(
        "peft.tuners.lora:LoraLayer.frozen_peft_weight_names",
        "hf_zo/low_rank.py",
        "set: or PEFT makes A trainable whenever it activates the adapter",
        runs.frozen_factors,
        reader="peft",
    ),
    Seam(
        "trl:SFTTrainer._metrics",
        "hf_zo/auto_lr.py",
        "put back after the range test: or its losses are in the first log",
        runs.supervised,
        reader="trl",
    ),
    # Lightning
    of_strategy("launcher", "sees what fit was called with: or a resumed run begins a new log"),
    of_strategy("root_device", "is the device that the Trainer has chosen"),
    Seam(
        f"{PL}.parallel_devices",
        PROCESSES,
        "set by the Trainer: or the strategy stays on the CPU",
        runs.two_devices,
        ours="lightning_zo.strategy:ZOStrategy",
        reader="lightning",
        anew=True,
    ),
    Seam(
        "lightning.pytorch.strategies:ParallelStrategy._configure_launcher",
        PROCESSES,
        "or no second process is started",
        runs.two_devices,
        ours="lightning_zo.strategy:ZOStrategy",
        reader="lightning",
    ),
    Seam(
        "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher",
        PROCESSES,
        "starts the other processes",
        runs.two_devices,
        ours="lightning_zo.processes:",
    ),
    of_strategy("_lightning_module", "emptied when a module is refused: or teardown fails", ours=None),
    Seam(
        "lightning.pytorch.loops.fit_loop:_FitLoop._skip_backward",
        STRATEGY,
        "or an epoch that only updates statistics moves the weights",
        runs.strategy,
    ),
    *(
        Seam(f"lightning.pytorch.trainer.call:{name}", STRATEGY, "or on_before_optimizer_step is lost", runs.strategy)
        for name in ("_call_callback_hooks", "_call_lightning_module_hook")
    ),
    Seam(
        "lightning.pytorch:LightningModule._compiler_ctx",
        STRATEGY,
        "or a compiled module computes with NaN: its parameters are swapped where compiled code cannot see it",
        runs.strategy,
    ),
    Seam(
        "lightning.pytorch:LightningModule._on_before_batch_transfer",
        "lightning_zo/auto_lr.py",
        "or the range test sees batches without the user's hook",
        runs.strategy_range_test,
    ),
    *(
        Seam(
            name,
            "lightning_zo/logs.py",
            "the numbers of the run are logged when those of the module are, under the same step",
            runs.strategy_logs,
        )
        for name in (
            "lightning.pytorch:Trainer._logger_connector",
            "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._batches_that_stepped",
        )
    ),
    # torch
    Seam(
        "torch.distributed.distributed_c10d:_get_default_store",
        "zo_core/ranks.py",
        "tells which process does not answer any more",
        runs.lost_process,
    ),
    *map(functorch, ("maybe_current_level", "_add_batch_dim", "is_batchedtensor", "maybe_get_level")),
    *map(functorch, ("get_unwrapped", "maybe_get_bdim")),
    *(
        Seam(
            "torch.overrides:_get_current_function_mode_stack",
            f"zo_core/{name.replace('.', '/')}.py",
            why,
            run,
            ours=f"zo_core.{name}",
        )
        for name, why, run in (
            (
                "updates.windows",
                "tells a probe from a forward of the user's own, which sees updates that wait",
                runs.windows,
            ),
            ("ambient", "function modes are active in the thread of each probe, too", runs.streamed),
            (
                "probing.waiting",
                "or a closure that waits leaves its function modes to others",
                runs.waiting,
            ),
            ("probing.view", "or a closure's own function mode is taken away in place of the probe's", runs.streamed),
        )
    ),
    *(
        Seam(
            f"torch.utils._python_dispatch:{name}",
            "zo_core/dispatch.py",
            "or FLOP counters and CUDA's sanitizer see nothing of the threads of probes and copies",
            runs.watched,
            ours="zo_core.dispatch",
        )
        for name in ("_get_current_dispatch_mode_stack", "_push_mode", "_pop_mode")
    ),
    *(
        Seam(
            "torch._C:_storage_Use_Count",
            f"zo_core/{name}.py",
            "or scratch memory is reused while a model still looks at it, or never",
            run,
        )
        for name, run in (("probing/scratch", runs.resident), ("streaming/streaming", runs.streamed))
    ),
    *(
        Seam(
            f"torch.optim:Optimizer.{name}",
            "zo_core/rules/torch_rule.py",
            "or a hook runs once per parameter instead of once per step",
            runs.torch_rule,
        )
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    ),
    Seam(
        "torch.optim.lr_scheduler:LRScheduler._last_lr",
        "zo_core/learning_rate/search.py",
        "scaled with the rates that were found: or a schedule goes on from the old ones",
        runs.range_test,
    ),
    Seam("torch.nn:Module._parameters", "zo_core/forward_state.py", "frozen weights that forwards move", runs.resident),
    Seam(
        "torch.nn:Module._parameters",
        "zo_core/updates/windows.py",
        "state dicts with the updates that wait",
        runs.windows,
    ),
    Seam("torch.nn:Module._buffers", "zo_core/forward_state.py", "buffers that a forward changes", runs.resident),
    Seam(
        "torch.nn:Module._forward_pre_hooks",
        "zo_core/updates/windows.py",
        "finds whose updates wait for a model",
        runs.windows,
    ),
    Seam(
        "torch.utils._python_dispatch:is_traceable_wrapper_subclass",
        "zo_core/targets/base.py",
        "finds the tensors inside of tensor subclasses",
        runs.resident,
        ours="zo_core.targets.base",
    ),
    Seam(
        "torch.utils._python_dispatch:is_traceable_wrapper_subclass",
        "zo_core/targets/memory.py",
        "finds the tensors inside of tensor subclasses",
        runs.resident,
        ours="zo_core.targets.memory",
    ),
    Seam(
        "torch.utils._pytree:tree_leaves",
        "hf_zo/estimate/trace.py",
        "the tensors among the results of an operation",
        runs.estimate,
        ours="hf_zo.estimate.trace",
    ),
    Seam(
        "torch.utils._pytree:tree_leaves",
        "zo_core/beside_streamed.py",
        "the tensors that a streamed layer returns",
        runs.beside_streamed,
        ours="zo_core.beside_streamed",
    ),
    # bitsandbytes, torchao
    Seam(
        "bitsandbytes.nn:Linear4bit.support_avx512bf16_for_cpu",
        "zo_core/targets/int4.py",
        "set to False: or a forward repacks codes, and rounds scales to bf16",
        runs.int4,
        reader="bitsandbytes",
    ),
    Seam(
        "bitsandbytes.nn.modules:fix_4bit_weight_quant_state_from_module",
        "zo_core/targets/int4.py",
        "gives a weight its quantisation state again",
        runs.int4,
    ),
    Seam(
        "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse",
        "zo_core/targets/int4.py",
        "puts codes in order that were repacked",
        runs.int4_repacked,
    ),
    *(
        Seam(
            f"bitsandbytes.functional:QuantState.{name}",
            "zo_core/targets/int4.py",
            "set: or scales are taken for quantised ones",
            runs.int4,
            reader="bitsandbytes",
        )
        for name in ("absmax", "nested")
    ),
    Seam(
        "torch.nn:Module._load_state_dict_pre_hooks",
        "zo_core/targets/int4.py",
        "or each engine puts another hook on a layer",
        runs.int4,
    ),
]

"""Opens a checkpoint as a streamed model, without holding all of it in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from zo_core import ConfigError, StateError
from zo_core.streaming import Block, DiskStore, Piece, Streaming, describe, find_blocks, own_folder, read_header

#: Arguments of ``from_pretrained`` that place the weights; `from_pretrained_offloaded` sets them itself.
OWN = ("device_map", "offload_folder", "offload_state_dict", "offload_buffers", "max_memory", "state_dict")

#: Arguments that locate a configuration on the Hub.
HUB = ("revision", "token", "cache_dir", "trust_remote_code", "subfolder", "local_files_only", "force_download")


def from_pretrained_offloaded(
    model_class: Any,
    name_or_path: str | os.PathLike[str],
    *,
    offload_dir: str | os.PathLike[str] | None = None,
    blocks: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> Any:
    """Opens a checkpoint with its repeated layers left on disk.

    The layers are read from the checkpoint's own safetensors files when their forward needs them.
    Layers that training changes go to files in ``offload_dir``; the checkpoint is never written. The
    model can be trained by `ZOTrainer` or `zo_core.ZeroOrder` without further settings, evaluated, given
    adapters by PEFT, and saved.

    Weights that ``from_pretrained`` must convert (another ``dtype`` than the checkpoint's, fused experts)
    are converted layer by layer and kept in ``offload_dir``.

    Args:
        model_class: ``AutoModelForCausalLM`` or any other class with ``from_pretrained``.
        name_or_path: a folder, or the name of a model on the Hub.
        offload_dir: folder for changed layers; None makes a temporary one that is deleted with the model.
        blocks: names of the streamed modules, or of containers of them; None finds them automatically.
        device: where the model computes.
        **kwargs: for ``from_pretrained``, for example ``dtype``.

    Returns:
        The model, in eval mode, as ``from_pretrained`` returns it.

    Raises:
        ConfigError: this function sets an argument itself, or the folder cannot be written to.
        ModelError: the model has no repeated layers.
        StateError: a file of the checkpoint is damaged, or does not have all weights.
    """
    clashes = [f"{key}= is set by from_pretrained_offloaded; leave it out" for key in OWN if key in kwargs]
    if clashes:
        raise ConfigError(clashes)
    place = torch.device(device)
    store = DiskStore(own_folder(offload_dir))
    skeleton = _skeleton(model_class, name_or_path, kwargs)
    names = list(find_blocks(skeleton, blocks))
    where = {name: "disk" if name in names else str(place) for name in _parts(skeleton, names)}
    quiet = logging.getLogger("accelerate.big_modeling")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns that parameters are on meta, which they are only temporarily
    try:
        model = model_class.from_pretrained(name_or_path, device_map=where, offload_folder=str(store.folder), **kwargs)
    except (FileNotFoundError, SafetensorError) as error:
        for path in sorted(Path(name_or_path).glob("*.safetensors")):
            read_header(path)  # names the damaged one
        raise StateError(f"{name_or_path} cannot be opened: {error}") from error
    finally:
        quiet.setLevel(level)
    index = _take_over(model)
    headers = {file: read_header(file) for file in {entry["safetensors_file"] for entry in index.values()}}
    streamed = [_adopt(name, model.get_submodule(name), index, headers, store) for name in names]
    describe(model, Streaming(streamed, store, place))
    return model


def _skeleton(model_class: Any, name_or_path: Any, kwargs: dict[str, Any]) -> nn.Module:
    """The model without values."""
    from transformers import AutoConfig

    hub = {key: kwargs[key] for key in HUB if key in kwargs}
    config = kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **hub)
    with torch.device("meta"):
        model: nn.Module = (
            model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
        )
    return model


def _parts(model: nn.Module, blocks: Collection[str], prefix: str = "") -> list[str]:
    """Returns names of modules, parameters and buffers that together cover the model and include ``blocks``."""
    parts = [name for name, _ in model.named_parameters(recurse=False)]
    parts += [name for name, _ in model.named_buffers(recurse=False)]
    for name, child in model.named_children():
        if any(block.startswith(f"{prefix}{name}.") for block in blocks):
            parts += [f"{name}.{part}" for part in _parts(child, blocks, f"{prefix}{name}.")]
        else:
            parts.append(name)
    return parts


def _take_over(model: nn.Module) -> dict[str, dict[str, str]]:
    """Removes accelerate's streaming hooks from the model, and returns the location of each weight."""
    from accelerate.hooks import remove_hook_from_module

    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    maps: list[Any] = [held for hook in hooks if (held := getattr(hook, "weights_map", None)) is not None]
    index: dict[str, dict[str, str]] = maps[0].dataset.index
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # the class's own, which accelerate leaves on the object
    del model.hf_device_map  # otherwise Trainer treats the model as a parallel one
    return index


def _adopt(
    name: str,
    module: nn.Module,
    index: dict[str, dict[str, str]],
    headers: dict[str, dict[str, Piece]],
    store: DiskStore,
) -> Block:
    """Makes a block that reads its values from the files in ``index``; new parameters replace those on ``meta``."""
    holders: dict[str, list[Tensor]] = {}
    pieces: dict[str, Piece] = {}
    for local, parameter in module.named_parameters():
        entry = index.get(f"{name}.{local}")
        if entry is None:
            raise StateError(f"the checkpoint has no weight {name}.{local}; train it in memory, without offloading")
        piece = headers[entry["safetensors_file"]].get(entry["weight_name"])
        if piece is None:
            raise StateError(f"{entry['weight_name']} is missing in {entry['safetensors_file']}; download it again")
        owner, _, leaf = local.rpartition(".")
        # Only shape and dtype matter: streaming the block replaces the values.
        nothing = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
        held = nn.Parameter(nothing, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), leaf, held)
        holders[local], pieces[local] = [held], piece
    store.adopt(name, pieces)
    if any(piece.dtype != holders[local][0].dtype for local, piece in pieces.items()):
        values = store.whole(name)
        store.put(name, {local: value.to(holders[local][0].dtype) for local, value in values.items()})
    return Block(name, module, holders)

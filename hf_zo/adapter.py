"""Sharing a fine-tune as its seed log, from a trainer and from the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from zo_core import SeedLog, StateError
from zo_core.seedlog import ADAPTER_FILES, fingerprint, load_adapter, save_adapter

if TYPE_CHECKING:
    from .mixin import ZOTrainerMixin

Model = TypeVar("Model", bound=nn.Module)


def save_zo_adapter(source: ZOTrainerMixin | SeedLog | str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Writes a folder from which `load_zo_adapter` reproduces the fine-tuned weights.

    Args:
        source: a trainer after `train()`, or a seed log or its path. With a trainer the folder also has the
            fingerprint of the trained weights, which loading then checks. If the trainer has loaded its
            best checkpoint, later steps are left out.
        folder: created if it does not exist.

    Returns:
        The folder, with ``seedlog.zo``, ``zo_adapter.json`` and a model card.

    Raises:
        StateError: there is no log, or the log cannot be replayed.
    """
    log, until, trained, name = _source(source)
    return save_adapter(log, folder, until=until, trained=trained, base_model=name, loading=_loading(log, name))


def _loading(log: SeedLog, name: str) -> list[str]:
    """The lines of a model card that show how to load the result."""
    dtype = min(dtype for _, dtype, _ in log.header["base"]["slots"].values())
    base = name if name and not os.path.exists(name) else "the base model"
    return [
        "from transformers import AutoModelForCausalLM",
        "from hf_zo import load_zo_adapter",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}")',
        'load_zo_adapter(model, "this repository, or a folder with its files")',
    ]


def _source(source: Any) -> tuple[SeedLog, int, str | None, str]:
    """Returns the log, the step to stop before, the trained weights' fingerprint, and the base model's name."""
    if isinstance(source, (SeedLog, str, os.PathLike)):
        log = source if isinstance(source, SeedLog) else SeedLog.read(source)
        return log, log.next_step, None, ""
    journal, engine = getattr(source, "_zo_journal", None), getattr(source, "zo", None)
    if journal is None or engine is None:
        raise StateError(
            "this trainer has no seed log to share; call train() first, with zo_log=True (the default), or pass the log"
        )
    log = SeedLog.read(journal.path)
    state = source.state
    best = source.args.load_best_model_at_end and state.best_model_checkpoint is not None
    until = state.best_global_step if best else state.global_step
    name = str(getattr(getattr(source.model, "config", None), "name_or_path", "") or "")
    return log, until, fingerprint(engine)["digest"], name


def load_zo_adapter(
    model: Model,
    folder_or_hub_id: str | os.PathLike[str],
    *,
    until: int | None = None,
    revision: str | None = None,
) -> Model:
    """Gives a base model the weights of a shared fine-tune, bit for bit.

    Args:
        model: the base model, in the dtype of the run and untrained; changed in place.
        folder_or_hub_id: a folder that `save_zo_adapter` wrote, or its repository on the Hugging Face Hub.
        until: an earlier step of the run; None loads the weights that were shared.
        revision: branch, tag or commit on the Hub.

    Returns:
        ``model``.

    Raises:
        StateError: the base model is another one, or the folder is damaged. The model is unchanged, unless the
            last check, of the result, fails: then its weights are not those that were shared.
    """
    folder = Path(folder_or_hub_id)
    if not folder.is_dir():
        folder = Path(_download(str(folder_or_hub_id), revision))
    return load_adapter(model, folder, until=until)


def _download(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, revision=revision, allow_patterns=ADAPTER_FILES)

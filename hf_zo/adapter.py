"""Sharing a fine-tune as its seed log: a folder of a few hundred kilobytes, whatever the size of the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from zo_core import SeedLog, StateError, replay
from zo_core.seedlog import FILE_NAME, engine_for, fingerprint

if TYPE_CHECKING:
    from .mixin import ZOTrainerMixin

CONFIG_NAME = "zo_adapter.json"
FILES = [CONFIG_NAME, FILE_NAME, "README.md"]

Model = TypeVar("Model", bound=nn.Module)


def save_zo_adapter(source: ZOTrainerMixin | SeedLog | str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Writes a folder from which `load_zo_adapter` makes the fine-tuned weights again.

    Args:
        source: a trainer after `train()`, or a seed log. With a trainer the folder also has the
            fingerprint of the trained weights, which loading then checks; and if the trainer went back to
            its best checkpoint, the steps after that are left out.
        folder: made if it is missing.

    Returns:
        The folder, with ``seedlog.zo``, ``zo_adapter.json`` and a model card.

    Raises:
        StateError: there is no log, or it cannot be replayed.
    """
    log, until, trained, name = _source(source)
    if log.corrupt is not None or log.header["limits"]:
        reason = log.corrupt or "; ".join(log.header["limits"])
        raise StateError(f"the seed log {log.path} cannot be shared, nobody could replay it: {reason}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": 1, "base_model": name, "steps": until, "trained_weights": trained}
    data = log.upto(until)
    (folder / FILE_NAME).write_bytes(data)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(log, config, len(data)), encoding="utf-8")
    return folder


def _source(source: Any) -> tuple[SeedLog, int, str | None, str]:
    """The log, how many steps of it count, the fingerprint of the trained weights, and the base model's name."""
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
    name = str(getattr(getattr(source.model, "config", None), "_name_or_path", "") or "")
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
        folder_or_hub_id: a folder that `save_zo_adapter` made, or its repository on the Hugging Face Hub.
        until: an earlier step of the run; None takes the weights that were shared.
        revision: branch, tag or commit on the Hub.

    Returns:
        ``model``.

    Raises:
        StateError: another base model, or a damaged folder. Before the last check, of the result, nothing
            is changed; if that fails, the weights are not those that were shared.
    """
    folder = Path(folder_or_hub_id)
    if not folder.is_dir():
        folder = Path(_download(str(folder_or_hub_id), revision))
    config = _config(folder)
    log = SeedLog.read(folder / FILE_NAME)
    if log.corrupt is None and log.next_step != config["steps"]:
        raise StateError(
            f"{folder / FILE_NAME} is cut off: it ends at step {log.next_step}, and {CONFIG_NAME} says it was "
            f"shared with {config['steps']}; get it again"
        )
    engine = engine_for(model, log)
    replay(engine, log, until)
    if until is None and config["trained_weights"] is not None:
        found = fingerprint(engine)["digest"]
        if found != config["trained_weights"]:
            raise StateError(
                f"the replayed weights are not those that were shared in {folder}: fingerprint {found} here, "
                f"{config['trained_weights']} in {CONFIG_NAME}; the model has been changed since its training, or this "
                "machine computes differently. Load the base model again before anything else"
            )
    return model


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != 1:
            raise StateError(f"{path} has format {config['format']}; this version of hf_zo reads format 1")
        return {key: config[key] for key in ("base_model", "steps", "trained_weights")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{folder} is no folder of save_zo_adapter: {path.name} cannot be read ({error})") from error


def _download(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, revision=revision, allow_patterns=FILES)


def card(log: SeedLog, config: dict[str, Any], size: int) -> str:
    """The model card."""
    header, name = log.header, config["base_model"]
    on_hub = bool(name) and not os.path.exists(name)
    front = ["---", "library_name: zo-trainer", "tags:", "- zeroth-order", "- seed-log"]
    front += [f"base_model: {name}"] if on_hub else []
    slots = header["base"]["slots"]
    dtypes = ", ".join(sorted({dtype for _, dtype, _ in slots.values()}))
    losses = [entry.loss for entry in log.steps if entry.step < config["steps"]]
    ends = f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" if losses else "no steps"
    base = f'"{name}"' if on_hub else '"the base model"'
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# A fine-tune of {name or 'a model'} in {size:,} bytes",
            "",
            f"`{FILE_NAME}` is the seed log of a zeroth-order fine-tune: {config['steps']:,} steps over "
            f"{len(slots)} tensors. Replaying it on the base model gives the trained weights bit for bit.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "from hf_zo import load_zo_adapter",
            "",
            f'model = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtypes.split(", ")[0]}")',
            'load_zo_adapter(model, "this repository, or a folder with its files")',
            "```",
            "",
            "| | |",
            "| --- | --- |",
            f"| base model's fingerprint | `{header['base']['digest']}` |",
            f"| dtype | {dtypes} |",
            f"| estimator, directions | {header['estimator']}, {header['num_probes']} |",
            f"| noise, rule, target | {header['noise']}, {header['rule']}, {header['target']} |",
            f"| loss on the training batches | {ends} |",
            f"| made with | zo-trainer {header['zo']}, torch {header['torch']} |",
            "",
        ]
    )

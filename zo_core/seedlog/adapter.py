"""Sharing a fine-tune as its seed log: a folder of a few hundred kilobytes for a model of any size."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..errors import StateError
from ..files import write_whole
from .checked import unpacked
from .fingerprint import fingerprint
from .log import FILE_NAME, SeedLog
from .replay import engine_for, replay

CONFIG_NAME = "zo_adapter.json"
ADAPTER_FILES = [CONFIG_NAME, FILE_NAME, "README.md"]

#: Lines of the model card that load the result, if it is not known how the base model is made.
LOADING = (
    "from zo_core.seedlog import load_adapter",
    "",
    'load_adapter(model, "a folder with the files of this repository")    # model: the base model',
)

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(
    source: SeedLog | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    until: int | None = None,
    trained: str | None = None,
    base_model: str = "",
    loading: Sequence[str] = LOADING,
) -> Path:
    """Writes a folder from which `load_adapter` reproduces the fine-tuned weights.

    Args:
        source: a seed log, or its path.
        folder: created if it does not exist.
        until: use only the steps before this one; None uses all.
        trained: digest of the fingerprint of the trained weights, which loading then checks.
        base_model: name of the base model, for the model card.
        loading: lines of Python that load the result, for the model card.

    Returns:
        The folder, with ``seedlog.zo``, ``zo_adapter.json`` and a model card.

    Raises:
        StateError: the log cannot be read or cannot be replayed.
    """
    log = source if isinstance(source, SeedLog) else SeedLog.read(source)
    if log.corrupt is not None or log.header["limits"]:
        reason = log.corrupt or "; ".join(log.header["limits"])
        raise StateError(f"the seed log {log.path} cannot be shared, because it cannot be replayed: {reason}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "format": 1,
        "base_model": base_model,
        "steps": log.next_step if until is None else until,
        "trained_weights": trained,
    }
    data = log.upto(config["steps"])
    write_whole(folder / FILE_NAME, data)
    write_whole(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
    write_whole(folder / "README.md", card(log, config, len(data), loading).encode())
    return folder


def load_adapter(model: Model, folder: str | os.PathLike[str], *, until: int | None = None) -> Model:
    """Gives a base model the weights of a shared fine-tune, bit for bit.

    Args:
        model: the base model, in the dtype of the run and untrained; changed in place.
        folder: a folder that `save_adapter` wrote.
        until: an earlier step of the run; None loads the weights that were shared.

    Returns:
        ``model``.

    Raises:
        StateError: the base model is another one, or the folder is damaged. The model is unchanged, unless the
            last check, of the result, fails: then its weights are not those that were shared.
    """
    folder = Path(folder)
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
        if found != config["trained_weights"] and engine.updaters.settle():
            # Nothing is pending in weights that were saved and loaded again, or whose engine was closed.
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
        config = unpacked(path.read_bytes(), deflated=False)
        if config["format"] != 1:
            raise StateError(f"{path} has format {config['format']!r}; this version of zo_core reads format 1")
        return {key: config[key] for key in ("base_model", "steps", "trained_weights")}
    except (OSError, ValueError, KeyError) as error:
        raise StateError(f"{folder} is no folder of a shared seed log: {path.name} cannot be read ({error})") from error


def card(log: SeedLog, config: dict[str, Any], size: int, loading: Sequence[str]) -> str:
    """Returns the text of the model card; ``size`` is that of the log in bytes."""
    header, name = log.header, config["base_model"]
    on_hub = bool(name) and not os.path.exists(name)
    front = ["---", "library_name: zo-trainer", "tags:", "- zeroth-order", "- seed-log"]
    front += [f"base_model: {name}"] if on_hub else []
    slots = header["base"]["slots"]
    dtypes = ", ".join(sorted({dtype for _, dtype, _ in slots.values()}))
    losses = [entry.loss for entry in log.steps if entry.step < config["steps"]]
    ends = f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" if losses else "no steps"
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
            *loading,
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

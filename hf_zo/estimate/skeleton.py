"""Makes a model without values from its configuration. This is the only file of the package that uses transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zo_core import ConfigError


def skeleton(name_or_path: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Makes the model that a configuration describes, on the meta device and in eval mode.

    Args:
        name_or_path: a folder with a ``config.json``, or the name of a model on the Hub.
        dtype: dtype of the weights.

    Returns:
        A model of the class that the configuration names, or if it names none, one from
        ``AutoModelForCausalLM``; tied weights are one parameter.

    Raises:
        ConfigError: there is no such configuration or class.
    """
    import transformers  # here, because it takes a second, and --help does not need it

    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            [f"{name_or_path!r} is neither a folder with a config.json nor a model that can be reached: {reason}"]
        ) from error
    config.use_cache = False  # as Trainer does; otherwise keys and values of all layers would be kept
    named: list[str] = getattr(config, "architectures", None) or []
    cls: Any = next((getattr(transformers, c) for c in named if hasattr(transformers, c)), None)
    with torch.device("meta"):
        try:
            auto = transformers.AutoModelForCausalLM
            model: nn.Module = (
                auto.from_config(config, dtype=dtype) if cls is None else cls._from_config(config, dtype=dtype)
            )
        except ValueError as error:
            raise ConfigError(
                [f'{name_or_path!r}: {str(error).strip().splitlines()[0]}; add "architectures" to its config.json']
            ) from error
    return model.eval()

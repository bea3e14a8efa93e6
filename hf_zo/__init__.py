"""Forward-only fine-tuning for Hugging Face: replace ``Trainer`` by ``ZOTrainer``.

The names are imported at their first use: `Trainer` takes seconds to import, and ``zo-estimate`` does not need it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"hf_zo needs transformers and accelerate (missing: {', '.join(_missing)}); install them with: "
        "pip install 'zo-trainer[hf]'"
    )

if TYPE_CHECKING:
    from zo_core import ZOConfig

    from .activations import activation_adapter
    from .adapter import load_zo_adapter, save_zo_adapter
    from .arguments import ZOArguments, ZOTrainingArguments
    from .coreset import Coreset, CoresetTrainerMixin
    from .low_rank import low_rank_adapter
    from .mixin import ZOTrainerMixin
    from .offload import from_pretrained_offloaded
    from .reward_config import ZORewardConfig
    from .reward_trainer import ZORewardTrainer
    from .trainer import ZOTrainer

__all__ = [
    "Coreset",
    "CoresetTrainerMixin",
    "ZOArguments",
    "ZOConfig",
    "ZORewardConfig",
    "ZORewardTrainer",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
    "activation_adapter",
    "from_pretrained_offloaded",
    "load_zo_adapter",
    "low_rank_adapter",
    "save_zo_adapter",
]

#: The module of each name.
_MODULES = {
    "Coreset": "hf_zo.coreset",
    "CoresetTrainerMixin": "hf_zo.coreset",
    "ZOArguments": "hf_zo.arguments",
    "ZOConfig": "zo_core",
    "ZORewardConfig": "hf_zo.reward_config",
    "ZORewardTrainer": "hf_zo.reward_trainer",
    "ZOTrainer": "hf_zo.trainer",
    "ZOTrainerMixin": "hf_zo.mixin",
    "ZOTrainingArguments": "hf_zo.arguments",
    "activation_adapter": "hf_zo.activations",
    "from_pretrained_offloaded": "hf_zo.offload",
    "load_zo_adapter": "hf_zo.adapter",
    "low_rank_adapter": "hf_zo.low_rank",
    "save_zo_adapter": "hf_zo.adapter",
}


if not TYPE_CHECKING:  # otherwise type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Forward-only fine-tuning for Hugging Face: swap ``Trainer`` for ``ZOTrainer``."""

try:
    import accelerate as _accelerate  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"hf_zo needs transformers and accelerate ({error}); install them with: pip install 'zo-trainer[hf]'"
    ) from error

from zo_core import ZOConfig

from .adapter import load_zo_adapter, save_zo_adapter
from .arguments import ZOArguments, ZOTrainingArguments
from .low_rank import low_rank_adapter
from .mixin import ZOTrainerMixin
from .offload import from_pretrained_offloaded
from .trainer import ZOTrainer

__all__ = [
    "ZOArguments",
    "ZOConfig",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
    "from_pretrained_offloaded",
    "load_zo_adapter",
    "low_rank_adapter",
    "save_zo_adapter",
]

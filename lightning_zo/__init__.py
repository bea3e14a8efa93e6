"""Forward-only fine-tuning for PyTorch Lightning: ``Trainer(strategy="zo")`` or ``strategy="zo_offload"``."""

try:
    import lightning.pytorch as _lightning  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"lightning_zo needs lightning ({error}); install it with: pip install 'zo-trainer[lightning]'"
    ) from error

from zo_core import ZOConfig, ZOOptimizer

from .strategy import ZOStrategy, register

register()

__all__ = ["ZOConfig", "ZOOptimizer", "ZOStrategy"]

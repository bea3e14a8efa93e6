"""Law: the table of what works has every trainer, loss and callback that its libraries make public."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from lightning.pytorch import callbacks
from lightning_helpers import QUIET, fitted

from lightning_zo import ZOStrategy
from zo_core import ConfigError, ZOConfig

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
pytestmark = QUIET
#: Trainers that ask a server for text, and names that are there to be inherited.
SERVERS = {"AsyncGRPOTrainer", "AsyncDistillationTrainer", "ServerDistillationTrainer"}
BASES = {"Callback", "Checkpoint", "ProgressBar", "BaseFinetuning", "BasePredictionWriter"}


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def classes(path: Path, ending: str) -> set[str]:
    """The public classes of a file whose names end so."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {c.name for c in body if isinstance(c, ast.ClassDef) and c.name.endswith(ending) and c.name[0] != "_"}


def test_every_trainer_of_trl() -> None:
    files = [path for path in folder("trl").rglob("*_trainer.py") if path.name != "base_trainer.py"]
    trainers = set().union(*(classes(path, "Trainer") for path in files))
    assert len(trainers) > 15
    assert not {name for name in trainers - SERVERS if f"`{name}`" not in PAGE}


@pytest.mark.parametrize("kind", ["sentence_transformer", "sparse_encoder", "cross_encoder", "multi_vector_encoder"])
def test_every_loss_of_sentence_transformers(kind: str) -> None:
    files = (folder("sentence_transformers") / kind / "losses").glob("*.py")
    losses = set().union(*(classes(path, "Loss") for path in files))
    assert losses
    inside = {"CSRReconstructionLoss", "FlopsLoss"}  # parts of others
    assert not {name for name in losses - inside if not re.search(rf"\b{name}\b", PAGE)}


def test_every_callback_of_lightning() -> None:
    assert not {name for name in set(callbacks.__all__) - BASES if f"`{name}`" not in PAGE}


def test_nothing_is_wrong_in_it() -> None:
    results = {"exact", "rounding", "refused"}
    rows = [[cell.strip() for cell in line.split(" | ")] for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert all(set(row[2:5]) <= results for row in rows)


@pytest.mark.parametrize("config", [ZOConfig(noise="low_rank"), ZOConfig(offload="cpu")], ids=["low_rank", "offload"])
def test_pruning_is_refused_where_weights_in_memory_are_behind(config: ZOConfig, tmp_path: Path) -> None:
    pruning = callbacks.ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(ConfigError, match="ModelPruning compares weights"):
        fitted(tmp_path, strategy=ZOStrategy(config), callbacks=[pruning])

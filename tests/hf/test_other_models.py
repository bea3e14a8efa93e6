"""Law: models of images, speech, and pairs of both train, replay from their log, and stream, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_helpers import arguments, differing, logged, weights
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses, modules
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from trl_helpers import sentence, small_tokenizer

from hf_zo import ZOTrainer, ZOTrainerMixin, ZOTrainingArguments
from zo_core import ZeroOrder, ZOConfig, replay

VOCAB, WIDTH, LAYERS, ROWS = 48, 32, 2, 8


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def vit() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))


def images() -> list[dict[str, Any]]:
    return [
        {"pixel_values": image, "labels": i % 3}
        for i, image in enumerate(torch.randn(ROWS, 3, 16, 16, generator=draw()))
    ]


def whisper() -> nn.Module:
    layers = {"encoder_layers": LAYERS, "decoder_layers": LAYERS}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    frames = {"d_model": WIDTH, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=VOCAB, **layers, **heads, **frames, **tokens)
    return WhisperForConditionalGeneration(config)


def speech() -> list[dict[str, Any]]:
    sound = torch.randn(ROWS, 8, 32, generator=draw())
    words = torch.randint(3, VOCAB, (ROWS, 6), generator=draw())
    return [{"input_features": each, "labels": row} for each, row in zip(sound, words, strict=True)]


def clip() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"vocab_size": VOCAB, "max_position_embeddings": 16, "eos_token_id": 2, **sizes}
    config = CLIPConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **sizes}, projection_dim=16)
    return CLIPModel(config)


def captions() -> list[dict[str, Any]]:
    words = torch.randint(3, VOCAB, (ROWS, 6), generator=draw())
    return [{"pixel_values": row["pixel_values"], "input_ids": word} for row, word in zip(images(), words, strict=True)]


class ZOContrastive(ZOTrainer):
    """`CLIPModel` computes its loss only if it is asked to."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs, return_loss=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@dataclass(frozen=True)
class Kind:
    """A kind of model, its rows, and the trainer that takes it."""

    model: Callable[[], nn.Module]
    rows: Callable[[], list[dict[str, Any]]]
    cls: type[ZOTrainer] = ZOTrainer


KINDS = {"vit": Kind(vit, images), "whisper": Kind(whisper, speech), "clip": Kind(clip, captions, ZOContrastive)}


def made(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    return kind.model()


@pytest.mark.parametrize("name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("whisper", "clip"))])
def test_it_trains_replays_and_streams(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    runs = []
    for tier in (None, "cpu"):
        settings = {"zo_offload": tier, "zo_num_probes": 2, "remove_unused_columns": False, "num_train_epochs": 2}
        args = arguments(tmp_path / str(tier), ZOTrainingArguments, **settings)
        runs.append(kind.cls(model=made(kind), args=args, train_dataset=kind.rows()))
        runs[-1].train()
    resident, streamed = runs
    assert streamed.zo.streaming.blocks
    before, after = weights(made(kind)), weights(resident.model)
    assert differing(after, weights(streamed.model)) == []
    assert logged(resident, "loss") == logged(streamed, "loss")
    assert logged(resident, "projected_grad") == logged(streamed, "projected_grad")
    assert set(differing(before, after)) >= {key for key, value in made(kind).named_parameters() if value.requires_grad}
    again = made(kind)
    assert replay(again, tmp_path / "None" / "out" / "seedlog.zo") == 4
    assert differing(after, weights(again)) == []


@pytest.mark.parametrize("name", list(KINDS))
def test_its_gradient_is_that_of_autograd(name: str) -> None:
    kind = KINDS[name]
    model = made(kind).double().eval()
    rows = [{k: torch.as_tensor(v) for k, v in row.items()} for row in kind.rows()]
    inputs: dict[str, Tensor] = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    extra = {"return_loss": True} if name == "clip" else {}
    check = ZeroOrder(model, lr=1e-3).check(lambda: model(**inputs, **extra).loss)
    assert check.agrees


class ZOSentenceTrainer(ZOTrainerMixin, SentenceTransformerTrainer): ...


def encoder(folder: Path) -> SentenceTransformer:
    word = modules.Transformer(str(folder))
    return SentenceTransformer(modules=[word, modules.Pooling(WIDTH)], device="cpu")


def test_sentence_embeddings_train_replay_and_stream(tmp_path: Path) -> None:
    """Their losses are compared with autograd by `benchmarks.compatibility`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 48}
    folder = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    pairs = [(sentence(index, 4), sentence(index + 1, 5)) for index in range(ROWS)]
    data = Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})
    runs = []
    for tier in (None, "cpu"):
        args = arguments(tmp_path / str(tier), SentenceTransformerTrainingArguments)
        model = encoder(folder)
        loss = losses.MultipleNegativesRankingLoss(model)
        config = ZOConfig(offload=tier)
        runs.append(ZOSentenceTrainer(model=model, args=args, train_dataset=data, loss=loss, zo_config=config))
        runs[-1].train()
    resident, streamed = (weights(run.model) for run in runs)
    assert differing(resident, streamed) == []
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    again = encoder(folder)
    assert differing(weights(again), resident)
    assert replay(again, tmp_path / "None" / "out" / "seedlog.zo") == 2
    assert differing(resident, weights(again)) == []

"""The trainers of sentence-transformers with their losses."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses as cross
from sentence_transformers.multi_vector_encoder import losses as multi
from sentence_transformers.sentence_transformer import losses, modules
from sentence_transformers.sparse_encoder import losses as sparse
from sentence_transformers.sparse_encoder import modules as sparse_modules
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from .hugging_face import Case
from .models import VOCAB, arguments, bert_config, rows, text, tokenizer

WIDTH = 16


@cache
def _saved(cls: type[Any], seed: int, **changes: Any) -> tempfile.TemporaryDirectory[str]:
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="zo-compatibility-")
    torch.manual_seed(seed)
    cls(bert_config(**changes)).save_pretrained(folder.name)
    tokenizer().save_pretrained(folder.name)
    return folder


def sentences(seed: int = 0) -> SentenceTransformer:
    """Means of token vectors."""
    word = modules.Transformer(_saved(BertModel, seed).name)
    return SentenceTransformer(modules=[word, modules.Pooling(WIDTH)], device="cpu")


def splade() -> SparseEncoder:
    """Weights of the words of a vocabulary."""
    word = sparse_modules.MLMTransformer(_saved(BertForMaskedLM, 0).name)
    return SparseEncoder(modules=[word, sparse_modules.SpladePooling()], device="cpu")


def sparse_codes() -> SparseEncoder:
    """A sparse autoencoder on sentence vectors."""
    torch.manual_seed(0)
    word = modules.Transformer(_saved(BertModel, 0).name)
    code = sparse_modules.SparseAutoEncoder(WIDTH, hidden_dim=32, k=4, k_aux=8)
    return SparseEncoder(modules=[word, modules.Pooling(WIDTH), code], device="cpu")


def pairs(labels: int = 1) -> CrossEncoder:
    """Scores of pairs of texts."""
    return CrossEncoder(_saved(BertForSequenceClassification, 0, num_labels=labels).name, device="cpu")


def tokens() -> MultiVectorEncoder:
    """A vector for each token."""
    return MultiVectorEncoder(_saved(BertModel, 0).name, device="cpu")


PAIRS = {"anchor": lambda i: text(i, 4), "positive": lambda i: text(i + 1, 5)}
ANCHORS = {"anchor": PAIRS["anchor"]}
TRIPLES = {**PAIRS, "negative": lambda i: text(i + 5, 6)}
SCORED = {**PAIRS, "score": lambda i: (i % 5) / 4}
BINARY = {**PAIRS, "label": lambda i: i % 2}
CLASSES = {**PAIRS, "label": lambda i: i % 3}
SINGLE = {"sentence": lambda i: text(i, 5), "label": lambda i: i % 2}
TAUGHT = {"sentence": lambda i: text(i, 5), "label": lambda i: [((i + j) % 7) / 7 for j in range(WIDTH)]}
TAUGHT_WORDS = {"sentence": TAUGHT["sentence"], "label": lambda i: [((i + j) % 7) / 7 for j in range(VOCAB)]}
MARGINS = {**TRIPLES, "score": lambda i: (i % 5) / 4}
LISTS = {
    "query": lambda i: text(i, 4),
    "docs": lambda i: [text(i + j, 5) for j in range(3)],
    "labels": lambda i: [(i + j) % 3 for j in range(3)],
}
TEACHER_SCORES = {**TRIPLES, "label": lambda i: [0.9, (i % 5) / 8]}


def made(trainer: type[Any], config: type[Any], model: Callable[[], Any]) -> Any:
    """A function that makes a trainer, given a loss by a function of the model, and the columns that it needs."""

    def case(setting: str, data: dict[str, Any], loss: Callable[[Any], Any], remark: str = "", **own: Any) -> Case:
        def make(wrap: Callable[[type], type], **zo: Any) -> Any:
            encoder = own.get("model", model)()
            torch.manual_seed(5)
            args = arguments(config, **own.get("args", {}))
            train: Dataset = rows(**data)
            return wrap(trainer)(model=encoder, args=args, train_dataset=train, loss=loss(encoder), **zo)

        return Case(trainer.__name__, setting, make, remark)

    return case


dense = made(SentenceTransformerTrainer, SentenceTransformerTrainingArguments, sentences)
lexical = made(SparseEncoderTrainer, SparseEncoderTrainingArguments, splade)
crossed = made(CrossEncoderTrainer, CrossEncoderTrainingArguments, pairs)
late = made(MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments, tokens)


def ranking(model: Any) -> Any:
    return losses.MultipleNegativesRankingLoss(model)


def denoising(model: Any) -> Any:
    return losses.DenoisingAutoEncoderLoss(model, _saved(BertModel, 0).name, tie_encoder_decoder=True)


def layers(model: Any) -> Any:
    return losses.AdaptiveLayerLoss(model, ranking(model), kl_temperature=0)


def sampled(cls: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda model: cls(model, num_negatives=2)


def words(loss: Callable[[Any], Any], outer: Callable[..., Any] = sparse.SpladeLoss) -> Callable[[Any], Any]:
    """A loss with regularizers around it, as sparse encoders need."""
    return lambda model: outer(model, loss(model), 3e-3, 5e-3)


def hard(model: Any) -> Any:
    return losses.MultipleNegativesRankingLoss(model, hardness_mode="in_batch_negatives", hardness_strength=9.0)


CHOICE = "Which pairs are hard enough to count changes in jumps, which have no gradient."
KINKS = "Words with a weight near 0 are at the kink of relu, where the value's slope is not the gradient."
ORDER = "The order of the documents changes the value in jumps, which a warning says."
CASES = [
    dense("MultipleNegativesRankingLoss", PAIRS, ranking),
    dense("MultipleNegativesRankingLoss(hardness_mode=...)", PAIRS, hard),
    dense("CachedMultipleNegativesRankingLoss", PAIRS, losses.CachedMultipleNegativesRankingLoss),
    dense("MultipleNegativesSymmetricRankingLoss", PAIRS, losses.MultipleNegativesSymmetricRankingLoss),
    dense("CachedMultipleNegativesSymmetricRankingLoss", PAIRS, losses.CachedMultipleNegativesSymmetricRankingLoss),
    dense("DenoisingAutoEncoderLoss", PAIRS, denoising),
    dense("GISTEmbedLoss", PAIRS, lambda m: losses.GISTEmbedLoss(m, sentences(1))),
    dense("CachedGISTEmbedLoss", PAIRS, lambda m: losses.CachedGISTEmbedLoss(m, sentences(1))),
    dense("MatryoshkaLoss", PAIRS, lambda m: losses.MatryoshkaLoss(m, ranking(m), [16, 8])),
    dense("AdaptiveLayerLoss", PAIRS, lambda m: losses.AdaptiveLayerLoss(m, ranking(m))),
    dense(
        "AdaptiveLayerLoss(kl_temperature=0)",
        PAIRS,
        lambda m: losses.AdaptiveLayerLoss(m, ranking(m), kl_temperature=0),
    ),
    dense("Matryoshka2dLoss", PAIRS, lambda m: losses.Matryoshka2dLoss(m, ranking(m), [16, 8])),
    dense("MegaBatchMarginLoss", PAIRS, losses.MegaBatchMarginLoss),
    dense("ContrastiveLoss", BINARY, losses.ContrastiveLoss),
    dense("OnlineContrastiveLoss", BINARY, losses.OnlineContrastiveLoss, CHOICE),
    dense("CosineSimilarityLoss", SCORED, losses.CosineSimilarityLoss),
    dense("CoSENTLoss", SCORED, losses.CoSENTLoss),
    dense("AnglELoss", SCORED, losses.AnglELoss),
    dense("TripletLoss", TRIPLES, losses.TripletLoss),
    dense("BatchAllTripletLoss", SINGLE, losses.BatchAllTripletLoss),
    dense("BatchHardTripletLoss", SINGLE, losses.BatchHardTripletLoss),
    dense("BatchHardSoftMarginTripletLoss", SINGLE, losses.BatchHardSoftMarginTripletLoss),
    dense("BatchSemiHardTripletLoss", SINGLE, losses.BatchSemiHardTripletLoss, CHOICE),
    dense("MSELoss", TAUGHT, losses.MSELoss),
    dense("EmbedDistillLoss", TAUGHT, losses.EmbedDistillLoss),
    dense("MarginMSELoss", MARGINS, losses.MarginMSELoss),
    dense("DistillKLDivLoss", TEACHER_SCORES, losses.DistillKLDivLoss),
    dense("GlobalOrthogonalRegularizationLoss", PAIRS, losses.GlobalOrthogonalRegularizationLoss),
    dense("SoftmaxLoss", CLASSES, lambda m: losses.SoftmaxLoss(m, WIDTH, 3)),
    dense("ContrastiveTensionLoss", PAIRS, losses.ContrastiveTensionLoss),
    dense(
        "ContrastiveTensionLossInBatchNegatives",
        {"anchor": PAIRS["anchor"]},
        losses.ContrastiveTensionLossInBatchNegatives,
    ),
    lexical(
        "SpladeLoss(SparseMultipleNegativesRankingLoss)", PAIRS, words(sparse.SparseMultipleNegativesRankingLoss), KINKS
    ),
    lexical(
        "CachedSpladeLoss",
        PAIRS,
        words(sparse.SparseMultipleNegativesRankingLoss, sparse.CachedSpladeLoss),
        KINKS,
    ),
    lexical(
        "SpladeLoss(SparseMarginMSELoss)",
        MARGINS,
        words(sparse.SparseMarginMSELoss),
        KINKS,
    ),
    lexical(
        "SpladeLoss(SparseDistillKLDivLoss)",
        TEACHER_SCORES,
        words(sparse.SparseDistillKLDivLoss),
        KINKS,
    ),
    lexical("SpladeLoss(SparseCoSENTLoss)", SCORED, words(sparse.SparseCoSENTLoss), KINKS),
    lexical("SpladeLoss(SparseAnglELoss)", SCORED, words(lambda m: sparse.SparseAnglELoss(m, scale=1.0)), KINKS),
    lexical("SpladeLoss(SparseCosineSimilarityLoss)", SCORED, words(sparse.SparseCosineSimilarityLoss), KINKS),
    lexical("SpladeLoss(SparseTripletLoss)", TRIPLES, words(sparse.SparseTripletLoss), KINKS),
    lexical("SparseMSELoss", TAUGHT_WORDS, sparse.SparseMSELoss, KINKS),
    lexical("CSRLoss", PAIRS, lambda m: sparse.CSRLoss(m), model=sparse_codes),
    lexical("CSRLoss(beta=0)", PAIRS, lambda m: sparse.CSRLoss(m, beta=0.0), model=sparse_codes),
    crossed("BinaryCrossEntropyLoss", BINARY, cross.BinaryCrossEntropyLoss),
    crossed("CrossEntropyLoss", CLASSES, cross.CrossEntropyLoss, model=lambda: pairs(3)),
    crossed("MSELoss", SCORED, cross.MSELoss),
    crossed("MarginMSELoss", MARGINS, cross.MarginMSELoss),
    crossed("MultipleNegativesRankingLoss", PAIRS, sampled(cross.MultipleNegativesRankingLoss)),
    crossed(
        "CachedMultipleNegativesRankingLoss",
        PAIRS,
        sampled(cross.CachedMultipleNegativesRankingLoss),
    ),
    crossed("LambdaLoss", LISTS, cross.LambdaLoss, ORDER),
    crossed("ListMLELoss", LISTS, cross.ListMLELoss),
    crossed("PListMLELoss", LISTS, cross.PListMLELoss),
    crossed("ListNetLoss", LISTS, cross.ListNetLoss),
    crossed("RankNetLoss", LISTS, cross.RankNetLoss),
    crossed("ADRMSELoss", LISTS, cross.ADRMSELoss),
    late("MultiVectorMultipleNegativesRankingLoss", PAIRS, multi.MultiVectorMultipleNegativesRankingLoss),
    late("CachedMultiVectorMultipleNegativesRankingLoss", PAIRS, multi.CachedMultiVectorMultipleNegativesRankingLoss),
    late("MultiVectorMarginMSELoss", MARGINS, multi.MultiVectorMarginMSELoss),
    late("MultiVectorDistillKLDivLoss", TEACHER_SCORES, multi.MultiVectorDistillKLDivLoss),
]

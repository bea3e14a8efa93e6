"""Training on the part of a batch that stands best for all of it, found by forward passes (CoLM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zo_core import ConfigError, ModelError, Rademacher, derive_seed
from zo_core.modes import eval_mode
from zo_core.streaming import find_blocks

#: Last parts of the names of layers that compute the values of attention.
VALUES = ("v_proj", "value", "v_lin", "to_v", "v", "wv")
#: A source is small if it has less than this part of an equal share of the batch.
SMALL = 0.5

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Coreset:
    """Chooses examples of a batch whose gradients represent those of the whole batch (CoLM, arXiv 2407.19580).

    Each example's gradient with respect to the weights of the last value projection of attention is measured by its
    two-sided differences along some random directions, the same for all examples. Distances between these differences
    are, up to a factor, unbiased estimates of the squared distances between the gradients. Facility location then
    takes the examples that are nearest to all others. No weight is touched, and nothing is differentiated.

    Called with a model and a batch, it returns the smaller batch. The choice is a function of these two and of the
    settings alone, so that a run which is resumed chooses the same.

    Args:
        keep: the part of a batch that is kept, between 0 and 1.
        directions: number of random directions; each takes two forwards of the last block and the head.
        eps: length of a step along a direction.
        seed: determines the directions.
        source: name of a column of the batch with the numbers of the sources that examples are from. It is not passed
            to the model. All examples of sources with less than half of an equal share of the batch are kept, because
            gradients of many others would outvote them.
        layer: name of the layer; None takes the last one that is called ``v_proj``, ``value``, ``to_v`` or similar.
        losses: a function of the model and the batch that returns the loss of each example, ``[examples]``. None
            computes cross entropy from ``labels`` and the model's ``logits``, where its mean is the model's own loss.

    Raises:
        ConfigError: a setting is not valid.
    """

    keep: float = 0.5
    directions: int = 8
    eps: float = 1e-3
    seed: int = 0
    source: str | None = None
    layer: str | None = None
    losses: Callable[[nn.Module, Batch], Tensor] | None = None

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.keep, (int, float)) or not 0.0 < self.keep < 1.0:
            problems.append(f"keep={self.keep!r} must be a number between 0 and 1, for example 0.5")
        if self.directions < 1:
            problems.append(f"directions={self.directions!r} must be at least 1, for example 8")
        if not self.eps > 0.0:
            problems.append(f"eps={self.eps!r} must be positive, for example 1e-3")
        if problems:
            raise ConfigError(problems)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """The chosen part of a batch, in the batch's order and without the column of sources."""
        count = examples(batch)
        sources = None
        if self.source is not None:
            if self.source not in batch:
                raise ConfigError(
                    [
                        f"source={self.source!r} is not a column of the batch ({', '.join(batch)}); "
                        "Trainer drops columns that the model does not take unless remove_unused_columns=False"
                    ]
                )
            sources = torch.as_tensor(batch[self.source]).cpu()
        inputs = {name: value for name, value in batch.items() if name != self.source}
        size = max(1, round(self.keep * count))
        if size == count:
            return inputs
        chosen = select(self.gradients(model, inputs), size, sources)
        return {name: rows(value, chosen, count) for name, value in inputs.items()}

    def gradients(self, model: nn.Module, batch: Batch) -> Tensor:
        """Projected gradients of the examples: float64 ``[examples, directions]``, on the CPU."""
        name, layer = value_projection(model, self.layer)
        losses = self.losses or own_losses
        columns = []
        with torch.no_grad(), eval_mode(model), reused(model, name) as first:
            first(lambda: losses(model, batch))
            for index in range(self.directions):
                seed = derive_seed(self.seed, 0, index)
                above, below = (self._beside(losses, model, batch, layer, name, seed, side) for side in (1.0, -1.0))
                columns.append((above - below) / (2 * self.eps))
        found = torch.stack(columns, 1)
        if not bool(found.isfinite().all()):
            raise ModelError("the loss of an example is not finite; look at the batch and at the learning rate")
        return found

    def _beside(
        self, losses: Any, model: nn.Module, batch: Batch, layer: nn.Module, name: str, seed: int, side: float
    ) -> Tensor:
        """Losses where the layer has weights that are moved along a direction, without a copy of them."""

        def moved(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
            shape = output.shape[-1], inputs.shape[-1]
            signs = Rademacher().z(seed, name, 0, shape[0] * shape[1], inputs.device).view(shape)
            return output + side * self.eps * F.linear(inputs, signs.to(inputs.dtype))

        handle = layer.register_forward_hook(moved, with_kwargs=True)
        try:
            return losses(model, batch).detach().double().cpu()
        finally:
            handle.remove()


def select(gradients: Tensor, size: int, sources: Tensor | None = None) -> list[int]:
    """Indices of the examples to keep, in ascending order.

    Args:
        gradients: float64 ``[examples, directions]``.
        size: how many to keep.
        sources: the numbers of the examples' sources, ``[examples]``. Those of small ones are all kept; if there are
            more of them than ``size``, the choice is among them.
    """
    similarity = nearness(gradients)
    if sources is None:
        return sorted(facility_location(similarity, size))
    _, which, counts = sources.unique(return_inverse=True, return_counts=True)
    small = counts[which] * len(counts) < SMALL * len(sources)
    kept = small.nonzero().flatten().tolist()
    if len(kept) >= size:
        among = facility_location(nearness(gradients[kept]), size)
        return sorted(kept[index] for index in among)
    large = (~small).nonzero().flatten().tolist()
    among = facility_location(nearness(gradients[large]), size - len(kept))
    return sorted([*kept, *(large[index] for index in among)])


def nearness(points: Tensor) -> Tensor:
    """How near each of some points is to each other one: the largest distance minus theirs, ``[points, points]``."""
    distances = (points[:, None] - points[None]).square().sum(-1).sqrt()
    return distances.max() - distances


def facility_location(similarity: Tensor, size: int) -> list[int]:
    """Greedy maximisation of the sum over all elements of the similarity to the nearest chosen one.

    The function is submodular, so the greedy value is at least 1 - 1/e of the best one.

    Args:
        similarity: ``[elements, elements]``, not negative.
        size: how many elements to choose, at most all.

    Returns:
        The chosen elements, in the order of their choice. Of equal gains the first element wins.
    """
    covered = torch.zeros(len(similarity), dtype=similarity.dtype)
    chosen: list[int] = []
    for _ in range(size):
        gains = (similarity - covered[:, None]).clamp_min(0).sum(0)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
        covered = torch.maximum(covered, similarity[:, chosen[-1]])
    return chosen


def value_projection(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """The layer that a setting names, or the last value projection of attention, with its name."""
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise ConfigError([f"layer={name!r} is not a module of {type(model).__name__}"])
        return name, modules[name]
    found = [each for each in modules if each.rpartition(".")[2] in VALUES]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layer that is called {', '.join(VALUES)}; write layer='...' with the name "
            "of the last layer that computes the values of attention"
        )
    return found[-1], modules[found[-1]]


def earlier_blocks(model: nn.Module, name: str) -> list[nn.Module]:
    """The blocks before the one with this layer, in the same stack."""
    try:
        blocks = find_blocks(model)
    except ModelError:
        return []
    own = [each for each in blocks if name.startswith(f"{each}.")]
    if not own:
        return []
    stack = own[0].rpartition(".")[0]
    before = list(blocks)[: list(blocks).index(own[0])]
    return [blocks[each] for each in before if each.rpartition(".")[0] == stack]


@contextmanager
def reused(model: nn.Module, name: str) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """A context in which blocks before a layer are computed once.

    It gives a function that runs a first forward. In later ones the blocks before that layer return what the last of
    them returned in the first, on which everything behind them depends.
    """
    blocks = earlier_blocks(model, name)
    kept: list[Any] = []

    def again(*_: Any, **__: Any) -> Any:
        return copied(kept[-1])

    with ExitStack() as stack:

        def first(forward: Callable[[], Any]) -> None:
            if not blocks:
                return
            handle = blocks[-1].register_forward_hook(lambda _module, _args, output: kept.append(copied(output)))
            try:
                forward()
            finally:
                handle.remove()
            if len(kept) != 1:
                return  # a loss of several forwards, which have outputs of their own
            for block in blocks:
                stack.callback(restored, block, vars(block).get("forward"))
                block.forward = again

        yield first


def copied(output: Any) -> Any:
    """What a block returned, in memory of its own: a later block may write into it."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)


def restored(block: nn.Module, forward: Any) -> None:
    """Gives a block its forward back: one of its own if it had one, else that of its class."""
    del block.forward
    if forward is not None:
        block.forward = forward


def own_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of each example, if the mean over all labels is what the model returns as its loss."""
    outputs = model(**batch)
    if isinstance(batch.get("labels"), Tensor) and bool((batch["labels"] == -100).all()):
        raise ModelError("no label of this batch counts: all are -100; leave out such examples")
    logits, labels, loss = getattr(outputs, "logits", None), batch.get("labels"), getattr(outputs, "loss", None)
    if isinstance(labels, Tensor) and labels.is_floating_point():
        labels = None  # of a regression
    if logits is not None and labels is not None and loss is not None and logits.ndim == labels.ndim + 1:
        for shift in (True, False) if labels.ndim == 2 else (False,):
            scores, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).movedim(-1, 1)
            each = F.cross_entropy(scores, targets, reduction="none").view(len(labels), -1)
            counted = (targets != -100).view(len(labels), -1)
            if torch.isclose(each.sum() / counted.sum(), loss.to(each.dtype), rtol=1e-3, atol=1e-5):
                return each.sum(1) / counted.sum(1).clamp_min(1)
    raise ModelError(
        f"the loss of {type(model).__name__} is not the mean cross entropy of its logits and the labels, so that "
        "losses of single examples are not known; write Coreset(losses=function), a function of model and batch that "
        "returns them"
    )


def examples(batch: Batch) -> int:
    """How many examples a batch has."""
    found = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    if len(found) != 1:
        raise ConfigError(
            [f"the batch must have tensors with one row for each example; they have {sorted(found)} rows"]
        )
    return found.pop()


def rows(value: Any, chosen: Sequence[int], count: int) -> Any:
    """The rows of a column."""
    if isinstance(value, Tensor) and value.ndim:
        return value[torch.tensor(chosen, device=value.device)]
    if isinstance(value, list | tuple) and len(value) == count:
        return [value[index] for index in chosen]
    return value


class CoresetTrainerMixin:
    """Trains any `Trainer` on coresets: ``class CoresetTrainer(CoresetTrainerMixin, Trainer): ...``.

    ``per_device_train_batch_size`` is then the size of the batches to choose from. Choosing takes forwards without
    activations; the training step has those of the chosen part. Evaluation uses whole batches.

    Args:
        *args: those of the trainer.
        coreset: how to choose.
        **kwargs: those of the trainer.
    """

    def __init__(self, *args: Any, coreset: Coreset | None = None, **kwargs: Any):
        self.coreset = Coreset() if coreset is None else coreset
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, each of them with its chosen part alone, and the number of their tokens."""
        trainer: Any = super()
        whole, _ = trainer.get_batch_samples(epoch_iterator, num_batches, device)
        own: Any = self
        with own.compute_loss_context_manager():
            chosen = [self.coreset(own.model, batch) for batch in whole]
        return trainer.get_batch_samples(iter(chosen), len(chosen), device)

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a whole batch, without the column of sources."""
        trainer: Any = super()
        inputs = {name: value for name, value in inputs.items() if name != self.coreset.source}
        return trainer.prediction_step(model, inputs, *args, **kwargs)

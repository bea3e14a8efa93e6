"""Adapt a diffusion model with forward passes only: all weights, LoRA, 4-bit scales, or one word. Offline.

    python examples/diffusion.py
    python examples/diffusion.py --model unet --methods full word --picture digits.png

A small model of diffusers (the transformer of Stable Diffusion 3, or a UNet) learns by backpropagation to draw
scikit-learn's digits, named by words. The nines have no word. Then it is adapted without a backward pass:

* full, lora, scales: to digits written faintly, by all weights, by LoRA, or by the scales of a model whose linear
  layers are quantised to 4 bits, the codes of which stay (QZO, arXiv 2505.13430);
* word: to draw nines. One new word is learnt while the model, quantised to 4 bits, stays as it is (ZOODiP, arXiv
  2503.14868).

Beside each is the held-out loss after as many steps of backpropagation on the same batches.
Needs: pip install 'zo-trainer[hf,torchao]' diffusers scikit-learn
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DModel
from peft import LoraConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from zo_core import ZeroOrder

METHODS = ("full", "lora", "scales", "word")
NINE, ANYTHING, NEW = 9, 9, 10  # digits 0 to 8 are their own words; "anything" is what every digit is also called
WIDTH = 32  # of a word
GUIDANCE = 2.0
BATCH, PAIRS = 32, 4  # images of a step, and pairs of a time and noise for each


@dataclass(frozen=True)
class Draw:
    """All that is random in a step: images, their words, noise, and times between 0 and 1."""

    images: Tensor
    words: Tensor
    noise: Tensor
    times: Tensor


class Denoiser(nn.Module):
    """Words, and what draws images by them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, WIDTH)
        self.new = nn.Parameter(torch.zeros(WIDTH))

    def prompts(self, words: Tensor) -> Tensor:
        return torch.cat([self.words.weight, self.new[None]])[words]

    def guided(self, images: Tensor, times: Tensor, words: Tensor) -> Tensor:
        """What the model says with a word, and further away from what it says with none (classifier-free guidance)."""
        named, unnamed = self(images, times, words), self(images, times, torch.full_like(words, ANYTHING))
        return unnamed + GUIDANCE * (named - unnamed)


class Transformer(Denoiser):
    """The transformer of Stable Diffusion 3, with a rectified flow."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 3, "caption_projection_dim": 48}
        text = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
        images = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "pos_embed_max_size": 8}
        self.model = SD3Transformer2DModel(**sizes, **text, **images)

    def forward(self, images: Tensor, times: Tensor, words: Tensor) -> Tensor:
        prompts = self.prompts(words)
        text = {"encoder_hidden_states": prompts[:, None], "pooled_projections": prompts}
        return self.model(images, timestep=times * 1000, **text, return_dict=False)[0]

    def loss(self, draw: Draw) -> Tensor:
        times = draw.times.view(-1, 1, 1, 1)
        noisy = (1 - times) * draw.images + times * draw.noise
        return F.mse_loss(self(noisy, draw.times, draw.words), draw.noise - draw.images)

    @torch.no_grad()
    def draws(self, words: Tensor, noise: Tensor, steps: int = 25) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        for at in scheduler.timesteps:
            velocity = self.guided(noise, at.expand(len(noise)) / 1000, words)
            noise = scheduler.step(velocity, at, noise, return_dict=False)[0]
        return noise


class Unet(Denoiser):
    """A UNet that predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16}
        images = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "class_embed_type": "identity"}
        self.model = UNet2DModel(**sizes, **images, down_block_types=down, up_block_types=up)
        self.text = nn.Linear(WIDTH, 64)
        self.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def forward(self, images: Tensor, times: Tensor, words: Tensor) -> Tensor:
        return self.model(images, times, class_labels=self.text(self.prompts(words)), return_dict=False)[0]

    def loss(self, draw: Draw) -> Tensor:
        times = (draw.times * 1000).long()
        noisy = self.scheduler.add_noise(draw.images, draw.noise, times)
        return F.mse_loss(self(noisy, times, draw.words), draw.noise)

    @torch.no_grad()
    def draws(self, words: Tensor, noise: Tensor, steps: int = 50) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        self.scheduler.set_timesteps(steps)
        for at in self.scheduler.timesteps:
            found = self.guided(noise, at.expand(len(noise)), words)
            noise = self.scheduler.step(found, at, noise, generator=generator, return_dict=False)[0]
        return noise


MODELS = {"transformer": Transformer, "unet": Unet}


def digits() -> tuple[Tensor, Tensor]:
    """Images between -1 and 1, and what they show, in an order without meaning."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return images[order], torch.tensor(labels)[order]


def drawn(images: Tensor, words: Tensor, batch: int, pairs: int, seed: int) -> Iterator[Draw]:
    """Batches without an end; each image meets several pairs of a time and noise."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(images), (batch,), generator=generator).repeat(pairs)
        noise = torch.randn(images[rows].shape, generator=generator)
        yield Draw(images[rows], words[rows], noise, torch.rand(len(rows), generator=generator))


def backprop(model: Denoiser, draws: Iterator[Draw], steps: int, lr: float) -> None:
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(next(draws)).backward()
        optimizer.step()
        schedule.step()


def forward_only(model: Denoiser, draws: Iterator[Draw], steps: int, target: str) -> int:
    """A complete zeroth-order loop, without a learning rate; returns how many numbers moved."""
    zo = ZeroOrder(model, target=target)
    schedule = torch.optim.lr_scheduler.LinearLR(zo.optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        draw = next(draws)  # here and not in the closure, so that all probes of a step see the same
        zo.step(lambda: model.loss(draw))  # noqa: B023
        schedule.step()
    moved = sum(slot.tensor.numel() for slot in zo.slots)
    zo.close()
    return moved


def prepared(base: Denoiser, method: str) -> Denoiser:
    """A copy of the model of which a method's part is trainable."""
    model = copy.deepcopy(base)
    model.requires_grad_(method == "full")
    if method == "lora":
        model.model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if method in ("scales", "word"):
        quantize_(model.model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))
    if method == "word":
        model.new = nn.Parameter(model.words.weight[ANYTHING].detach().clone())
    return model.eval()


@dataclass
class Task:
    """What a method adapts to: batches, held-out batches, and the words of the picture."""

    images: Tensor
    words: Tensor
    held: tuple[Draw, ...]
    shown: Tensor

    @classmethod
    def of(cls, images: Tensor, words: Tensor, shown: Tensor) -> Task:
        """A fifth of the images is held out."""
        held = len(images) // 5
        unseen = drawn(images[:held], words[:held], 128, 1, seed=1)
        return cls(images[held:], words[held:], tuple(next(unseen) for _ in range(8)), shown)

    def draws(self) -> Iterator[Draw]:
        return drawn(self.images, self.words, BATCH, PAIRS, seed=2)

    @torch.no_grad()
    def loss(self, model: Denoiser) -> float:
        return sum(float(model.loss(draw)) for draw in self.held) / len(self.held)


def pretrained(name: str, images: Tensor, labels: Tensor, steps: int) -> Denoiser:
    """A model that knows digits by their words; a fifth of them, and all nines, were called "anything"."""
    torch.manual_seed(0)
    model = MODELS[name]()
    words = torch.where(torch.rand(len(labels)) < 0.2, ANYTHING, labels)
    backprop(model, drawn(images, words, 64, 1, seed=0), steps, lr=3e-3)
    return model.eval()


def adapted(base: Denoiser, method: str, task: Task, steps: int) -> tuple[Denoiser, Denoiser]:
    """Adapts by one method, and prints the result; returns the model before and after."""
    untouched, model = prepared(base, method), prepared(base, method)
    before = task.loss(model)
    begun = time.perf_counter()
    moved = forward_only(model, task.draws(), steps, "torchao_scales" if method == "scales" else "trainable")
    took = time.perf_counter() - begun
    beside = "-"
    if method != "scales":  # torchao's weights have no gradient for their scales
        other = prepared(base, method)
        backprop(other, task.draws(), steps, lr={"full": 1e-3, "lora": 3e-3, "word": 3e-2}[method])
        beside = f"{task.loss(other):.4f}"
    print(f"{method:8}{moved:>9,}{before:>10.4f}{task.loss(model):>9.4f}{beside:>17}{took:>9.0f}", flush=True)
    return untouched, model


def draw_picture(rows: list[tuple[str, Tensor]], path: str) -> None:
    """A row of images for each name, drawn by matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.62 * len(rows)), facecolor="white")
    for index, (name, images) in enumerate(rows):
        axis = figure.add_axes((0.24, 1 - (index + 0.95) / len(rows), 0.75, 0.9 / len(rows)))
        axis.imshow(torch.cat(list(F.pad(images[:, 0], (1, 1, 1, 1), value=1.0)), 1), cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
        figure.text(0.01, 1 - (index + 0.5) / len(rows), name, va="center", fontsize=9)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="transformer")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=300, help="zeroth-order steps, two forwards each")
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--picture", help="a PNG with images before and after")
    args = parser.parse_args()
    logging.getLogger("zo_core").setLevel(logging.ERROR)

    images, labels = digits()
    base = pretrained(args.model, images, labels, args.pretraining_steps)
    nines = labels == NINE
    faint = Task.of(0.5 * images[~nines] - 0.5, labels[~nines], torch.arange(9))
    word = Task.of(images[nines], torch.full((int(nines.sum()),), NEW), torch.full((9,), NEW))
    print("method     moved    before    after  backpropagation  seconds")
    rows: list[tuple[str, Tensor]] = []
    for method in args.methods:
        task = word if method == "word" else faint
        for when, model in zip(("before", "after"), adapted(base, method, task, args.steps), strict=True):
            if args.picture:
                start = torch.randn(len(task.shown), 1, 8, 8, generator=torch.Generator().manual_seed(3))
                rows.append((f"{method}: {when}", model.draws(task.shown, start)))
    if args.picture:
        draw_picture(rows, args.picture)


if __name__ == "__main__":
    main()

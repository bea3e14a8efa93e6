"""Law: models of diffusers stream, replay, and take LoRA adapters, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_helpers import differing, weights
from offload_helpers import assert_equal
from peft import LoraConfig
from torch import Tensor, nn

from zo_core import SeedLogWriter, ZeroOrder, replay

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

STEPS = 4


def transformer() -> nn.Module:
    """The transformer of Stable Diffusion 3, in small."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    text = {"joint_attention_dim": 12, "pooled_projection_dim": 12}
    images = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "pos_embed_max_size": 8}
    return SD3Transformer2DModel(**sizes, **text, **images).eval()


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    images = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    return UNet2DModel(**sizes, **images, down_block_types=down, up_block_types=up).eval()


MODELS = {"transformer": transformer, "unet": unet}


def denoising(model: nn.Module, step: int) -> Callable[[], Tensor]:
    """The loss of a step: what is random in it is drawn here, once for all probes."""
    draw = torch.Generator().manual_seed(step)
    images, noise = torch.randn(2, 4, 1, 8, 8, generator=draw)
    prompts, times = torch.randn(4, 2, 12, generator=draw), torch.rand(4, generator=draw)
    mixed = torch.lerp(images, noise, times.view(-1, 1, 1, 1))
    own: dict[str, Any] = {}
    if "pooled_projection_dim" in model.config:
        own = {"encoder_hidden_states": prompts, "pooled_projections": prompts[:, 0]}
    return lambda: F.mse_loss(model(mixed, timestep=times * 1000, **own).sample, noise - images)


def train(model: nn.Module, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    zo = ZeroOrder(model, lr=1e-3, rule="momentum", num_probes=2, **settings)
    numbers = []
    for step in range(STEPS):
        record = zo.step(denoising(model, step))
        numbers += [record.loss, record.projected_grad]
    zo.close()
    return numbers, weights(model)


@pytest.mark.parametrize("noise", ["rademacher", "low_rank"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_streamed_model_is_trained_as_a_resident_one(name: str, noise: str, tmp_path: Path) -> None:
    resident = train(MODELS[name](), noise=noise)
    assert differing(weights(MODELS[name]()), resident[1])
    assert_equal(resident, train(MODELS[name](), noise=noise, offload="cpu"))
    assert_equal(resident, train(MODELS[name](), noise=noise, offload="disk", offload_dir=str(tmp_path)))


def test_the_blocks_of_the_transformer_are_what_is_streamed() -> None:
    zo = ZeroOrder(transformer(), lr=1e-3, offload="cpu")
    zo.step(denoising(zo.model, 0))
    assert [block.name for block in zo.streaming.blocks] == [f"transformer_blocks.{index}" for index in range(3)]


def test_adapters_move_and_replay_on_a_base_that_stays(tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        model = transformer()
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        return model

    model, before = adapted(), weights(adapted())
    zo = ZeroOrder(model, lr=1e-2)
    log = SeedLogWriter.attach(zo, tmp_path / "log")
    for step in range(STEPS):
        zo.step(denoising(model, step))
    log.close()
    moved = differing(before, weights(model))
    assert moved
    assert all(".lora_" in name for name in moved)
    again = adapted()
    assert replay(again, tmp_path / "log") == STEPS
    assert differing(weights(again), weights(model)) == []

"""One of several processes that stream one model to one CUDA device; see tests/gpu/test_shared_blocks_cuda.py."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from zo_core import ZeroOrder
from zo_core.streaming import shared
from zo_core.streaming.shared import SharedStore

STEPS = 6


def main(folder: str, rank: int, size: int, how: str) -> None:
    if how == "own":
        setattr(shared, "host", lambda: None)  # noqa: B010
    meeting = f"file://{folder}/{how}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **shape)).to(torch.bfloat16)
    zo = ZeroOrder(net, lr=1e-4, rule="momentum", offload="cpu", device="cuda")
    begun = 0.0
    for step in range(STEPS):
        if step == 2:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(10 * rank + step)).cuda()
        zo.step(lambda ids=ids: net(input_ids=ids, labels=ids).loss)  # type: ignore[misc]
    zo.flush()
    seconds = (time.perf_counter() - begun) / (STEPS - 2)
    assert zo.streaming is not None
    store = zo.streaming.store
    registered = isinstance(store, SharedStore) and getattr(store.common, "registers", False)
    weights = {name: value.cpu().clone() for name, value in net.state_dict().items()}
    found = {"shared": isinstance(store, SharedStore), "registered": registered, "weights": weights, "seconds": seconds}
    torch.save(found, f"{folder}/{how}{rank}.pt")
    zo.close(torch.device("cpu"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

"""Memory of zeroth-order training: bf16 weights, 4-bit weights, and 4-bit weights streamed from files.

The bytes held are counted over tensors; the peak is that which the kernel reports for a separate process
(resident memory during the steps, minus that before the model was made, when the libraries had done a
step with a tiny one), including the forward's temporaries. On the CPU bitsandbytes dequantises one layer
at a time to compute with it.

    python -m benchmarks.int4_memory          # a table; Linux
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .report import save

MODES = ("bf16", "int4", "int4, offload='disk'")
MB = 1e6


def config(layers: int, width: int) -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=512,
    )


def load(mode: str, folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantisation = None if mode == "bf16" else how
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantisation)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # one view into the mapped file would keep all of it resident
    return model


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def trim() -> None:
    """Returns freed memory to the system, so that it does not count."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(mode: str, folder: str, tokens: int, steps: int) -> dict[str, float]:
    """Bytes held and peak of training in ``mode``, in this process."""
    from zo_core import ZeroOrder

    small = load(mode, f"{folder}/small")
    ZeroOrder(small).step(lambda: small(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.float().mean())
    trim()
    before = status("VmRSS")
    model = load(mode, folder)
    offload = "disk" if "disk" in mode else None
    with tempfile.TemporaryDirectory() as blocks:
        zo = ZeroOrder(model, lr=1e-6, offload=offload, offload_dir=blocks if offload else None)
        trim()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        ids = torch.randint(0, 8192, (1, tokens), generator=torch.Generator().manual_seed(0))
        for step in range(steps):
            if step == 1 and zo.streaming is not None:  # the first step looks at its point once more
                zo.streaming.bytes_read = 0
            zo.step(lambda: model(input_ids=ids, labels=ids).loss)
        peak = status("VmHWM") - before
        scales = sum(nbytes(slot.tensor) for slot in zo.slots if slot.scaling is not None)
        streaming = zo.streaming
        if streaming is None:
            held, read, written = sum(map(nbytes, model.parameters())), 0.0, 0
        else:
            evicted = {id(t) for block in streaming.blocks for ts in block.holders.values() for t in ts}
            arenas = [*streaming.arenas, *(arena for arena, _ in streaming.loaded.values())]
            held = sum(map(nbytes, arenas)) + sum(nbytes(p) for p in model.parameters() if id(p) not in evicted)
            read, written = streaming.bytes_read / (steps - 1), streaming.bytes_written
        zo.close()
    return {"weights": held, "scales": scales, "peak": peak, "read": read, "written": written}


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--child", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args.tokens, args.steps)))
        return
    from transformers import LlamaForCausalLM

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(config(args.layers, args.width)).to(torch.bfloat16)
        count = model.num_parameters()
        model.save_pretrained(folder)
        LlamaForCausalLM(config(2, 64)).to(torch.bfloat16).save_pretrained(f"{folder}/small")
        del model
        for mode in MODES:
            command = [sys.executable, "-m", "benchmarks.int4_memory", "--child", mode, folder]
            command += ["--tokens", str(args.tokens), "--steps", str(args.steps)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise SystemExit(result.stderr)
            found = json.loads(result.stdout.splitlines()[-1])
            other = found["peak"] - found["weights"] - found["scales"]
            values = (found["weights"], found["scales"], other, found["peak"], found["read"], found["written"])
            rows.append([mode, *(f"{value / MB:.1f}" for value in values)])
    columns = ["", "weights held", "scales", "everything else", "peak", "read a step", "written"]
    title = f"Megabytes of one training run of a Llama with {count / 1e6:.1f} M parameters, {args.tokens} tokens"
    save("int4-memory", title, columns, rows, torch.device("cpu"), write=args.save)


if __name__ == "__main__":
    main()

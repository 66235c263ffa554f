"""side_fusion's CUDA kernels compiled for the CPU and run on a call (tests/cuda/cuda_on_cpu.h, run_side_fusion.cpp)."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastadapt import native
from fastadapt.kernels.side_fusion.reference import Operands
from tests.kernels.side_fusion.calls import Call, few_bits

HERE = Path(__file__).parent
ACTIVATIONS = ("identity", "relu", "gelu", "quick_gelu")  # as csrc/side_fusion_device.cuh numbers them
EPS = 1e-5


def compiler(*flags: str) -> list[str]:
    """The command that compiles run_side_fusion.cpp, with these flags, up to where its result is named."""
    fixed = "-std=c++20 -O1 -g1 -pthread -Wall -Wno-unknown-pragmas".split()
    return ["g++", *fixed, *flags, f"-I{HERE}", f"-I{native.SOURCES}", str(HERE / "run_side_fusion.cpp"), "-o"]


def run(program: Path, call: Call, folder: Path, **environment: str) -> dict[str, Tensor]:
    """out and the gradients of what requires one, as `calls.results` gives them; CalledProcessError if the program fails."""
    tap = call.adapter(0)["tap"]
    wide = any(call.tensors[name].dtype is torch.float32 for name in call.bases)
    out_like = tap.new_empty(*tap.shape[:-1], _operands(call, 0).width, dtype=torch.float32 if wide else tap.dtype)
    wanted = _write(folder / "call", call, out_like)
    command = [str(program), str(folder / "call"), str(folder / "result")]
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return _read(folder / "result", call, out_like, wanted)


def _operands(call: Call, i: int) -> Operands:
    given = call.adapter(i)
    return Operands(*(given.get(name) for name in Operands._fields))


def _write(file: Path, call: Call, out_like: Tensor) -> list[str]:
    """The call as run_side_fusion reads it; returns the names of the tensors whose gradients it will write, in order."""
    parts: list[bytes] = []

    def integers(*numbers: int) -> None:
        parts.append(struct.pack(f"<{len(numbers)}q", *numbers))

    def tensor(values: Tensor | None) -> None:
        data = None if values is None else values.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        integers(-1 if data is None else len(data))
        parts.append(data or b"")

    width, bases = out_like.shape[-1], [call.tensors[name] for name in call.bases]
    integers(call.adapter(0)["tap"].dtype is torch.float16, out_like.numel() // width, width, len(bases))
    for base in bases:
        integers(base.dtype is torch.float32)
        tensor(base)
    integers(out_like.dtype is torch.float32)
    tensor(few_bits(out_like))
    integers(len(call.adapters))
    wanted = []
    for i, names in enumerate(call.adapters):
        operands, numbers = _operands(call, i), call.numbers[i]
        own = 0 if operands.up_weight is None else operands.up_weight.shape[0]
        hidden, inputs = operands.down_weight.shape
        integers(inputs, hidden, own, width - own, ACTIVATIONS.index(numbers["activation"]))
        parts.append(struct.pack("<3d", numbers["scale"], EPS, numbers["out_norm_eps"]))
        for field, values in zip(Operands._fields, operands):
            trained = values is not None and values.requires_grad
            integers(values is not None and values.dtype is torch.float32, values.nbytes if trained else 0)
            tensor(values)
            wanted += [names[field]] if trained else []
    file.write_bytes(b"".join(parts))
    return wanted


def _read(file: Path, call: Call, out_like: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    data = memoryview(bytearray(file.read_bytes()))
    found: dict[str, Tensor] = {}
    for name, like in [("out", out_like), *((f"d {name}", call.tensors[name]) for name in wanted)]:
        values = torch.frombuffer(data[: like.nbytes], dtype=like.dtype).view(like.shape) if like.numel() else like.detach()
        data = data[like.nbytes :]
        found[name] = found[name] + values if name in found else values
    assert not data
    return found

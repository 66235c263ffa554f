"""Cross-attention of many queries over few keys, at the shapes of the methods' bridges.

out_h = softmax(q_h k_h^T / sqrt(w)) v_h,      q and out (batch, queries, heads * w), k and v (batch, keys, heads * w)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import fastadapt
from bench.case import EAGER, FASTADAPT, SDPA, XFORMERS, Case, Unavailable, Work
from bench.cases import functional
from bench.cases.common import sizes
from bench.cases.functional import Normal, Tensors, Workload


@dataclass(frozen=True)
class Shape:
    """Samples, queries and keys of each, heads and their width; one of PRECISIONS."""

    batch: int
    queries: int
    keys: int
    num_heads: int
    head_width: int
    precision: str = "bf16"

    @property
    def name(self) -> str:
        heads = f"{self.num_heads} heads of {self.head_width}"
        return f"prior_attention {self.batch}x{self.queries} over {self.keys} keys, {heads}, {self.precision}"


# fixed before anything was measured
SHAPES = (
    Shape(60, 197, 77, 12, 64),  # HiVG's bridge
    Shape(60, 197, 77, 12, 64, "fp32"),
    Shape(32, 1370, 20, 12, 64),  # DINOv2 at 518 pixels over MaPPER's texts
    Shape(32, 1370, 77, 12, 64),
    Shape(32, 1370, 20, 12, 64, "fp16"),
    Shape(32, 676, 17, 8, 8, "fp16"),  # ETRIS's light Interactor, ladders of 64 and 128
    Shape(32, 676, 17, 8, 16, "fp16"),
    Shape(32, 676, 17, 4, 16, "fp16"),  # ETRIS's Interactor of a ResNet
)
REDUCED_SHAPES = (
    Shape(2, 197, 77, 12, 64, "fp32"),
    Shape(2, 676, 17, 8, 8, "fp32"),
)


def case(shape: Shape) -> Case:
    """The Case of a shape."""
    width = shape.num_heads * shape.head_width
    queries, keys = Normal((shape.batch, shape.queries, width)), Normal((shape.batch, shape.keys, width))
    forward = forward_work(shape)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations={"q": queries, "k": keys, "v": keys},
        parameters={},
        results={"out": queries.shape},
        arms={
            EAGER: lambda tensors: eager(shape, tensors),
            SDPA: lambda tensors: sdpa(shape, tensors),
            XFORMERS: lambda tensors: xformers(shape, tensors),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: eager(shape, tensors),
        work={"forward": forward, "forward+backward": forward + backward_work(shape)},
    )
    return functional.case(workload)


def eager(shape: Shape, tensors: Tensors) -> Tensors:
    """Scores and probabilities as tensors, as the methods' released codes compute them."""
    q, k, v = (heads(shape, tensor).transpose(1, 2) for tensor in tensors.values())
    scores = (q * shape.head_width**-0.5) @ k.transpose(-2, -1)
    return {"out": (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)}


def sdpa(shape: Shape, tensors: Tensors) -> Tensors:
    """torch's own fused attention."""
    q, k, v = (heads(shape, tensor).transpose(1, 2) for tensor in tensors.values())
    return {"out": F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)}


def xformers(shape: Shape, tensors: Tensors) -> Tensors:
    """xformers' memory-efficient attention, which reads heads as they lie."""
    if not tensors["q"].is_cuda:
        raise Unavailable("xformers' memory_efficient_attention runs on CUDA devices alone")
    from xformers.ops import memory_efficient_attention

    return {"out": memory_efficient_attention(*(heads(shape, tensor) for tensor in tensors.values())).flatten(2)}


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    return {"out": fastadapt.prior_attention(**tensors, num_heads=shape.num_heads)}


def heads(shape: Shape, tensor: Tensor) -> Tensor:
    """(batch, tokens, heads * w) as (batch, tokens, heads, w)."""
    return tensor.unflatten(-1, (shape.num_heads, shape.head_width))


def forward_work(shape: Shape) -> Work:
    """2 B Tq Tk D for each of the two products; q, k, v and the output once each."""
    queries, keys, product = _parts(shape)
    return Work(2 * product, 2 * queries + 2 * keys)


def backward_work(shape: Shape) -> Work:
    """2 B Tq Tk D for each of dV, dP, dQ and dK; q, k, v, and the gradients of all four, once each."""
    queries, keys, product = _parts(shape)
    return Work(4 * product, 3 * queries + 4 * keys)


def _parts(shape: Shape) -> tuple[int, int, int]:
    """Bytes of q, bytes of k, and operations of one product of both."""
    size = sizes(shape.precision)[0]
    queries, keys = (shape.batch * count * shape.num_heads * shape.head_width for count in (shape.queries, shape.keys))
    return size * queries, size * keys, 2 * queries * shape.keys

"""What a case is: arms that compute the same in different ways, how to tell that they do, and the least it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.clocks import Step
from fastadapt.prove.judge import Verdict

# names of arms that the report gives a role
FROZEN = "frozen"
PEFT = "PEFT"
EAGER = "eager"  # the equation in torch's own functions
RELEASED = "released"  # what a method's released code calls
STRONG = "strong"  # a method in plain PyTorch, without dead work
SDPA = "SDPA"  # with F.scaled_dot_product_attention
XFORMERS = "xformers"
CHANNELS_LAST = "channels last"  # torch's convolution of a view of the tokens, without copies of the layout
STACKED = "stacked"  # with the weights of several layers stacked into as few products as possible
ONE_BY_ONE = "one by one"  # fastadapt's operation for one part, called for each
CUDNN_ARMS = {  # either of the two layouts under other settings of torch.backends.cudnn; ATen's own kernels know no benchmark
    f"{layout}, {setting}": (layout, options)
    for layout in (EAGER, CHANNELS_LAST)
    for setting, options in {
        "cudnn.benchmark": {"benchmark": True},
        "cuDNN's kernels": {"depthwise_kernel": "cudnn"},
        "cuDNN's kernels, cudnn.benchmark": {"depthwise_kernel": "cudnn", "benchmark": True},
        "ATen's kernels": {"depthwise_kernel": "native"},
    }.items()
}
COMPILED = "torch.compile"
ADDMM = "addmm-style"
FASTADAPT = "fastadapt"
GRAPHED = "fastadapt, graph_step"  # the same as one CUDA graph
AGAIN = "fastadapt again"  # the same arm sampled twice: the noise floor


class Unavailable(RuntimeError):
    """An arm that cannot run on this machine or device, and why: skipped, which is no failure."""


@dataclass(frozen=True)
class Work:
    """The least a phase needs: floating-point operations, and bytes if each tensor crosses memory once."""

    flops: float
    bytes_min: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes_min + other.bytes_min)


@dataclass(frozen=True)
class Arm:
    """One way to compute a case.

    forward(i): run on input set i, recording for backward; backward(result): the gradients; update(): the optimizer,
        if any.
    outputs(dropout): results and gradients by name on input set 0, from the case's fixed seed, for verification.
    constants: parameters, buffers and inputs, which do not count as kept for the backward.
    """

    forward: Callable[[int], Any]
    backward: Callable[[Any], object]
    outputs: Callable[[bool], dict[str, Tensor]]
    constants: Sequence[Tensor]
    update: Callable[[], object] = lambda: None

    def step(self, phase: str) -> Step:
        """What a clock times for `phase`: "forward", "forward+backward" or "training step"."""
        return {
            "forward": self.forward,
            "forward+backward": lambda i: self.backward(self.forward(i)),
            "training step": lambda i: (self.backward(self.forward(i)), self.update()),
        }[phase]


@dataclass(frozen=True)
class Case:
    """A workload and its arms.

    params: shape, dtype, rank and so on, as they go into rows.
    dtype: what it computes in; autocast: whether it gets there by autocast.
    make_inputs(device): what all arms share; on the meta device, without values.
    arms: name -> a function that builds the arm from the inputs.
    verify(name, arm, inputs): the verdicts on an arm, by what was compared; none for an arm that computes something
        else.
    work: the phases to time, each with its Work or None where no formula is given.
    """

    name: str
    params: dict[str, Any]
    dtype: torch.dtype
    autocast: bool
    make_inputs: Callable[[torch.device], Any]
    arms: dict[str, Callable[[Any], Arm]]
    verify: Callable[[str, Arm, Any], dict[str, Verdict]]
    work: dict[str, Work | None]

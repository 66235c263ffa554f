"""Bytes that one interaction of ETRIS keeps for the backward, at its size and batch, counted without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from tests.kernels.light_interaction.calls import fused, make

BATCH, TOKENS, WORDS, WIDTH, HEADS = 32, 676, 17, 64, 8
MB = 1e6
MOST = 20 * MB


def of_torch(dtype: torch.dtype, need_weights: bool) -> int:
    """Of nn.MultiheadAttention and the product, in both directions."""
    x = torch.empty(BATCH, TOKENS, WIDTH, dtype=dtype, device="meta", requires_grad=True)
    y = torch.empty(BATCH, WORDS, WIDTH, dtype=dtype, device="meta", requires_grad=True)
    modules = [nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=dtype, device="meta") for _ in range(2)]

    def run() -> list[Tensor]:
        pairs = zip(modules, (x, y), (y, x))
        return [source * mha(source, target, target, need_weights=need_weights)[0] for mha, source, target in pairs]

    with as_on_cuda():
        return saved_bytes(run, exclude=[parameter for mha in modules for parameter in mha.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_interaction_keeps_at_most_20_megabytes(dtype):
    call = make((1, 1, WIDTH), 1, HEADS, dtype=dtype).to("meta")
    x = torch.empty(BATCH, TOKENS, WIDTH, dtype=dtype, device="meta", requires_grad=True)
    y = torch.empty(BATCH, WORDS, WIDTH, dtype=dtype, device="meta", requires_grad=True)
    call = call.having(x=x, y=y)
    weights = [tensor for name, tensor in call.tensors.items() if name not in ("x", "y")]
    ours = saved_bytes(lambda: fused("triton")(call), exclude=weights)
    eager, sdpa = of_torch(dtype, need_weights=True), of_torch(dtype, need_weights=False)
    print(f"{dtype}: fastadapt {ours / MB:.2f} MB, torch with weights {eager / MB:.1f} MB, without {sdpa / MB:.1f} MB")
    assert ours <= MOST
    image, words = BATCH * TOKENS * WIDTH * 2, BATCH * WORDS * WIDTH
    assert ours == 2 * image + 2 * words + 4 * words + 4 * BATCH * HEADS * WORDS  # x, o_0, y, o_1, its log-sum-exp
    assert eager > 5 * ours and sdpa > 2 * ours  # the measure sees what there is to save

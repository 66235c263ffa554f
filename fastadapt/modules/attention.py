"""Multi-head attention with torch's parameters, on torch's fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt.core.checks import check_padding_mask, check_probability, fail


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention with the same parameters, on scaled_dot_product_attention: batch first, no averaged weights.

        head_i = dropout(softmax(Q_i K_i^T / sqrt(embed_dim / num_heads))) V_i
        y      = [head_1 ... head_h] W_o^T + b_o,      Q, K, V = query W_q^T + b_q, key W_k^T + b_k, value W_v^T + b_v

    (Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2).  The parameters are named, shaped and drawn as
    nn.MultiheadAttention's, so that state dicts go both ways: `in_proj_weight` (3 embed_dim, embed_dim) holds W_q, W_k and
    W_v, `in_proj_bias` (3 embed_dim,) their biases, and `out_proj` is a linear.  Neighbouring arguments that are the same
    tensor object are projected by one product.  The attention weights are formed only where torch has no fused kernel: with
    dropout on a CPU, and in float64 on a GPU.

    Args:
        embed_dim: width of query, key, value and y.
        num_heads: a divisor of embed_dim.
        dropout: probability in [0, 1) with which an attention weight is dropped while training.
        device, dtype: of the parameters.

    Raises:
        ValueError: num_heads does not divide embed_dim, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            fail("num_heads", f"a divisor of embed_dim = {embed_dim}", num_heads)
        check_probability("dropout", dropout)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        like = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **like))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **like))
        self.out_proj = nn.Linear(embed_dim, embed_dim, **like)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend from query to key and value.

        Args:
            query: (B, T, embed_dim).
            key, value: (B, S, embed_dim).
            key_padding_mask: (B, S) of bool, True at the keys to ignore.  A query with no key left attends to nothing: its
                heads are zero, and its output is b_o.

        Returns:
            y, (B, T, embed_dim).

        Raises:
            ValueError: key_padding_mask is not a bool tensor of shape (B, S).
        """
        check_padding_mask("key_padding_mask", key_padding_mask, key.shape[:2], key.device)
        keep = None
        if key_padding_mask is not None:
            keep = ~key_padding_mask[:, None, None, :]
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._project(query, key, value)]
        dropout_p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(*heads, attn_mask=keep, dropout_p=dropout_p)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Q, K and V."""
        if query is key and key is value:
            runs = [(query, 3)]
        elif query is key:
            runs = [(query, 2), (value, 1)]
        elif key is value:
            runs = [(query, 1), (key, 2)]
        else:
            runs = [(query, 1), (key, 1), (value, 1)]
        rows = [count * self.embed_dim for _, count in runs]
        weights, biases = self.in_proj_weight.split(rows), self.in_proj_bias.split(rows)
        projected = (F.linear(x, *pair).chunk(count, -1) for (x, count), *pair in zip(runs, weights, biases))
        return [part for parts in projected for part in parts]

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"

"""The fusion encoders in plain PyTorch: DETR's layer, post-norm (MaPPER, M2IST) or pre-norm (HiVG)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F


class FusionLayer(nn.Module):
    """One layer of DETR's encoder, with nn.TransformerEncoderLayer's parameters and names.

    The positions are added to queries and keys, not to values.  Dropout is on attention, hidden layer and both branches.

        post-norm  x = norm1(x + MHA(x + p, x + p, x));  x = norm2(x + FFN(x))
        pre-norm   n = norm1(x);  x = x + MHA(n + p, n + p, n);  x = x + FFN(norm2(x))
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, pre_norm: bool, maps: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))
        self.pre_norm, self.maps = pre_norm, maps

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
        """x (N, B, width), positions (N, 1, width), padding (B, N) -> (N, B, width)"""
        if self.pre_norm:
            x = x + self._attend(self.norm1(x), positions, padding)
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x, positions, padding))
        return self.norm2(x + self._feed(x))

    def _attend(self, x: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
        q = x + positions
        attended, _ = self.self_attn(q, q, x, key_padding_mask=padding, need_weights=self.maps)
        return self.dropout1(attended)

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class EagerFusionEncoder(nn.Module):
    """`fastadapt.FusionEncoder`, with its arguments, parameters and names, in plain PyTorch: SDPA, and nothing else fused."""

    maps: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_layers: int,
        dim_feedforward: int,
        dropout: float = 0.1,
        *,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FusionLayer(d_model, num_heads, dim_feedforward, dropout, pre_norm, self.maps) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model) if pre_norm else None

    def forward(
        self, tokens: Tensor, positions: Tensor, key_padding_mask: Tensor | None = None, rows: int | None = None
    ) -> Tensor:
        """Tokens (B, T, d_model), positions (T, d_model) and padding (B, T), True for no key, to the first `rows` results."""
        x, positions = tokens.transpose(0, 1).contiguous(), positions[:, None]  # the released order, batch second
        for layer in self.layers:
            x = layer(x, positions, key_padding_mask)
        return (x if self.norm is None else self.norm(x)).transpose(0, 1)[:, :rows]


class ReleasedFusionEncoder(EagerFusionEncoder):
    """The same as the authors run it: attention maps are computed, averaged over the heads, and thrown away."""

    maps = True

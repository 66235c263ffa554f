"""HiVG's bridges of each arm: the fused module, and the same in plain PyTorch for the arms that do without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import CrossModalBridges, HiLoraLinear, LoraPair
from fastadapt.models.hivg.towers import explicit_attention


class Text(NamedTuple):
    """What one bridge attends to: keys and values (B, T, dim), and the mask (B, T) of the keys to ignore, if there is one."""

    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None


class Bridges(CrossModalBridges):
    """`CrossModalBridges`, called for the text side: states (B, T, text_dim) and padding (B, T) or None to each bridge's text.

    lora: what a LoRA beside each trained projection is made of, as the release has it; those of the keys and values of bridge i
        are in `lora[i]`.  None for none.
    """

    side: ClassVar[type[nn.Module] | None] = None  # of each visual side; None for the fused one

    def __init__(self, count: int, lora: dict[str, Any] | None = None, **config: Any) -> None:
        super().__init__(count, **config)
        self.lora = None
        if lora is not None:
            dim, names = self.kv_weight.shape[1], ("k_proj", "v_proj")
            self.lora = nn.ModuleList(nn.ModuleDict({name: _pair(dim, **lora) for name in names}) for _ in range(count))
        for side in self.visual:
            if lora is not None:
                side.q_proj, side.out_proj = (HiLoraLinear.from_linear(m, **lora) for m in (side.q_proj, side.out_proj))
            if self.side is not None:
                side.__class__ = self.side

    def forward(self, states: Sequence[Tensor], padding: Tensor | None) -> Sequence[Any]:
        return self.encode_text(states, padding) if self.lora is None else self.eager_text(states, padding)

    def eager_text(self, states: Sequence[Tensor], padding: Tensor | None) -> list[Text]:
        """`encode_text` in plain PyTorch, bridge by bridge, with LoRA where there is one."""
        if self.text_norm:
            states = [F.layer_norm(f, f.shape[-1:]) for f in states]
        return [Text(*self._keys_values(i, self._text(i, states)), padding) for i in range(len(self))]

    def _text(self, index: int, states: Sequence[Tensor]) -> Tensor:
        if self.adaptive:
            gated = [self._weighed(self.token_weight[index, : f.shape[1], i], f) for i, f in enumerate(states)]
            t = F.linear(torch.cat(gated, -1), self.gate_weight[index].T, self.gate_bias[index])
        else:
            (t,) = states
        # the release's: words first, and then read as if samples were
        return t.transpose(0, 1).reshape(t.shape) if self.parity == "released" else t

    def _weighed(self, weight: Tensor, state: Tensor) -> Tensor:
        return weight * state + state

    def _keys_values(self, index: int, t: Tensor) -> list[Tensor]:
        weights, biases = self.kv_weight[index].T.chunk(2), self.kv_bias[index].chunk(2)
        found = [F.linear(t, weight, bias) for weight, bias in zip(weights, biases)]
        if self.lora is None:
            return found
        return [y + pair(t) for y, pair in zip(found, self.lora[index].values())]


def _pair(dim: int, r: int, lora_alpha: float, lora_dropout: float) -> LoraPair:
    return LoraPair(dim, dim, r, lora_alpha / r, lora_dropout)


class EagerSide(nn.Module):
    """The visual side on SDPA: the class that a fused one is given, whose modules stay."""

    def forward(self, h1: Tensor, text: Text) -> Tensor:
        attended = self._attend(self.q_proj(self.norm(h1)), text)
        x = self.fc1(self.out_proj(attended))
        return h1 + self.fc2(x * torch.sigmoid(1.702 * x))

    def _attend(self, query: Tensor, text: Text) -> Tensor:
        mask = text.key_padding_mask
        q, k, v = (self._split(x) for x in (query, text.key, text.value))
        mask = None if mask is None else ~mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ReleasedSide(EagerSide):
    """The same with its attention maps."""

    def _attend(self, query: Tensor, text: Text) -> Tensor:
        q, k, v = (self._split(x) for x in (query, text.key, text.value))
        mask = text.key_padding_mask
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, torch.finfo(q.dtype).min)[:, None, None]
        return explicit_attention(q, k, v, mask)[0]


class EagerBridges(Bridges):
    """Every bridge by itself."""

    side = EagerSide

    def forward(self, states: Sequence[Tensor], padding: Tensor | None) -> list[Text]:
        return self.eager_text(states, padding)


class ReleasedBridges(EagerBridges):
    """As the authors run it: the tables of w repeated for every sample."""

    side = ReleasedSide

    def _weighed(self, weight: Tensor, state: Tensor) -> Tensor:
        return super()._weighed(weight.repeat(len(state), 1, 1), state)

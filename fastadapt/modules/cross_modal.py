"""HiVG's cross-modal bridges, by which the blocks of a frozen image tower read the states of a text tower."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import prior_attention
from fastadapt.core.backend import autocast_dtype
from fastadapt.core.checks import check_dtype, check_tensor, fail
from fastadapt.modules.activation import quick_gelu

_EPS = 1e-5


class BridgeText(NamedTuple):
    """What one bridge attends to: keys and values (B, T, dim), and the mask (B, T) of the keys to ignore, if there is one."""

    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None


class VisualSide(nn.Module):
    """The part of one bridge that sees the image: h1 + MLP(CrossAttention(LN(h1), text))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, _EPS, **like)
        self.q_proj = nn.Linear(dim, dim, **like)
        self.out_proj = nn.Linear(dim, dim, **like)
        self.fc1 = nn.Linear(dim, mlp_dim, **like)
        self.fc2 = nn.Linear(mlp_dim, dim, **like)
        if zero_init:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, h1: Tensor, text: BridgeText) -> Tensor:
        """h2 (B, L, dim) from h1 (B, L, dim) and this bridge's text, one of those from `CrossModalBridges.encode_text`."""
        check_tensor("h1", h1, (text.key.shape[0], None, self.norm.weight.numel()), text.key.device)
        if autocast_dtype(h1) is None:
            check_dtype("h1", h1, (self.norm.weight.dtype,))
        query = self.q_proj(self.norm(h1))
        attended = prior_attention(
            query, text.key, text.value, num_heads=self.num_heads, key_padding_mask=text.key_padding_mask
        )
        return h1 + self.fc2(quick_gelu(self.fc1(self.out_proj(attended))))

    @torch.no_grad()
    def fold(self) -> None:
        """Make one linear of out_proj and fc1, between which there is nothing: W = W1 Wo, b = W1 bo + b1; for inference."""
        for name in ("out_proj", "fc1"):
            if type(module := getattr(self, name)) is not nn.Linear:
                fail(name, "an nn.Linear, its adapters merged and unloaded", type(module).__name__)
        self.fc1.bias.add_(self.fc1.weight @ self.out_proj.bias)
        self.fc1.weight = nn.Parameter(self.fc1.weight @ self.out_proj.weight, requires_grad=False)
        self.out_proj = nn.Identity()

    def train(self, mode: bool = True) -> VisualSide:
        if mode and isinstance(self.out_proj, nn.Identity):
            raise RuntimeError("a folded bridge is for inference only: train the bridges that it was folded from")
        return super().train(mode)


class CrossModalBridges(nn.Module):
    """HiVG's multi-layer adaptive cross-modal bridges, one for each bridged block, whose text sides run together.

    A bridge stands between the self-attention and the MLP of a frozen pre-norm ViT block.  With n states f_i of the text tower:

        t  = concat_i((1 + w_i) o LN(f_i)) Wg + bg            its text side, o the element-wise product
        h2 = h1 + MLP(CrossAttention(LN(h1), t))              its visual side

    CrossAttention has query, key, value and output projections with biases; MLP is Linear, QuickGELU, Linear.  There is neither
    dropout nor a residual between the two.  (Xiao et al., "HiVG: Hierarchical Multimodal Fine-grained Modulation for Visual
    Grounding", ACM MM 2024: the multi-layer adaptive cross-modal bridge.)

        bridges = CrossModalBridges(4)
        text = bridges.encode_text(states)        # once for all of them
        h2 = bridges[i](h1, text[i])              # in the i-th bridged block

    The text side's parameters are stored stacked over the N bridges, its matrices as (in, out), so that all keys and values
    take four kernels: `token_weight` (N, T, n, text_dim) for w, `gate_weight` (N, n * text_dim, dim) and `gate_bias` (N, dim),
    `kv_weight` (N, dim, 2 * dim) and `kv_bias` (N, 2 * dim), keys before values.  `bridge_state_dict` gives one bridge's
    weights in nn.Linear's layout, `load_bridge_state_dict` takes them.  The projections of the visual side, `visual[i]`, are
    nn.Linear modules, which LoraLinear or PEFT may replace; those of the keys and values, which train in full, are not.

    Args:
        num_bridges: N, the number of bridged blocks.
        dim: width of the visual tokens, a multiple of num_heads.
        text_dim: width of a text state.
        num_states: n, how many states of the text tower a bridge reads.
        num_tokens: T, the most words a caption has.
        num_heads: heads of the cross-attention.
        mlp_dim: hidden width of the MLP; None for 4 * dim.
        adaptive: False leaves out w, Wg and bg: t is the one state given, of width dim (pre-training on mixed data sets).
        text_norm: normalise each state over its channels, since their norms grow with the tower's depth and the gate would read
            little but the deepest.  This LayerNorm has no weight and bias: (1 + w_i) scales each channel already, and the
            parameters stay as many as the released model's, whose weights load.  None for True where there is a gate, False
            with parity="released".
        parity: "released" is the released code's layout, for comparisons only: slot s of sample b holds word i of sample j,
            (i, j) = divmod(b * T + s, B), and so the samples of a batch mix.  None for the paper's: each sample its own words.
        zero_init: start the MLP's last linear at zero, so that a new bridge changes nothing.
        device, dtype: as for nn.Linear.

    Raises:
        ValueError: sizes that do not fit, or an unknown parity.

    Four bridges of the default sizes have 30,078,976 parameters.  The attention is `prior_attention`: deterministic, its sums
    in float32.  QuickGELU keeps only its argument for the backward.
    """

    def __init__(
        self,
        num_bridges: int = 4,
        *,
        dim: int = 768,
        text_dim: int = 512,
        num_states: int = 1,
        num_tokens: int = 77,
        num_heads: int = 12,
        mlp_dim: int | None = None,
        adaptive: bool = True,
        text_norm: bool | None = None,
        parity: str | None = None,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_bridges < 1:
            fail("num_bridges", "at least 1", num_bridges)
        if num_states < 1 or (num_states > 1 and not adaptive):
            fail("num_states", "at least 1" if adaptive else "1, for there is no gate to join more", num_states)
        if dim % num_heads:
            fail("dim", f"a multiple of num_heads = {num_heads}", dim)
        if not adaptive and text_dim != dim:
            fail("text_dim", f"dim = {dim}, for there is no gate between them", text_dim)
        if parity not in (None, "released"):
            fail("parity", "None or 'released'", repr(parity))
        self.num_states, self.num_tokens, self.text_dim = num_states, num_tokens, text_dim
        self.adaptive, self.parity = adaptive, parity
        self.text_norm = adaptive and parity is None if text_norm is None else text_norm

        def stacked(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_bridges, *shape, device=device, dtype=dtype))

        if adaptive:
            self.token_weight = stacked(num_tokens, num_states, text_dim)
            self.gate_weight = stacked(num_states * text_dim, dim)
            self.gate_bias = stacked(dim)
        self.kv_weight, self.kv_bias = stacked(dim, 2 * dim), stacked(2 * dim)
        self.visual = nn.ModuleList(
            VisualSide(dim, num_heads, mlp_dim or 4 * dim, zero_init=zero_init, device=device, dtype=dtype)
            for _ in range(num_bridges)
        )
        self.reset_text_parameters()

    def reset_text_parameters(self) -> None:
        """Start the text side anew: w from N(0, 1), every linear as nn.Linear's."""
        linears = [(self.kv_weight, self.kv_bias)]
        if self.adaptive:
            nn.init.normal_(self.token_weight)
            linears.append((self.gate_weight, self.gate_bias))
        for weight, bias in linears:
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def __len__(self) -> int:
        return len(self.visual)

    def __getitem__(self, index: int) -> VisualSide:
        return self.visual[index]

    def encode_text(
        self, states: Tensor | Sequence[Tensor], key_padding_mask: Tensor | None = None
    ) -> list[BridgeText]:
        """Keys and values of every bridge, which depend on the caption alone.

        Args:
            states: the n text states (B, T, text_dim), in the order of w; or one tensor (B, T, n, text_dim), which saves the
                kernel that stacks more than one.  T may be less than num_tokens, for captions cut after the longest.
            key_padding_mask: bool (B, T), True for a word that no bridge attends to, as in nn.MultiheadAttention; None attends
                to all, padding too, as the released model does.  The bridges check its dtype and shape.

        Returns:
            A list of N texts, to be given to the bridges.

        Raises:
            ValueError: a wrong number of states, a wrong shape, dtype or device, or a mask with parity="released".
        """
        f = self._stacked_states(states)
        batch, length = f.shape[:2]
        if self.parity == "released" and key_padding_mask is not None:
            fail("key_padding_mask", "None, for the released layout has no mask", type(key_padding_mask).__name__)
        if self.text_norm:
            f = F.layer_norm(f, f.shape[-1:], eps=_EPS)
        if self.adaptive:
            gated = torch.addcmul(f, f, self.token_weight[:, None, :length])
            t = torch.baddbmm(self.gate_bias[:, None], gated.flatten(3).flatten(1, 2), self.gate_weight)
        else:
            t = f.reshape(1, batch * length, -1).expand(len(self), -1, -1)
        if self.parity == "released":
            t = t.unflatten(1, (batch, length)).transpose(1, 2).flatten(1, 2)
        kv = torch.baddbmm(self.kv_bias[:, None], t, self.kv_weight).unflatten(2, (2, -1)).unflatten(1, (batch, length))
        # unbound twice, and not sliced: the gradient of a slice fills the whole tensor with zeros, once for each slice
        return [BridgeText(*pair.unbind(2), key_padding_mask) for pair in kv.unbind(0)]

    def _stacked_states(self, states: Tensor | Sequence[Tensor]) -> Tensor:
        """The states as (B, T, n, text_dim), checked."""
        if isinstance(states, Tensor):
            check_tensor("states", states, (None, None, self.num_states, self.text_dim), self.kv_weight.device)
        else:
            if len(states) != self.num_states:
                fail("states", f"num_states = {self.num_states} text states", len(states))
            for i, state in enumerate(states):
                wanted = (None, None, self.text_dim) if i == 0 else tuple(states[0].shape)
                check_tensor(f"states[{i}]", state, wanted, self.kv_weight.device)
            states = states[0].unsqueeze(2) if len(states) == 1 else torch.stack(tuple(states), 2)
        if states.shape[1] > self.num_tokens:
            fail("states", f"at most num_tokens = {self.num_tokens} tokens", states.shape[1])
        if autocast_dtype(states) is None:
            check_dtype("states", states, (self.kv_weight.dtype,))
        return states

    @torch.no_grad()
    def bridge_state_dict(self, index: int) -> dict[str, Tensor]:
        """Views of one bridge's parameters, named and laid out as those of modules of its own would be.

        They are `w` (n, T, text_dim) and weight and bias of `gate` unless adaptive is False, and weight and bias of `norm`,
        `q_proj`, `k_proj`, `v_proj`, `out_proj`, `fc1` and `fc2`; a linear's weight is (out, in).
        """
        gate = {}
        if self.adaptive:
            gate = {
                "w": self.token_weight[index].transpose(0, 1),
                "gate.weight": self.gate_weight[index].T,
                "gate.bias": self.gate_bias[index],
            }
        key, value = self.kv_weight[index].T.chunk(2)
        key_bias, value_bias = self.kv_bias[index].chunk(2)
        projections = {
            "k_proj.weight": key,
            "k_proj.bias": key_bias,
            "v_proj.weight": value,
            "v_proj.bias": value_bias,
        }
        return {**gate, **projections, **self.visual[index].state_dict()}

    @torch.no_grad()
    def load_bridge_state_dict(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Copy one bridge's weights from `state`, which has `bridge_state_dict`'s names and shapes.

        A checkpoint with modules for each bridge comes in this way, once its keys are renamed and the low-rank updates that
        it may have of these projections are added to their weights.

        Raises:
            ValueError: a missing or unknown name, or a wrong shape.
        """
        own = self.bridge_state_dict(index)
        if state.keys() != own.keys():
            fail("state", f"the keys {sorted(own)}", sorted(state))
        for name, view in own.items():
            check_tensor(f"state[{name!r}]", state[name], tuple(view.shape), state[name].device)
        for name, view in own.items():
            view.copy_(state[name])

    def folded(self) -> CrossModalBridges:
        """A frozen copy for inference in which out_proj and the MLP's first linear are one: W = W1 Wo, b = W1 bo + b1.

        Equal up to rounding, a (dim, dim) product less for each visual token.  The copy has other state_dict keys, and train()
        raises a RuntimeError.
        """
        twin = copy.deepcopy(self).eval().requires_grad_(False)
        for side in twin.visual:
            side.fold()
        return twin

    def extra_repr(self) -> str:
        return (
            f"num_states={self.num_states}, num_tokens={self.num_tokens}, text_dim={self.text_dim}, "
            f"adaptive={self.adaptive}, text_norm={self.text_norm}, parity={self.parity!r}"
        )


class CrossModalBridge(CrossModalBridges):
    """One bridge by itself: `CrossModalBridges` with one, whose forward runs both sides.

        h2 = h1 + MLP(CrossAttention(LN(h1), concat_i((1 + w_i) o LN(f_i)) Wg + bg))

    Args:
        config: as for CrossModalBridges, without num_bridges.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__(1, **config)

    def forward(
        self, h1: Tensor, states: Tensor | Sequence[Tensor], key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """h2 (B, L, dim) from h1 (B, L, dim) and the text states, which are as in `encode_text`."""
        (text,) = self.encode_text(states, key_padding_mask)
        return self[0](h1, text)

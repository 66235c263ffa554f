"""Local convolution adapter in plain torch, forward and backward: the specification, the CPU path and the oracle of the tests.

For n (B, 1 + HW, K), whose first row of every sample is the class token's and whose others are the patches of an H x W grid,

    h  = relu(n W1^T + b1)
    u  = h_patch [A; R]^T               the two 1x1 convolutions as one product
    z1 = relu(BN(u_A; gamma_A, beta_A))
    t  = relu(BN(u_R; gamma_R, beta_R))
    v  = conv3x3(t; K)                  padded by 1
    z2 = relu(BN(v; gamma_K, beta_K))
    y  = h + [z1 | z2] for patches,     2 h for the class token
    loca = y W2^T + b2                  out = residual + g o (mlp + s loca),  or loca itself

BN(x; gamma, beta) = gamma xhat + beta with xhat = rstd (x - mean).  In training mean and rstd are those of the N = B H W
patches, so that the convolutions' biases a, r and k cancel; in eval mean is the running mean less the bias, and rstd that of
the running variance.

With dloca = g o dout and dmlp = dloca for a frozen g, and [dmean; drstd] the gradient of the statistics (None unless the
backward is differentiated), the backward computes h, u, t and v again, and

    dy  = s dloca W2            dW2 = s dloca^T y       db2 = s sum dloca
    dz  = dy o [z > 0]          dgamma = sum dz xhat    dbeta = sum dz              for each of z1, z2, t
    du  = gamma rstd (dz - dbeta / N - xhat dgamma / N) + (dmean - drstd rstd xhat rstd) / N,   without the N terms in eval
    dt  = conv3x3^T(dv; K)      dK  = sum over the grid of dv and shifted t
    dA  = du_A^T h_patch        dR  = du_R^T h_patch    da = sum du_A, which is 0 in training, and so for r and k
    dh  = (dy + du [A; R] for patches, 2 dy for the class token) o [h > 0]
    dW1 = dh^T n                db1 = sum dh            dn = dh W1

(Liu et al., "MaPPER", EMNLP 2024, section 3.3; Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithms 1 and 2.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Operands(NamedTuple):
    """The tensors of a call, or what belongs to each of them.

    n (B, 1 + HW, K); down_weight W1 (C, K), down_bias b1 (C,).  Of the convolutions point (A), reduce (R) and local (K) the
    weight as nn.Conv2d has it, the bias, and the batch norm's weight, bias and, in eval, running mean and variance; up_weight
    W2 (D, C), up_bias b2 (D,).  layer_scale g (D,), mlp and residual (B, 1 + HW, D) are all None or none is.
    """

    n: Tensor
    down_weight: Tensor
    down_bias: Tensor
    point_weight: Tensor
    point_bias: Tensor
    point_norm_weight: Tensor
    point_norm_bias: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    reduce_norm_weight: Tensor
    reduce_norm_bias: Tensor
    local_weight: Tensor
    local_bias: Tensor
    local_norm_weight: Tensor
    local_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    point_running_mean: Tensor | None
    point_running_var: Tensor | None
    reduce_running_mean: Tensor | None
    reduce_running_var: Tensor | None
    local_running_mean: Tensor | None
    local_running_var: Tensor | None
    layer_scale: Tensor | None
    mlp: Tensor | None
    residual: Tensor | None

    @property
    def training(self) -> bool:
        """Whether statistics are the batch's."""
        return self.point_running_mean is None

    @property
    def channels(self) -> tuple[int, int, int]:
        """How many each convolution has, in the order in which they share vectors: point, reduce, local."""
        return self.point_weight.shape[0], self.reduce_weight.shape[0], self.local_weight.shape[0]

    def vector(self, role: str) -> Tensor:
        """What all convolutions have of one role, such as "bias", as one vector in float32 (float64)."""
        parts = [getattr(self, f"{name}_{role}") for name in ("point", "reduce", "local")]
        return torch.cat(parts).to(wider(self.n.dtype))


NAMES = Operands._fields
TRAINED = NAMES[: NAMES.index("point_running_mean")]  # those with a gradient, to which mlp's adds


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and batch norms are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Hidden(NamedTuple):
    """What the forward goes through and the backward computes again: h (B, 1 + HW, C), u, t and v (B, HW, ...) in n's dtype.

    mean and rstd of every channel are vectors, and so is the variance, which is None where it was not measured.
    """

    h: Tensor
    u: Tensor
    t: Tensor
    v: Tensor
    mean: Tensor
    rstd: Tensor
    variance: Tensor | None


def forward(tensors: Sequence[Tensor | None], height: int, width: int, eps: float, scale: float) -> list[Tensor]:
    """[out, (mean, rstd)] and in training also [(m, v)]: out (B, 1 + HW, D) in the residual's dtype, or in n's without one.

    mean and rstd are vectors over the channels of point, reduce and local, together (2, channels).  m and v, likewise, are what
    running statistics move towards: the mean of what the convolutions give with their biases, and its unbiased variance.
    """
    call = Operands(*tensors)
    dtype, wide = call.n.dtype, wider(call.n.dtype)
    hidden = hidden_of(call, None, height, width, eps)
    out = F.linear(output_of(call, hidden), call.up_weight.to(dtype), call.up_bias.to(dtype))
    if call.residual is not None:
        out = call.residual + call.layer_scale.to(wide) * (call.mlp + scale * out.to(wide))
        out = out.to(call.residual.dtype)
    statistics = torch.stack((hidden.mean, hidden.rstd))
    if not call.training:
        return [out, statistics]
    count = hidden.u.shape[0] * height * width
    variance = hidden.variance * (count / (count - 1))
    return [out, statistics, torch.stack((hidden.mean + call.vector("bias"), variance))]


def save(tensors: Sequence[Tensor | None], outputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The tensors without the last two, then the statistics."""
    return [*tensors[:-2], None, None, outputs[1]]


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    height: int,
    width: int,
    eps: float,
    scale: float,
) -> list[Tensor]:
    """The gradients that `needs` marks, in the order of Operands; differentiable again.

    grads: of out, then of the statistics and of what running ones move towards, None unless the backward is differentiated.
    """
    *tensors, statistics = saved
    call, need = Operands(*tensors), Operands(*needs)
    dtype, wide = call.n.dtype, wider(call.n.dtype)
    dloca = grads[0] if call.layer_scale is None else grads[0] * call.layer_scale
    dloca = dloca.to(dtype)
    found = {"mlp": dloca}
    if any(needs[: len(TRAINED)]):
        hidden = hidden_of(call, statistics, height, width, eps)
        found["up_bias"] = scale * dloca.to(wide).sum((0, 1))
        if need.up_weight:
            found["up_weight"] = scale * (dloca.flatten(0, 1).t() @ output_of(call, hidden).flatten(0, 1))
        dy = scale * (dloca @ call.up_weight.to(dtype)).to(wide)
        dstatistics = grads[1] if call.training else None
        found |= through_convolutions(call, hidden, dy, dstatistics, height, width)
        dh = (found.pop("h") * (hidden.h > 0)).to(dtype)
        found["down_bias"] = dh.to(wide).sum((0, 1))
        if need.down_weight:
            found["down_weight"] = dh.flatten(0, 1).t() @ call.n.flatten(0, 1)
        if need.n:
            found["n"] = dh @ call.down_weight.to(dtype)
    own = call._replace(mlp=call.n)
    return [found[name].to(getattr(own, name).dtype) for name, needed in need._asdict().items() if needed]


def hidden_of(call: Operands, statistics: Tensor | None, height: int, width: int, eps: float) -> Hidden:
    """h, u, t, v and the statistics, which are the given ones in training if there are some."""
    dtype, wide = call.n.dtype, wider(call.n.dtype)
    point, reduce, _ = call.channels
    measured = call.training and statistics is None
    h = torch.relu(F.linear(call.n, call.down_weight.to(dtype), call.down_bias.to(dtype)))
    # of all rows, as leaving out the class tokens' would copy the others first
    u = F.linear(h, pair(call).to(dtype))[:, 1:]
    variance = None
    if measured:
        variance, mean = torch.var_mean(u.to(wide), (0, 1), correction=0)
        rstd = torch.rsqrt(variance + eps)
    else:
        mean, rstd = statistics if call.training else running_statistics(call, eps)
    some = slice(point, point + reduce)
    t = normalised(u[..., some], mean[some], rstd[some], call.reduce_norm_weight, call.reduce_norm_bias, wide)
    v = as_rows(F.conv2d(as_grid(t, height, width), call.local_weight.to(dtype), padding=1))
    if measured:
        own = torch.var_mean(v.to(wide), (0, 1), correction=0)
        variance, mean = (torch.cat(both) for both in zip((variance, mean), own))
        rstd = torch.rsqrt(variance + eps)
    return Hidden(h, u, t, v, mean, rstd, variance)


def running_statistics(call: Operands, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and rstd of every channel before its convolution's bias is added, by the running statistics."""
    return call.vector("running_mean") - call.vector("bias"), torch.rsqrt(call.vector("running_var") + eps)


def pair(call: Operands) -> Tensor:
    """[A; R], the weights of both 1x1 convolutions as one matrix."""
    return torch.cat((call.point_weight, call.reduce_weight)).flatten(1)


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, wide: torch.dtype) -> Tensor:
    """relu(BN(x; gamma, beta)), in x's dtype."""
    return torch.relu((x.to(wide) - mean) * (rstd * gamma.to(wide)) + beta.to(wide)).to(x.dtype)


def as_grid(rows: Tensor, height: int, width: int) -> Tensor:
    """(B, HW, channels) as (B, channels, H, W), channels last in memory."""
    return rows.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def as_rows(grid: Tensor) -> Tensor:
    """(B, channels, H, W) as (B, HW, channels)."""
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def output_of(call: Operands, hidden: Hidden) -> Tensor:
    """y, (B, 1 + HW, C)."""
    h, u, _, v, mean, rstd, _ = hidden
    point, _, local = call.channels
    wide = wider(h.dtype)
    z1 = normalised(u[..., :point], mean[:point], rstd[:point], call.point_norm_weight, call.point_norm_bias, wide)
    z2 = normalised(v, mean[-local:], rstd[-local:], call.local_norm_weight, call.local_norm_bias, wide)
    return h + torch.cat((h[:, :1], torch.cat((z1, z2), -1)), 1)


def through_convolutions(
    call: Operands, hidden: Hidden, dy: Tensor, dstatistics: Tensor | None, height: int, width: int
) -> dict[str, Tensor]:
    """The gradients of the convolutions' tensors, and as "h" that of h before its mask."""
    h, u, t, v, mean, rstd, _ = hidden
    dtype = h.dtype
    point, reduce, local = call.channels
    found = {}

    def through_norm(name: str, first: int, x: Tensor, dz: Tensor) -> Tensor:
        """The gradient of x (B, HW, channels), whose channels are those from `first` on, for dz of relu(BN(x))."""
        some = slice(first, first + x.shape[-1])
        gamma, beta = (getattr(call, f"{name}_{role}").to(dy.dtype) for role in ("norm_weight", "norm_bias"))
        xhat = (x.to(dy.dtype) - mean[some]) * rstd[some]
        dz = dz * (gamma * xhat + beta > 0)
        dgamma, dbeta = (dz * xhat).sum((0, 1)), dz.sum((0, 1))
        found[f"{name}_norm_weight"], found[f"{name}_norm_bias"] = dgamma, dbeta
        if not call.training:
            found[f"{name}_bias"] = gamma * rstd[some] * dbeta
            return (gamma * rstd[some] * dz).to(dtype)
        found[f"{name}_bias"] = torch.zeros_like(dbeta)
        count = x.shape[0] * height * width
        dx = gamma * rstd[some] * (dz - dbeta / count - xhat * (dgamma / count))
        if dstatistics is not None:
            dmean, drstd = dstatistics[:, some]
            dx = dx + (dmean - drstd * rstd[some] * rstd[some] * xhat) / count
        return dx.to(dtype)

    patches = dy[:, 1:]
    dv = as_grid(through_norm("local", point + reduce, v, patches[..., point:]), height, width)
    grid, kernel = as_grid(t, height, width), call.local_weight.to(dtype)
    dt = as_rows(torch.nn.grad.conv2d_input(grid.shape, kernel, dv, padding=1))
    found["local_weight"] = torch.nn.grad.conv2d_weight(grid, kernel.shape, dv, padding=1)
    du = torch.cat(
        (
            through_norm("point", 0, u[..., :point], patches[..., :point]),
            through_norm("reduce", point, u[..., point:], dt.to(dy.dtype)),
        ),
        -1,
    )
    weights = (du.flatten(0, 1).t() @ h[:, 1:].flatten(0, 1))[..., None, None]
    found["point_weight"], found["reduce_weight"] = weights.split((point, reduce))
    found["h"] = dy + torch.cat((dy[:, :1], (du @ pair(call).to(dtype)).to(dy.dtype)), 1)
    return found

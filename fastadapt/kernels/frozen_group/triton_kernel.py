"""The elementwise kernels around a group of frozen linears; reference.py has the equations."""

from __future__ import annotations

import triton
import triton.language as tl

from fastadapt.core.device_math import activate, activation_slope, keep_tile


@triton.jit
def curve(z, KIND: tl.constexpr):
    """An activation: the shared ones, and GELU's tanh approximation, which is z sigmoid(2 u)."""
    if KIND == "gelu_tanh":
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        return activate(z, KIND)


@triton.jit
def slope(z, KIND: tl.constexpr):
    """The derivative of `curve`."""
    if KIND == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return gate + z * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        return activation_slope(z, KIND)


@triton.jit
def weighted(values, scale, seed, row, first_column, column, column_ok, threshold, inv_keep, COLUMNS: tl.constexpr):
    """c o m(values) / (1 - p) of a float32 tile."""
    if seed is not None:
        keep = keep_tile(tl.load(seed), row, first_column, 0, threshold, COLUMNS)
        values = tl.where(keep, values, 0.0) * inv_keep
    if scale is not None:
        values *= tl.load(scale + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def normal(s, ok, width, eps):
    """xhat of whole rows, zero in the columns outside, and 1 / deviation of each."""
    mean = tl.sum(s, 1) / width
    centred = tl.where(ok, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def affine(xhat, weight, bias, column, column_ok):
    """xhat o gamma + beta."""
    if weight is not None:
        xhat *= tl.load(weight + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        xhat += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return xhat


@triton.jit
def prologue_kernel(
    x, delta, scale, seed, weight, bias, total, normed, rows, width, eps, threshold, inv_keep,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of s, where there is a branch, and of n, where it is wanted."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    column_ok = column < width
    ok = (row < rows)[:, None] & column_ok[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    s = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
    if delta is not None:
        branch = tl.load(delta + place, mask=ok, other=0.0).to(tl.float32)
        s += weighted(branch, scale, seed, row, first_column, column, column_ok, threshold, inv_keep, COLUMNS)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=ok)
        s = rounded.to(tl.float32)  # what the backward will read
    if normed is not None:
        if KIND == "layer_norm":
            xhat, _ = normal(s, ok, width, eps)
            n = affine(xhat, weight, bias, column, column_ok)
        else:
            n = curve(s, KIND)
        tl.store(normed + place, n.to(normed.dtype.element_ty), mask=ok)


@triton.jit
def prologue_grad_kernel(
    source, scale, seed, weight, bias, grad_normed, grad_other, grad_total, normed, grad_x, grad_delta, rows, width, eps,
    threshold, inv_keep, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of ds', of dbranch where it is another, and of n once more where it is wanted."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    column_ok = column < width
    ok = (row < rows)[:, None] & column_ok[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    if grad_normed is not None:
        grad += tl.load(grad_normed + place, mask=ok, other=0.0).to(tl.float32)
    if grad_other is not None:
        grad += tl.load(grad_other + place, mask=ok, other=0.0).to(tl.float32)
    if KIND != "identity":
        s = tl.load(source + place, mask=ok, other=0.0).to(tl.float32)
        if KIND == "layer_norm":
            xhat, rstd = normal(s, ok, width, eps)
            if normed is not None:
                n = affine(xhat, weight, bias, column, column_ok)
                tl.store(normed + place, n.to(normed.dtype.element_ty), mask=ok)
            if weight is not None:
                grad *= tl.load(weight + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
            mean = tl.sum(grad, 1) / width
            mean_xhat = tl.sum(grad * xhat, 1) / width
            grad = rstd[:, None] * (grad - mean[:, None] - xhat * mean_xhat[:, None])
        else:
            if normed is not None:
                tl.store(normed + place, curve(s, KIND).to(normed.dtype.element_ty), mask=ok)
            grad *= slope(s, KIND)
    if grad_total is not None:
        grad += tl.load(grad_total + place, mask=ok, other=0.0).to(tl.float32)
    if grad_x is not None:
        tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=ok)
    if grad_delta is not None:
        grad = weighted(grad, scale, seed, row, first_column, column, column_ok, threshold, inv_keep, COLUMNS)
        tl.store(grad_delta + place, grad.to(grad_delta.dtype.element_ty), mask=ok)

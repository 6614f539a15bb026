"""What several kernels do with a tile once it is in registers; each body is written once.

Device functions: called within kernels, never launched.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalization(p_mean, p_var, p_gamma, p_beta, eps, o_c, m_c):
    """Mean, rstd, scale and shift of channels o_c, each [BC]; masked ones normalise to zero."""
    b_mean = tl.load(p_mean + o_c, m_c, 0.0)
    b_rstd = tl.rsqrt(tl.load(p_var + o_c, m_c, 1.0) + eps)
    b_scale = tl.load(p_gamma + o_c, m_c, 0.0).to(tl.float32) * b_rstd
    b_shift = tl.load(p_beta + o_c, m_c, 0.0).to(tl.float32) - b_mean * b_scale
    return b_mean, b_rstd, b_scale, b_shift


@triton.jit
def normalized(b_x, b_scale, b_shift):
    """The norm's output before its ReLU, [BP, BC] float32."""
    return b_x.to(tl.float32) * b_scale[None, :] + b_shift[None, :]


@triton.jit
def rectified(b_y):
    # written so that a NaN stays one, as in torch
    return tl.where(b_y <= 0, 0.0, b_y)


@triton.jit
def backward_terms(b_x, b_dz, b_mean, b_scale, b_shift):
    """Dz [z > 0] and its product with x - mean: what S and, but for rstd, T are sums of.

    D takes the first times scale. T is multiplied by rstd when it is stored: one vector less is
    kept in registers.
    """
    b_g = tl.where(normalized(b_x, b_scale, b_shift) <= 0, 0.0, b_dz)
    return b_g, b_g * (b_x.to(tl.float32) - b_mean[None, :])


@triton.jit
def column_statistics(b_out, m_out, n_rows):
    """Mean and sum of squared deviations of a tile's n_rows rows, each [BC]."""
    b_out = b_out.to(tl.float32)
    b_mean = tl.sum(tl.where(m_out, b_out, 0.0), 0) / n_rows
    b_dev = tl.where(m_out, b_out - b_mean[None, :], 0.0)
    return b_mean, tl.sum(b_dev * b_dev, 0)


@triton.jit
def store_sums(p_part, i_s, C, o_c, m_c, b_s, b_t, b_rstd):
    """One range's S and T as the rows 2 i_s and 2 i_s + 1 of the partial results.

    ``b_t`` is that of :func:`backward_terms`, without rstd.
    """
    p_part += 2 * i_s * C
    tl.store(p_part + o_c, b_s, m_c)
    tl.store(p_part + C + o_c, b_t * b_rstd, m_c)


@triton.jit
def store_columns(p_tile, b_values, m_p, o_c, C):
    """Store [BP, BC] where o_c < C, at full width wherever the whole tile is: a mask along the
    columns would make every store as narrow as C's last ones.
    """
    b_values = b_values.to(p_tile.dtype.element_ty)
    if tl.max(o_c, 0) < C:
        tl.store(p_tile, b_values, m_p[:, None])
    else:
        tl.store(p_tile, b_values, m_p[:, None] & (o_c < C)[None, :])


@triton.jit
def columns_loaded(o_c, C, PAD: tl.constexpr):
    """Which columns to load: those below C, and with PAD up to its multiple; see layouts.py."""
    return o_c < (C + (PAD - 1)) // PAD * PAD

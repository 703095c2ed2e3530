"""What lies between a layer's matrices: norms, rotary positions, gated activations.

Each rounds where transformers' modules round, operation by operation. By the compiled kernels where
they are there and the tensors are of their kind, else by torch. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels import native
from engine.kernels.native import DTYPES

_ACTIVATIONS: Final[dict[str, tuple[int, Callable[[Tensor], Tensor]]]] = {
    "silu": (0, functional.silu),
    "gelu": (1, functional.gelu),
    "gelu_tanh": (2, partial(functional.gelu, approximate="tanh")),
    "relu": (3, functional.relu),
}


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight). arXiv:1910.07467.

    Without an offset it is rounded before the weight is applied, as Llama's is; with one, after.

    Args:
        x: (..., size), of any strides but the last.
        weight: (size,).
        residual: like x; becomes x + residual, which is then what is normed.
    Returns:
        like x, contiguous.
    """
    if (dtype := _kernel_dtype(x, weight)) is None:
        return _rms_norm(x, weight, eps, offset, residual)
    return _norm(x, weight, residual, dtype, eps, offset)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """(x - mean(x)) / deviation(x) * weight + bias, rounded once. arXiv:1607.06450.

    Always torch's own, which is quicker than a kernel of ours was, from one row to many.
    Args as for `rms_norm`; both weight and bias may be missing.
    """
    if residual is not None:
        x = residual.add_(x)
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rope(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    """Turn queries and keys to their positions, in place. arXiv:2104.09864, section 3.2.

    Number i of a head is turned together with number i + size / 2, as transformers'
    `rotate_half` has it; what of a head lies beyond `size` stays as it is.

    Args:
        query: (tokens, heads, head_size), of any strides but the last.
        key: (tokens, kv_heads, head_size), the same; None: there is none.
        cos: (tokens, size), size <= head_size, of the same type or float32, like
        sin: the same.
    """
    dtype = _kernel_dtype(query, query)
    tables = DTYPES.get(cos.dtype)
    if (
        dtype is None
        or tables not in (dtype, DTYPES[torch.float32])
        or cos.stride() != sin.stride()
    ):
        _rope(query, cos, sin)
        if key is not None:
            _rope(key, cos, sin)
        return
    if cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    rows, size = cos.shape
    at, sin_at, table_stride = cos.data_ptr(), sin.data_ptr(), cos.stride(0)
    for heads in (query, key):
        if heads is None:
            continue
        row, head, inner = heads.stride()
        if inner != 1:
            _rope(heads, cos, sin)
            continue
        if heads.shape[0] != rows or heads.shape[2] < size:
            raise ValueError(f"tables of {rows} x {size} do not fit heads of {tuple(heads.shape)}")
        native.library.rope(
            heads.data_ptr(), at, sin_at, row, head, table_stride, rows, heads.shape[1], size,
            dtype, tables,
        )  # fmt: skip


def gated(kind: str, both: Tensor, up: Tensor | None = None) -> Tensor:
    """act(gate) * up. arXiv:2002.05202.

    Args:
        kind: "silu", "gelu", "gelu_tanh" or "relu".
        both: (rows, 2 * size), gate and up side by side; or (rows, size), the gate, beside
        up: (rows, size).
    Returns:
        (rows, size), contiguous.
    """
    number, function = _ACTIVATIONS[kind]
    rows, size = both.shape
    dtype = _kernel_dtype(both, both if up is None else up)
    if up is None:
        size //= 2
    if dtype is None or both.stride(1) != 1 or (up is not None and up.stride(1) != 1):
        gate, other = (both[:, :size], both[:, size:]) if up is None else (both, up)
        return function(gate) * other
    out = both.new_empty(rows, size)
    stride, at = both.stride(0), both.data_ptr()
    if up is None:
        other_at, other_stride = at + size * both.element_size(), stride
    else:
        other_at, other_stride = up.data_ptr(), up.stride(0)
    native.library.gated(
        at, other_at, out.data_ptr(), stride, other_stride, size, rows, size, dtype, number
    )
    return out


def _kernel_dtype(x: Tensor, other: Tensor) -> int | None:
    """The kernels' name for the type that both have; None where torch has to do it."""
    dtype = x.dtype
    if native.library is None or not x.is_cpu or other.dtype != dtype:
        return None
    return DTYPES.get(dtype)


def _norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, dtype: int, eps: float, offset: float
) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    if residual is not None and not (x.is_contiguous() and residual.is_contiguous()):
        x = residual.add_(x)
        residual = None
    size = x.shape[-1]
    if weight.shape != (size,):
        raise ValueError(f"the norm's weights do not fit rows of {size}")
    out = torch.empty(x.shape, dtype=x.dtype)
    rows = out.numel() // size
    # Heads of rows that have something else between them: two strides.
    inner, inner_stride, stride = 1, 0, size
    if x.ndim == 3 and not x.is_contiguous():
        inner, inner_stride, stride = x.shape[1], x.stride(1), x.stride(0)
    elif x.ndim == 2:
        stride = x.stride(0)
    elif not x.is_contiguous():
        x = x.contiguous()
    native.library.norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        stride,
        inner,
        inner_stride,
        rows,
        size,
        dtype,
        not offset,
        eps,
        offset,
    )
    return out


# --- by torch --------------------------------------------------------------------------------


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> Tensor:
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * (offset + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype)


def _rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    size = cos.shape[-1]
    turned = heads[..., :size]
    crossed = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), dim=-1)
    turned.copy_(turned * cos[:, None] + crossed * sin[:, None])

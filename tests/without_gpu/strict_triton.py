"""A plugin of pytest: Triton's interpreter with what a GPU does otherwise.

- Programs run in an order that is drawn anew at each launch; the interpreter's own is ascending, which hides what one
  program takes from another.
- Masked-off lanes of a load without ``other`` hold NaN or a large integer, not zero.
- Loads and stores touch no byte outside of the storage of a launch's tensors, or the launch ends with a sentence.
- Products of float32 are summed one after another by fused multiply-adds, as CUDA cores do; NumPy's are more exact.
- exp is that of CUDA's fast path: 2 to the power of a rounded x log2(e), by an ex2 that is off by two units at most;
  exp2 is that ex2.
- A quotient is the product with a reciprocal, which is off by a unit where that is no power of two; div_rn divides.
- float32 is rounded to the nearest bfloat16; the interpreter cuts its last bits off, which shifts long sums.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_LOG2_E = np.float32(1.4426950408889634)
_EX2_ERROR = 2.0**-22.5
_TINY = np.finfo(np.float32).tiny

_draws = np.random.default_rng(0)
_order: np.ndarray = np.zeros(1, np.int64)
_grid: tuple[int, int, int] = (1, 1, 1)
_storages: list[tuple[int, int]] = []

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_set_grid_dim, _set_grid_idx = _Builder.set_grid_dim, _Builder.set_grid_idx
_masked_load, _masked_store = _Builder.create_masked_load, _Builder.create_masked_store
_dot, _exp, _exp2, _cast = _Builder.create_dot, _Builder.create_exp, _Builder.create_exp2, _Builder.cast_impl
_fdiv = _Builder.create_fdiv
_arguments = interpreter.GridExecutor._init_args_hst


def set_grid_dim(self: Any, x: int, y: int, z: int) -> None:
    global _order, _grid
    _grid, _order = (x, y, z), _draws.permutation(x * y * z)
    _set_grid_dim(self, x, y, z)


def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
    at = _order[(x * _grid[1] + y) * _grid[2] + z]
    _set_grid_idx(self, *map(int, np.unravel_index(at, _grid)))


def arguments(self: Any, given: Any, named: Any) -> Any:
    host, named_host = _arguments(self, given, named)
    tensors = [a for a in (*host, *named_host.values()) if hasattr(a, "untyped_storage")]
    _storages[:] = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)})
    return host, named_host


def _check(pointers: Any, mask: Any, what: str) -> None:
    first = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
    last = first + max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    inside = np.zeros(first.shape, bool)
    for begin, end in _storages:
        inside |= (first >= begin) & (last <= end)
    if not inside.all():
        raise IndexError(f"a {what} lies outside of every tensor of the launch")


def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
    _check(pointers, mask, "load")
    if other is None:
        kind = pointers.get_element_ty()
        data = np.zeros_like(pointers.data, dtype=interpreter._get_np_dtype(kind))
        # bfloat16 is held as its bits.
        data[...] = np.nan if data.dtype.kind == "f" else np.iinfo(data.dtype).max if data.dtype.kind in "iu" else True
        other = _Handle(data, kind)
    return _masked_load(self, pointers, mask, other, *options)


def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
    _check(pointers, mask, "store")
    return _masked_store(self, pointers, value, mask, *options)


def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
        return _dot(self, a, b, d, *options)
    left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
    for k in range(left.shape[-1]):
        total = (left[..., k : k + 1] * right[..., k : k + 1, :] + total).astype(np.float32)
    return _Handle(total, d.dtype.scalar)


def create_exp(self: Any, x: Any) -> Any:
    return _Handle(_ex2(x.data * _LOG2_E), x.dtype.scalar) if x.data.dtype == np.float32 else _exp(self, x)


def create_exp2(self: Any, x: Any) -> Any:
    return _Handle(_ex2(x.data), x.dtype.scalar) if x.data.dtype == np.float32 else _exp2(self, x)


def create_fdiv(self: Any, x: Any, y: Any) -> Any:
    if not x.data.dtype == y.data.dtype == np.float32:
        return _fdiv(self, x, y)
    with np.errstate(all="ignore"):
        reciprocal = np.float32(1) / y.data
        mantissa, _ = np.frexp(reciprocal)
        # Up or down by the number's last bit, as that of _ex2.
        odd = np.ascontiguousarray(y.data).view(np.int32) & 1
        off = np.where(odd, np.nextafter(reciprocal, np.inf), np.nextafter(reciprocal, 0)).astype(np.float32)
        exact = (np.abs(mantissa) == 0.5) | ~np.isfinite(reciprocal) | (reciprocal == 0)
        return _Handle(x.data * np.where(exact, reciprocal, off), x.dtype.scalar)


def cast_impl(self: Any, x: Any, kind: Any) -> Any:
    if (x.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, x, kind)
    bits = np.ascontiguousarray(x.data).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return _Handle(np.where(np.isnan(x.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _ex2(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        # Up or down by the number's last bit: the same number gives the same bits.
        error = np.where(np.ascontiguousarray(x).view(np.int32) & 1, _EX2_ERROR, -_EX2_ERROR)
        result = (np.exp2(x.astype(np.float64)) * (1 + error)).astype(np.float32)
    return np.where(x == 0, np.float32(1), np.where(np.abs(result) < _TINY, np.float32(0), result))


_STRICT = (
    "set_grid_dim",
    "set_grid_idx",
    "create_masked_load",
    "create_masked_store",
    "create_dot",
    "create_exp",
    "create_exp2",
    "create_fdiv",
    "cast_impl",
)
for _name in _STRICT:
    setattr(_Builder, _name, globals()[_name])
interpreter.GridExecutor._init_args_hst = arguments

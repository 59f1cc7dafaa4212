"""Tensors of any framework: borrowed for a call, and made for its results.

torch is never imported here: a tensor of its can only come from a program that has it loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from flex_prefill import _core

if TYPE_CHECKING:
    import torch

# torch.Tensor, numpy.ndarray, jax.Array, or anything else with __dlpack__ and
# __array_namespace__.
Tensor: TypeAlias = Any

_DLPACK_CPU, _DLPACK_CUDA_HOST = 1, 3


def is_torch(tensor: Tensor) -> TypeGuard[torch.Tensor]:
    torch_module = sys.modules.get("torch")
    return torch_module is not None and isinstance(tensor, torch_module.Tensor)


def _check_device(tensor: Tensor, name: str) -> None:
    """Refuses what is not in CPU memory, before any export that would copy or wait."""
    if is_torch(tensor):
        on_cpu, place = tensor.device.type == "cpu", str(tensor.device)
    elif hasattr(tensor, "__dlpack_device__"):
        kind, number = tensor.__dlpack_device__()
        on_cpu = int(kind) in (_DLPACK_CPU, _DLPACK_CUDA_HOST)
        place = f"{getattr(kind, 'name', f'DLPack device type {int(kind)}')}:{number}"
    else:
        return
    if not on_cpu:
        raise _core.UnsupportedError(
            f"{name}: expected a tensor in CPU memory, got one on {place} "
            "(the CUDA backend is not in this build)"
        )


def _check_torch(tensor: torch.Tensor, name: str) -> None:
    """Refuses what torch would export with an error of its own, or wrongly."""
    import torch

    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name}: expected element type float32, float16 or bfloat16, got {tensor.dtype}"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    if tensor.is_neg():
        raise ValueError(f"{name}: expected plain values, got a negated view (resolve_neg() it)")


def borrow(tensor: Tensor, name: str, *, writable: bool = False) -> _core.Tensor:
    """The tensor's memory where it is, any strides; ``name`` is for the errors."""
    _check_device(tensor, name)
    if is_torch(tensor):
        _check_torch(tensor, name)
        return _core.Tensor(tensor.detach(), name, writable)
    if isinstance(tensor, np.ndarray) and tensor.dtype.name == "bfloat16":  # of ml_dtypes
        return _core.Tensor(tensor.view(np.uint16), name, writable, bfloat16_bits=True)
    return _core.Tensor(tensor, name, writable)


def int32_array(values: Tensor | Sequence[Any] | None, name: str, rank: int) -> Any:
    """Lengths or page numbers, from any tensor or list of integers, as contiguous int32."""
    if values is None:
        return None
    _check_device(values, name)
    array: npt.NDArray[Any] = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != rank:
        raise ValueError(f"{name}: expected rank {rank}, got rank {array.ndim}")
    limits = np.iinfo(np.int32)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name}: expected numbers that fit int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def make_output(
    shape: tuple[int, ...], q: Tensor, core_q: _core.Tensor, *, float32: bool = False
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Uninitialised memory of q's element type, or float32, and a function that makes of it, once
    it is written, a tensor of q's framework."""
    if is_torch(q):
        import torch

        out = torch.empty(shape, dtype=torch.float32 if float32 else q.dtype)
        return out, lambda: out
    if isinstance(q, np.ndarray) or not hasattr(q, "__array_namespace__"):
        array: npt.NDArray[Any] = np.empty(shape, np.float32 if float32 else q.dtype)
        return array, lambda: array
    buffer = _core.empty_like_type(shape, core_q, float32)
    return buffer, lambda: q.__array_namespace__().from_dlpack(buffer)

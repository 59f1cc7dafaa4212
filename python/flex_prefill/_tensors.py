"""Tensors of any framework: borrowed for a call, and made for its results.

torch and CuPy are never imported here: a tensor of theirs can only come from a program that has
them loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from flex_prefill import _core

if TYPE_CHECKING:
    import torch

# torch.Tensor, numpy.ndarray, cupy.ndarray, jax.Array, or anything else with __dlpack__ and
# __array_namespace__.
Tensor: TypeAlias = Any

# DLPack's device types: memory of the host, pinned or not, and of CUDA, managed or not.
_DLPACK_KINDS: dict[int, Literal["cpu", "cuda"]] = {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda"}
_LEGACY_DEFAULT_STREAM = 1  # as DLPack and the CUDA runtime number it


class Device(NamedTuple):
    """Where a tensor lies. ``number``: of the GPU; 0 for CPU memory."""

    kind: Literal["cpu", "cuda"]
    number: int

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.number}"


CPU = Device("cpu", 0)


def is_torch(tensor: Tensor) -> TypeGuard[torch.Tensor]:
    torch_module = sys.modules.get("torch")
    return torch_module is not None and isinstance(tensor, torch_module.Tensor)


def is_cupy(tensor: Tensor) -> bool:
    cupy_module = sys.modules.get("cupy")
    return cupy_module is not None and isinstance(tensor, cupy_module.ndarray)


def device_of(tensor: Tensor, name: str) -> Device:
    """Where ``tensor`` lies; what is no tensor, a list of lengths say, is on the CPU.

    Raises UnsupportedError for devices that are neither the CPU nor a CUDA GPU.
    """
    kind: str | None
    if is_torch(tensor):
        kind, number, place = tensor.device.type, tensor.device.index, str(tensor.device)
    elif hasattr(tensor, "__dlpack_device__"):
        code, number = tensor.__dlpack_device__()
        kind = _DLPACK_KINDS.get(int(code))
        place = f"{getattr(code, 'name', f'DLPack device type {int(code)}')}:{number}"
    else:
        return CPU
    if kind == "cpu":
        return CPU
    if kind != "cuda":
        raise _core.UnsupportedError(
            f"{name}: expected a tensor in CPU or CUDA memory, got one on {place}"
        )
    return Device("cuda", int(number or 0))


def has_stream(tensor: Tensor) -> bool:
    """Whether the tensor's framework has a current stream, on which a GPU call leaves results."""
    return is_torch(tensor) or is_cupy(tensor)


def check_cuda(name: str, device: Device) -> None:
    """Refuses a tensor on a GPU where this build has no backend for it."""
    if device.kind == "cuda" and not _core.CUDA_BUILT:
        raise _core.UnsupportedError(
            f"{name}: expected a tensor in CPU memory, got one on {device} (this build has no CUDA "
            "backend: install where nvcc is found, or with "
            "`pip install . --config-settings=cmake.define.FLEXPREFILL_CUDA=ON`)"
        )


def current_stream(like: Tensor, device: Device) -> int:
    """The stream that ``like``'s framework works on now, as a number; 0 on the CPU.

    Frameworks that have no current stream (JAX) are met on the legacy default stream.
    """
    if device.kind == "cpu":
        return 0
    if is_torch(like):
        import torch

        return int(torch.cuda.current_stream(like.device).cuda_stream)
    if is_cupy(like):
        return int(sys.modules["cupy"].cuda.get_current_stream(device.number).ptr)
    return _LEGACY_DEFAULT_STREAM


def finish_stream(like: Tensor, device: Device, stream: int) -> None:
    """Waits for results whose framework does not know the stream that they were written on."""
    if device.kind == "cuda" and not has_stream(like):
        _core.wait_for_stream(device.number, stream)


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


def exported(tensor: Tensor, stream: int) -> Any:
    """A DLPack capsule of device memory, ready on ``stream``; nothing waits."""
    if is_torch(tensor):
        import torch

        # Not __dlpack__, which would bring another stream into a capture.
        return torch.to_dlpack(tensor.detach())  # type: ignore[attr-defined]
    return tensor.__dlpack__(stream=stream or _LEGACY_DEFAULT_STREAM)


def borrow(
    tensor: Tensor, name: str, device: Device = CPU, stream: int = 0, *, writable: bool = False
) -> _core.Tensor:
    """The tensor's memory where it is, any strides; ``name`` is for the errors.

    ``device``: where the call runs; ValueError for a tensor that lies elsewhere.
    """
    check_device(tensor, name, device)
    if is_torch(tensor):
        _check_torch(tensor, name)
    if device.kind == "cuda":
        if str(tensor.dtype).removeprefix("torch.") == "float32":
            raise _core.UnsupportedError(
                f"{name}: expected bfloat16 or float16, which the CUDA backends compute, got "
                "float32 (convert it, or take torch.nn.functional.scaled_dot_product_attention)"
            )
        return _core.Tensor(exported(tensor, stream), name)
    if is_torch(tensor):
        return _core.Tensor(tensor.detach(), name, writable)
    if isinstance(tensor, np.ndarray) and tensor.dtype.name == "bfloat16":  # of ml_dtypes
        return _core.Tensor(tensor.view(np.uint16), name, writable, bfloat16_bits=True)
    return _core.Tensor(tensor, name, writable)


def check_device(tensor: Tensor, name: str, device: Device) -> None:
    """Refuses a tensor that does not lie where the call runs."""
    place = device_of(tensor, name)
    if place != device:
        raise ValueError(f"{name}: expected a tensor on {device} as q is, got one on {place}")


def int32_array(values: Tensor | Sequence[Any] | None, name: str, rank: int) -> Any:
    """Lengths or page numbers, from any tensor or list of integers, as contiguous int32."""
    if values is None:
        return None
    if (place := device_of(values, name)).kind != "cpu":
        raise ValueError(
            f"{name}: expected lengths on the CPU, which plans the call, got a tensor on {place} "
            "(move it there yourself: that waits for the GPU)"
        )
    array: npt.NDArray[Any] = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != rank:
        raise ValueError(f"{name}: expected rank {rank}, got rank {array.ndim}")
    limits = np.iinfo(np.int32)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name}: expected numbers that fit int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def page_numbers(table: Tensor | None, device: Device, stream: int) -> Any:
    """The page table for a call on ``device``: device memory stays where it is."""
    if table is None or device.kind == "cpu":
        return int32_array(table, "page_table", 2)
    check_device(table, "page_table", device)
    if str(table.dtype).removeprefix("torch.") != "int32":
        raise ValueError(f"page_table: expected int32 in CUDA memory, got {table.dtype}")
    if len(table.shape) != 2:
        raise ValueError(f"page_table: expected rank 2, got rank {len(table.shape)}")
    return exported(table, stream)


def make_empty(
    like: Tensor,
    shape: Sequence[int],
    dtype: Literal["like", "float32", "int32", "int64", "uint8"] = "like",
) -> Tensor:
    """Uninitialised memory of ``like``'s framework, beside it on its GPU."""
    if is_torch(like):
        import torch

        kind = like.dtype if dtype == "like" else getattr(torch, dtype)
        return torch.empty(tuple(shape), dtype=kind, device=like.device)
    kind = like.dtype if dtype == "like" else dtype
    if is_cupy(like):
        with like.device:
            return sys.modules["cupy"].empty(tuple(shape), dtype=kind)
    return like.__array_namespace__().empty(tuple(shape), dtype=kind, device=like.device)


def to_host(tensor: Tensor) -> npt.NDArray[Any]:
    """A copy of device memory as a NumPy array; waits for what writes it."""
    if is_torch(tensor):
        return tensor.cpu().numpy()
    return tensor.get() if is_cupy(tensor) else np.asarray(tensor)


def make_output(
    shape: tuple[int, ...], q: Tensor, core_q: _core.Tensor, *, float32: bool = False
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Uninitialised memory of q's element type, or float32, and a function that makes of it, once
    it is written, a tensor of q's framework."""
    if is_torch(q) or core_q.on_cuda:
        out = make_empty(q, shape, "float32" if float32 else "like")
        return out, lambda: out
    if isinstance(q, np.ndarray) or not hasattr(q, "__array_namespace__"):
        array: npt.NDArray[Any] = np.empty(shape, np.float32 if float32 else q.dtype)
        return array, lambda: array
    buffer = _core.empty_like_type(shape, core_q, float32)
    return buffer, lambda: q.__array_namespace__().from_dlpack(buffer)

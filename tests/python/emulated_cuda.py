"""The Python side of CUDA calls without a GPU: torch's tensors in the memory of the emulator.

    python emulated_cuda.py LIBRARY

runs in a process of its own (test_cuda_emulated.py starts it), with a flex_prefill whose extension
is built for the emulator (tests/cuda_emulator); LIBRARY is the emulator's. The host cannot touch
that memory, so a tensor here only has an address there, and is copied in and out by cudaMemcpy.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import flex_prefill as fp
import numpy as np
import pytest
import torch
from flex_prefill import _call, _tensors, attention, block_index

runtime = ctypes.CDLL(sys.argv[1])
runtime.cudaMalloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t]
runtime.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
memory: list[tuple[int, int]] = []
empty_on_cpu = _tensors.make_empty


def on_device(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and any(
        start <= tensor.data_ptr() < end for start, end in memory
    )


def empty_there(like: torch.Tensor, shape: Any, dtype: str = "like") -> torch.Tensor:
    kind = like.dtype if dtype == "like" else getattr(torch, dtype)
    count = int(np.prod(shape))
    size = max(count * torch.empty(0, dtype=kind).element_size(), 16)
    pointer = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(pointer), size) == 0
    assert pointer.value is not None
    memory.append((pointer.value, pointer.value + size))
    data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer.value))
    return torch.from_numpy(data).view(kind)[:count].view(*shape)


def make_empty(like: torch.Tensor, shape: Any, dtype: Any = "like") -> torch.Tensor:
    return (empty_there if on_device(like) else empty_on_cpu)(like, shape, dtype)


def device_of(tensor: Any, name: str) -> _tensors.Device:
    return _tensors.Device("cuda", 0) if on_device(tensor) else _tensors.CPU


def there(tensor: torch.Tensor) -> torch.Tensor:
    copy = empty_there(tensor, tuple(tensor.shape))
    assert runtime.cudaMemcpy(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes, 1) == 0
    return copy


def here(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    assert runtime.cudaMemcpy(copy.data_ptr(), tensor.data_ptr(), copy.nbytes, 2) == 0
    return copy


REPLACED = {
    "device_of": device_of,
    "make_empty": make_empty,
    "current_stream": lambda like, device: 0,
    "to_host": lambda tensor: here(tensor).numpy(),
}
for module in (_tensors, _call, attention, block_index):
    for name, function in REPLACED.items():
        if hasattr(module, name):
            setattr(module, name, function)

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


S, B = 192, {"block_size": 32}
CPU = [
    x.half()
    for x in (
        normal(1, S, 4, 32) + 2 * normal(1, 1, 4, 32),
        normal(1, S, 2, 32),
        normal(1, S, 2, 32),
    )
]
GPU = [there(x) for x in CPU]
PATTERN = fp.FlexPrefill(gamma=0.8, min_budget=32)
HEAD = fp.MInferenceHead
PATTERNS = [
    PATTERN,
    fp.StreamingLlm(20, 50),
    fp.Dense(),
    fp.XAttention(8, 0.6),
    fp.FlashPrefill(0.8, 0, 32, 32),
    fp.FlashPrefill(0.8, 0, 32, 32, mean_correction=False),
    fp.MInference(
        [
            HEAD("a_shape", 20, 50),
            HEAD("vertical_slash", 32, 64),
            HEAD("block_sparse", 64, 0),
            HEAD("block_sparse", 32, 0),
        ]
    ),
]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert on_device(got)
    torch.testing.assert_close(here(got), expected, rtol=4e-3, atol=4e-3)


def check_attend() -> None:
    for got, expected in zip(
        fp.attend(*GPU, return_lse=True, **B), fp.attend(*CPU, return_lse=True, **B), strict=True
    ):
        close(got, expected)
    index = fp.select(*CPU[:2], PATTERN, **B)
    expected = fp.attend(*CPU, index, **B)
    close(fp.attend(*GPU, index, **B), expected)
    rows = (there(torch.from_numpy(np.array(x))) for x in (index.indptr, index.indices))
    on_gpu = fp.BlockIndex(*rows, index.sequences, 4, 32)
    assert on_gpu.device == "cuda:0"
    close(fp.attend(*GPU, on_gpu, **B), expected)
    assert on_gpu == index
    assert on_gpu.cpu().device == "cpu"
    shorter = [x[:, :100] for x in GPU]
    with pytest.raises(ValueError, match="index: expected sequences"):
        fp.attend(*shorter, on_gpu, **B)


def check_select() -> None:
    for pattern in PATTERNS:
        index, audit = fp.select(*GPU[:2], pattern, audit=True, **B)
        expected, expected_audit = fp.select(*CPU[:2], pattern, audit=True, **B)
        assert index == expected, pattern
        for field in ("global_window", "local_window", "mean_correction"):
            assert getattr(index, field) == getattr(expected, field), (pattern, field)
        np.testing.assert_array_equal(audit.pattern, expected_audit.pattern)
        np.testing.assert_allclose(audit.kept_mass, expected_audit.kept_mass, atol=1e-3)
        close(fp.attend(*GPU, index, **B), fp.prefill(*CPU, pattern, **B))
        # The caller's own rows on the device.
        rows = (there(torch.from_numpy(np.array(x))) for x in (expected.indptr, expected.indices))
        flags = {
            field: getattr(expected, field)
            for field in ("global_window", "local_window", "mean_correction")
        }
        own = fp.BlockIndex(*rows, expected.sequences, 4, 32, **flags)
        assert own == expected
        close(fp.attend(*GPU, own, **B), fp.attend(*CPU, expected, **B))


def check_block_cover() -> None:
    """Its means are rounded on the device: blocks may differ, figures hardly."""
    for pattern in (fp.BlockCover(0.6), fp.BlockCover(0.9, 0.5, 96)):
        index, audit = fp.select(*GPU[:2], pattern, audit=True, **B)
        expected, expected_audit = fp.select(*CPU[:2], pattern, audit=True, **B)
        assert abs(index.density - expected.density) < 0.02, pattern
        np.testing.assert_array_equal(audit.pattern, "block_cover")
        for field in ("kept_mass", "least_row_mass"):
            got, want = getattr(audit, field), getattr(expected_audit, field)
            np.testing.assert_allclose(got, want, atol=0.05)
        assert (audit.rows_below_gamma.sum() > 0) == (pattern.max_budget is not None)
        close(fp.attend(*GPU, index, **B), fp.attend(*CPU, index.cpu(), **B))


def check_prefill() -> None:
    out, lse, audit = fp.prefill(*GPU, PATTERN, return_lse=True, audit=True, **B)
    expected = fp.prefill(*CPU, PATTERN, return_lse=True, audit=True, **B)
    close(out, expected[0])
    close(lse, expected[1])
    np.testing.assert_array_equal(audit.density, expected[2].density)
    given = empty_there(out, tuple(out.shape))
    # By itself it is dense at this size.
    close(fp.prefill(*GPU, PATTERN, **B), fp.attend(*CPU, **B))
    assert fp.prefill(*GPU, PATTERN, out=given, **B, backend="sm90") is given
    close(given, expected[0])
    starts = {"cu_seqlens_q": [0, 70, S], "cu_seqlens_kv": [0, 70, S]}
    close(
        fp.prefill(*(x[0] for x in GPU), PATTERN, **starts, **B, backend="sm90"),
        fp.prefill(*(x[0] for x in CPU), PATTERN, **starts, **B),
    )
    pages = [x[0].view(S // 16, 16, 2, 32) for x in GPU[1:]]
    table = there(torch.arange(S // 16, dtype=torch.int32)[None])
    paged = fp.prefill(
        GPU[0], *pages, PATTERN, page_table=table, seqlens_kv=[S], **B, backend="sm90"
    )
    close(paged, expected[0])


def check_floor() -> None:
    _, audit = fp.prefill(*GPU, PATTERN, audit=True, min_kept_mass=0.1, **B)
    assert audit.guard is None
    low = fp.BlockCover(0.2, 0)
    least = fp.select(*GPU[:2], low, audit=True, **B)[1].kept_mass.min()
    raised, audit = fp.prefill(*GPU, low, audit=True, min_kept_mass=least + 1e-3, **B)
    assert audit.guard.startswith("gamma 0.")
    gamma = float(audit.guard.split()[1])
    expected = fp.prefill(*GPU, fp.BlockCover(gamma, 0), **B, backend="sm90")
    torch.testing.assert_close(here(raised), here(expected), rtol=0, atol=0)
    out, audit = fp.prefill(*GPU, fp.StreamingLlm(0, 32), audit=True, min_kept_mass=1, **B)
    assert audit.guard == "dense"
    close(out, fp.attend(*CPU, **B))
    with pytest.raises(fp.UnsupportedError, match="compared_rows: the comparison with dense"):
        fp.prefill(*GPU, PATTERN, audit=True, compared_rows=8, **B)


check_attend()
check_select()
check_block_cover()
check_prefill()
check_floor()
print("passed")

"""One call on the device of its tensors: what the extension needs, from any framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np

from flex_prefill import _core
from flex_prefill._tensors import (
    Device,
    Tensor,
    borrow,
    check_cuda,
    current_stream,
    device_of,
    exported,
    finish_stream,
    int32_array,
    make_empty,
    page_numbers,
)
from flex_prefill.block_index import DeviceRows

Lengths: TypeAlias = Any  # a tensor or list of integers, or None
Result = TypeVar("Result")

_BACKENDS = {"cpu": ("auto", "cpu", "reference"), "cuda": ("auto", "cuda", "sm80", "sm90")}


def _place(q: Tensor, backend: str) -> Device:
    """Where the call runs: where q lies. Refuses a backend of the other kind."""
    device = device_of(q, "q")
    check_cuda("q", device)
    own = _BACKENDS[device.kind]
    if backend not in own and any(backend in names for names in _BACKENDS.values()):
        names = " or ".join(f'"{name}"' for name in own)
        raise ValueError(f'backend: expected {names} for tensors on {device}, got "{backend}"')
    return device


class Call:
    """A call on q's device: the extension's object, and what goes with it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        *,
        cu_seqlens_q: Lengths,
        cu_seqlens_kv: Lengths,
        page_table: Tensor | None,
        seqlens_kv: Lengths,
        softmax_scale: float | None,
        gqa_interleave: bool,
        block_size: int,
        backend: str,
        cpu_target: str,
        num_threads: int,
    ) -> None:
        self.q = q
        self.device = _place(q, backend)
        self.stream = current_stream(q, self.device)
        self.core_q = self.borrow(q, "q")
        self.cu_seqlens_q = int32_array(cu_seqlens_q, "cu_seqlens_q", 1)
        self.cu_seqlens_kv = int32_array(cu_seqlens_kv, "cu_seqlens_kv", 1)
        self.seqlens_kv = int32_array(seqlens_kv, "seqlens_kv", 1)
        self.core = _core.Call(
            self.core_q,
            self.borrow(k, "k"),
            None if v is None else self.borrow(v, "v"),
            self.cu_seqlens_q,
            self.cu_seqlens_kv,
            page_numbers(page_table, self.device, self.stream),
            self.seqlens_kv,
            softmax_scale,
            gqa_interleave,
            block_size,
            backend,
            cpu_target,
            num_threads,
            self.device.number if self.device.kind == "cuda" else -1,
            self.stream,
        )
        self.k_rows = k.shape[1] if len(k.shape) == 4 else 0
        self.h_q, self.block_size = q.shape[-2], block_size

    def borrow(self, tensor: Tensor, name: str, *, writable: bool = False) -> _core.Tensor:
        return borrow(tensor, name, self.device, self.stream, writable=writable)

    def sequences(self) -> list[tuple[int, int]]:
        """(s_q, s_kv) of each sequence of a call that the library has checked."""
        b = self.q.shape[0] if len(self.q.shape) == 4 else len(self.cu_seqlens_q) - 1
        s_q = [self.q.shape[1]] * b if self.cu_seqlens_q is None else np.diff(self.cu_seqlens_q)
        if self.seqlens_kv is not None:
            s_kv = self.seqlens_kv
        elif self.cu_seqlens_kv is not None:
            s_kv = np.diff(self.cu_seqlens_kv)
        else:
            s_kv = [self.k_rows] * b
        return [(int(rows), int(keys)) for rows, keys in zip(s_q, s_kv, strict=True)]

    def new_rows(self) -> DeviceRows:
        """Room for the index of a call that the library has checked."""
        rows, capacity = _core.device_index_size(self.core)
        return DeviceRows(
            self.device,
            make_empty(self.q, (rows + 1,), "int64"),
            make_empty(self.q, (capacity,), "int32"),
            self.sequences(),
            self.h_q,
            self.block_size,
            0,
            0,
        )

    def check_rows(self, rows: DeviceRows) -> None:
        """Refuses an index that is not of this call's lengths, heads and block size."""
        _core.attend_on_device_workspace_size(self.core)  # checks the call
        for name, expected, got in (
            ("block_size", self.block_size, rows.block_size),
            ("h_q", self.h_q, rows.h_q),
            ("sequences (s_q, s_kv)", self.sequences(), rows.sequences),
        ):
            if expected != got:
                raise ValueError(f"index: expected {name} {expected} as in the call, got {got}")

    def core_rows(self, rows: DeviceRows) -> _core.DeviceRows:
        return _core.DeviceRows(
            exported(rows.indptr, self.stream),
            exported(rows.indices, self.stream),
            rows.global_window,
            rows.local_window,
            rows.mean_correction,
        )

    def run(self, size: Callable[[], int], run: Callable[[Any], Result]) -> Result:
        """run(scratch): on a GPU with a workspace of size() bytes from q's framework, which is held
        until a framework without streams has seen the end; on the CPU the extension has its own."""
        if self.device.kind == "cpu":
            return run(None)
        scratch = make_empty(self.q, (max(size(), 1),), "uint8")
        result = run(exported(scratch, self.stream))
        finish_stream(self.q, self.device, self.stream)
        return result

"""Types of the compiled extension (python/bindings.cc)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class UnsupportedError(RuntimeError):
    """The call is valid, but this backend, build or machine cannot do it."""

class BlockIndex:
    @staticmethod
    def make(
        indptr: NDArray[np.int64],
        indices: NDArray[np.int32],
        sequences: Sequence[tuple[int, int]],
        h_q: int,
        block_size: int,
        global_window: int,
        local_window: int,
        mean_correction: bool,
    ) -> BlockIndex: ...
    @staticmethod
    def dense(sequences: Sequence[tuple[int, int]], h_q: int, block_size: int) -> BlockIndex: ...
    @staticmethod
    def deserialize(data: bytes) -> BlockIndex: ...
    def serialize(self) -> bytes: ...
    def check(self) -> None: ...
    def density(self) -> float: ...
    @property
    def block_size(self) -> int: ...
    @property
    def h_q(self) -> int: ...
    @property
    def global_window(self) -> int: ...
    @property
    def local_window(self) -> int: ...
    @property
    def mean_correction(self) -> bool: ...
    @property
    def sequences(self) -> list[tuple[int, int]]: ...
    @property
    def indptr(self) -> NDArray[np.int64]: ...
    @property
    def indices(self) -> NDArray[np.int32]: ...

def block_grid(s_q: int, s_kv: int, block_size: int) -> tuple[int, int, int]:
    """(first_q_block, n_q, n_kv) of one sequence."""

class Pattern:
    @staticmethod
    def dense() -> Pattern: ...
    @staticmethod
    def flex_prefill(
        gamma: float, tau: float, min_budget: int, max_budget: int | None
    ) -> Pattern: ...
    @staticmethod
    def vertical_slash(vertical_size: int, slash_size: int) -> Pattern: ...
    @staticmethod
    def streaming_llm(global_window: int, local_window: int) -> Pattern: ...
    @staticmethod
    def xattention(stride: int, threshold: float) -> Pattern: ...
    @staticmethod
    def flash_prefill(
        alpha: float,
        global_window: int,
        local_window: int,
        last_queries: int,
        mean_correction: bool,
    ) -> Pattern: ...
    @staticmethod
    def block_cover(gamma: float, column_share: float, max_budget: int | None) -> Pattern: ...

class MInferencePattern(Pattern):
    def __init__(self, heads: Sequence[tuple[int, int, int]]) -> None: ...

class Tensor:
    """A tensor of the caller's, held while this lives; its memory is used where it is."""

    def __init__(
        self, tensor: Any, name: str, writable: bool = False, bfloat16_bits: bool = False
    ) -> None: ...
    @property
    def on_cuda(self) -> bool: ...

def empty_like_type(shape: Sequence[int], like: Tensor, float32: bool = False) -> Any:
    """New uninitialised CPU memory of like's element type, or float32; speaks DLPack."""

class Call:
    """Everything of a call but the pattern and the outputs.

    device: number of the GPU, or -1: the CPU. stream: a cudaStream_t of that device.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        cu_seqlens_q: NDArray[np.int32] | None,
        cu_seqlens_kv: NDArray[np.int32] | None,
        page_table: Any,
        seqlens_kv: NDArray[np.int32] | None,
        softmax_scale: float | None,
        gqa_interleave: bool,
        block_size: int,
        backend: str,
        cpu_target: str,
        num_threads: int,
        device: int = -1,
        stream: int = 0,
    ) -> None: ...

# `scratch` is the workspace of a call on a GPU, uint8 on the device; None on the CPU.
def prefill(
    call: Call,
    pattern: Pattern,
    out: Tensor,
    lse: Tensor | None,
    audit: NDArray[np.float32] | None,
    scratch: Any = None,
    min_kept_mass: float | None = None,
    compared_rows: int = 0,
    comparison: NDArray[np.float32] | None = None,
) -> tuple[int, float]:
    """What the guard did (0: nothing, 1: raised gamma, 2: dense), and the raised gamma."""

def compare_with_dense(
    call: Call, index: BlockIndex, out: Tensor, rows: int, figures: NDArray[np.float32]
) -> None: ...
def prefill_workspace_size(call: Call, pattern: Pattern) -> int: ...
def select(
    call: Call, pattern: Pattern, audit: NDArray[np.float32] | None, scratch: Any = None
) -> BlockIndex: ...
def select_workspace_size(call: Call, pattern: Pattern) -> int: ...
def attend(
    call: Call, index: BlockIndex | None, out: Tensor, lse: Tensor | None, scratch: Any = None
) -> None: ...
def attend_workspace_size(call: Call) -> int: ...

class DeviceRows:
    """Borrowed arrays of an index on a GPU: int64 [rows + 1], int32 [capacity]."""

    def __init__(
        self,
        indptr: Any,
        indices: Any,
        global_window: int,
        local_window: int,
        mean_correction: bool,
    ) -> None: ...
    @property
    def global_window(self) -> int: ...
    @property
    def local_window(self) -> int: ...
    @property
    def mean_correction(self) -> bool: ...

def device_index_size(call: Call) -> tuple[int, int]:
    """Rows of the call's index, and its most indices."""

def select_on_device(
    call: Call,
    pattern: Pattern,
    rows: DeviceRows,
    audit: NDArray[np.float32] | None,
    device_audit: Any,
    scratch: Any,
) -> None:
    """Fills rows. With an audit, device_audit is uint8 device memory of its size; that waits."""

def select_on_device_workspace_size(call: Call, pattern: Pattern) -> int: ...
def attend_on_device(
    call: Call, rows: DeviceRows, out: Tensor, lse: Tensor | None, scratch: Any
) -> None: ...
def attend_on_device_workspace_size(call: Call) -> int: ...
def wait_for_stream(device: int, stream: int) -> None: ...

CUDA_BUILT: bool

def cuda_info() -> dict[str, Any]:
    """built, runtime, driver, error, devices; see flex_prefill.info."""

def version() -> str: ...
def supported_cpu_targets() -> list[str]: ...

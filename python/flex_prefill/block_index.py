"""BlockIndex: which key blocks every query block of every head attends to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flex_prefill import _core
from flex_prefill._core import BlockIndex as CoreIndex
from flex_prefill._tensors import Device, Tensor, check_device, device_of, to_host

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["BlockIndex"]


@dataclass(frozen=True)
class DeviceRows:
    """The rows of an index on a GPU, and what else the index is made of."""

    device: Device
    indptr: Tensor  # int64 [rows + 1]
    indices: Tensor  # int32 [every causal block]; used up to indptr[-1]
    sequences: list[tuple[int, int]]
    h_q: int
    block_size: int
    global_window: int
    local_window: int
    mean_correction: bool = False

    def to_core(self) -> _core.BlockIndex:
        """The same on the CPU; waits for the GPU."""
        indptr = to_host(self.indptr)
        return _core.BlockIndex.make(
            indptr,
            to_host(self.indices[: int(indptr[-1])]),
            self.sequences,
            self.h_q,
            self.block_size,
            self.global_window,
            self.local_window,
            self.mean_correction,
        )


def _device_vector(tensor: Tensor, name: str, dtype: str) -> Tensor:
    got = str(tensor.dtype).removeprefix("torch.")
    if got != dtype or len(tensor.shape) != 1:
        raise ValueError(
            f"index: {name}: expected {dtype} of rank 1 on a GPU, got {got} of rank "
            f"{len(tensor.shape)}"
        )
    return tensor


class BlockIndex:
    """The kept blocks, in compressed rows (CSR).

    Rows come in the order sequence, query head, query block; row r keeps the key blocks
    ``indices[indptr[r]:indptr[r + 1]]``, ascending, none after the row's diagonal block. The block
    grid of a sequence is anchored at its absolute token 0, for queries and keys: a chunk that
    starts inside a block has a partial first query block.

    With ``global_window`` or ``local_window`` above 0 (streaming_llm), kept blocks are masked
    further by token: query i sees key j only if ``j < global_window`` or
    ``position(i) - j < local_window``. With ``mean_correction`` (flash_prefill), the blocks before
    its diagonal that a row does not keep count through the means of their keys and values.

    An index never changes; it is checked when it is made.

    One that ``select`` made on a GPU stays there: ``indptr`` and ``indices`` are tensors of the
    framework that q came from, and ``attend`` on that GPU takes them without waiting. Whatever else
    needs the rows (density, check, masks, pictures, comparing, saving) copies them to the CPU
    once, which waits for the GPU; ``cpu()`` gives an index that is there altogether.
    """

    _host: CoreIndex | None
    _rows: DeviceRows | None = None

    def __init__(
        self,
        indptr: npt.ArrayLike,
        indices: npt.ArrayLike,
        sequences: Sequence[tuple[int, int]],
        h_q: int,
        block_size: int = 128,
        *,
        global_window: int = 0,
        local_window: int = 0,
        mean_correction: bool = False,
    ) -> None:
        """From the user's own rows, which are copied.

        indptr: ``[rows + 1]``, the running sum of the rows' lengths.
        indices: ``[indptr[-1]]``, key blocks.
        sequences: (s_q, s_kv) of each sequence, in tokens.
        Raises ValueError naming the first row that is out of range, not ascending or after its
        diagonal.

        Rows on a GPU (contiguous int64 and int32 there) stay where they are and are not looked at:
        ``check()`` does that, and waits. ``attend`` leaves out blocks after a row's diagonal.
        """
        if (device := device_of(indptr, "index: indptr")).kind == "cuda":
            check_device(indices, "index: indices", device)
            self._host, self._rows = (
                None,
                DeviceRows(
                    device,
                    _device_vector(indptr, "indptr", "int64"),
                    _device_vector(indices, "indices", "int32"),
                    [(int(s_q), int(s_kv)) for s_q, s_kv in sequences],
                    h_q,
                    block_size,
                    global_window,
                    local_window,
                    mean_correction,
                ),
            )
            return
        starts: npt.NDArray[Any] = np.asarray(indptr)
        blocks: npt.NDArray[Any] = np.asarray(indices)
        for array, name in ((starts, "indptr"), (blocks, "indices")):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(
                    f"index: {name}: expected integers of rank 1, got {array.dtype} of rank "
                    f"{array.ndim}"
                )
        limits = np.iinfo(np.int32)
        if blocks.size and (blocks.min() < limits.min or blocks.max() > limits.max):
            raise ValueError("index: indices: expected numbers that fit int32")
        self._host = _core.BlockIndex.make(
            np.ascontiguousarray(starts, np.int64),
            np.ascontiguousarray(blocks, np.int32),
            [(int(s_q), int(s_kv)) for s_q, s_kv in sequences],
            h_q,
            block_size,
            global_window,
            local_window,
            mean_correction,
        )

    @classmethod
    def _wrap(cls, core: _core.BlockIndex) -> BlockIndex:
        index = cls.__new__(cls)
        index._host = core
        return index

    @classmethod
    def _on_device(cls, rows: DeviceRows) -> BlockIndex:
        index = cls.__new__(cls)
        index._host, index._rows = None, rows
        return index

    @property
    def _core(self) -> CoreIndex:
        if self._host is None:
            assert self._rows is not None
            self._host = self._rows.to_core()
        return self._host

    @property
    def _about(self) -> CoreIndex | DeviceRows:
        """What knows all but the rows without waiting."""
        return self._core if self._rows is None else self._rows

    @property
    def device(self) -> str:
        """Where the rows are: "cpu" or e.g. "cuda:0"."""
        return "cpu" if self._rows is None else str(self._rows.device)

    def cpu(self) -> BlockIndex:
        """The same index on the CPU: itself if it is there, otherwise a copy; waits for the GPU."""
        return self if self._rows is None else BlockIndex._wrap(self._core)

    @classmethod
    def dense(
        cls, sequences: Sequence[tuple[int, int]], h_q: int, block_size: int = 128
    ) -> BlockIndex:
        """The index that keeps every causal block."""
        return cls._wrap(_core.BlockIndex.dense(list(sequences), h_q, block_size))

    @classmethod
    def from_mask(
        cls,
        masks: npt.NDArray[np.bool_] | Sequence[npt.NDArray[np.bool_]],
        sequences: Sequence[tuple[int, int]],
        block_size: int = 128,
    ) -> BlockIndex:
        """From one bool ``[h_q, n_q, n_kv]`` a sequence, True where a block is kept.

        Raises ValueError for a wrong shape and for a kept block after the diagonal.
        """
        if len(masks) != len(sequences):
            raise ValueError(
                f"masks: expected one for each of {len(sequences)} sequences, got {len(masks)}"
            )
        counts: list[npt.NDArray[Any]] = [np.zeros(1, np.int64)]
        blocks: list[npt.NDArray[Any]] = [np.zeros(0, np.int32)]
        h_q = int(np.shape(masks[0])[0]) if len(masks) else 1
        for s, ((s_q, s_kv), given) in enumerate(zip(sequences, masks, strict=True)):
            mask: npt.NDArray[Any] = np.asarray(given)
            _, n_q, n_kv = _core.block_grid(s_q, s_kv, block_size)
            if mask.shape != (h_q, n_q, n_kv) or mask.dtype != np.bool_:
                raise ValueError(
                    f"masks: sequence {s}: expected bool [h_q, n_q, n_kv] = "
                    f"[{h_q}, {n_q}, {n_kv}], got {mask.dtype} {list(mask.shape)}"
                )
            counts.append(np.count_nonzero(mask, axis=-1).ravel())
            blocks.append(np.nonzero(mask)[-1])
        indptr = np.cumsum(np.concatenate(counts))
        return cls(indptr, np.concatenate(blocks), sequences, h_q, block_size)

    @classmethod
    def from_bytes(cls, data: bytes) -> BlockIndex:
        """The index that ``to_bytes`` stored; raises ValueError for anything else."""
        return cls._wrap(_core.BlockIndex.deserialize(data))

    def to_bytes(self) -> bytes:
        """One byte string, little-endian, versioned; the same as C++ ``BlockIndex::serialize``."""
        return self._core.serialize()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockIndex:
        return cls.from_bytes(Path(path).read_bytes())

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_bytes(self.to_bytes())

    def __reduce__(self) -> tuple[Callable[[bytes], BlockIndex], tuple[bytes]]:
        return BlockIndex.from_bytes, (self.to_bytes(),)

    @property
    def indptr(self) -> Any:
        """int64 ``[rows + 1]``: a read-only NumPy view, or a tensor on the GPU."""
        return self._core.indptr if self._rows is None else self._rows.indptr

    @property
    def indices(self) -> Any:
        """int32 ``[indptr[-1]]`` key blocks: a read-only NumPy view, or a tensor on the GPU, whose
        length is asked for there: that waits."""
        if self._rows is None:
            return self._core.indices
        return self._rows.indices[: int(to_host(self._rows.indptr[-1:])[0])]

    @property
    def block_size(self) -> int:
        """Tokens of a block, of queries and of keys."""
        return self._about.block_size

    @property
    def h_q(self) -> int:
        return self._about.h_q

    @property
    def global_window(self) -> int:
        return self._about.global_window

    @property
    def local_window(self) -> int:
        return self._about.local_window

    @property
    def mean_correction(self) -> bool:
        return self._about.mean_correction

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(s_q, s_kv) of each sequence, in tokens."""
        return self._about.sequences

    @property
    def density(self) -> float:
        """Kept causal blocks / causal blocks; 1 for an empty index."""
        return self._core.density()

    def check(self) -> None:
        """Raises ValueError if a row is out of range, not ascending or after its diagonal."""
        self._core.check()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockIndex):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __repr__(self) -> str:
        where = f"density={self.density:.3f}" if self._rows is None else f"device={self.device}"
        return (
            f"BlockIndex(sequences={self.sequences}, h_q={self.h_q}, "
            f"block_size={self.block_size}, {where})"
        )

    def _grid(self, sequence: int) -> tuple[int, int, int]:
        return _core.block_grid(*self.sequences[sequence], self.block_size)

    def to_mask(self, sequence: int, head: int) -> npt.NDArray[np.bool_]:
        """bool ``[n_q, n_kv]`` of one head of one sequence: True where a block is kept."""
        if not 0 <= sequence < len(self.sequences):
            raise IndexError(f"sequence: expected 0 to {len(self.sequences) - 1}, got {sequence}")
        if not 0 <= head < self.h_q:
            raise IndexError(f"head: expected 0 to {self.h_q - 1}, got {head}")
        _, n_q, n_kv = self._grid(sequence)
        first = sum(self.h_q * self._grid(s)[1] for s in range(sequence)) + head * n_q
        starts = self._core.indptr[first : first + n_q + 1]
        rows = np.repeat(np.arange(n_q), np.diff(starts))
        mask = np.zeros((n_q, n_kv), np.bool_)
        mask[rows, self._core.indices[starts[0] : starts[-1]]] = True
        return mask

    def to_block_mask(self, device: str | torch.device = "cpu") -> BlockMask:
        """The same blocks as a ``torch.nn.attention.flex_attention.BlockMask``.

        All sequences must be of one length, and a chunk must start at a block (the BlockMask's
        query blocks begin with its first query); ValueError otherwise.
        """
        import torch
        from torch.nn.attention.flex_attention import BlockMask

        if len(set(self.sequences)) != 1:
            raise ValueError(
                f"to_block_mask: expected sequences of one length, got {self.sequences}"
            )
        s_q, s_kv = self.sequences[0]
        block_size, offset = self.block_size, s_kv - s_q
        if offset % block_size != 0:
            raise ValueError(
                f"to_block_mask: expected a chunk that starts at a block, got s_kv - s_q = "
                f"{offset} with blocks of {block_size}"
            )
        kept = torch.from_numpy(
            np.stack(
                [
                    np.stack([self.to_mask(s, h) for h in range(self.h_q)])
                    for s in range(len(self.sequences))
                ]
            )
        ).to(device)
        first_q_block, n_q, n_kv = self._grid(0)
        global_window, local_window = self.global_window, self.local_window
        windows = global_window > 0 or local_window > 0

        def mask_mod(b: Any, h: Any, q_row: Any, key: Any) -> Any:
            position = q_row + offset
            seen = (key <= position) & kept[b, h, q_row // block_size, key // block_size]
            if windows:
                seen &= (key < global_window) | (position - key < local_window)
            return seen

        # A block needs the mask where the causal line or a window may cut it.
        q_block = torch.arange(n_q, device=device)[:, None] + first_q_block
        kv_block = torch.arange(n_kv, device=device)[None, :]
        cut = torch.ones_like(kept) if windows else (kv_block == q_block).expand_as(kept)

        def rows(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
            return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()

        return BlockMask.from_kv_blocks(
            *rows(kept & cut),
            *rows(kept & ~cut),
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
            seq_lengths=(s_q, s_kv),
        )

    def plot(self, sequence: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draws one head's kept blocks with matplotlib; returns the axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        mask = self.to_mask(sequence, head)
        first, n_q, n_kv = self._grid(sequence)
        ax.imshow(mask, cmap="Greys", extent=(0, n_kv, first + n_q, first), aspect="equal")
        ax.set_xlabel(f"key block ({self.block_size} tokens)")
        ax.set_ylabel("query block")
        kept = int(mask.sum()) / (n_q * (first + 1) + n_q * (n_q - 1) // 2)
        ax.set_title(f"sequence {sequence}, head {head}: density {kept:.2f}")
        return ax

"""select, attend, prefill, and the drop-in for the published ``flex_prefill_attention``.

    q, k, v --> select --> BlockIndex --> attend --> out (, lse)

Tensors are torch's, NumPy's (bfloat16 through ml_dtypes), CuPy's, JAX's, or any other's that speaks
DLPack; they are read where they are, and results are tensors of q's framework on q's device.
Attention is causal and bottom-right aligned: the query at row i stands at position
``s_kv - s_q + i``.

======  =====================  =====================================  ==========================
layout  q                      k, v                                   lengths
======  =====================  =====================================  ==========================
batch   [b, s_q, h_q, d_qk]    [b, s_kv, h_kv, d_qk | d_v]            from the shapes
packed  [t_q, h_q, d_qk]       [t_kv, h_kv, d_qk | d_v]               cu_seqlens_q, cu_seqlens_kv
paged   batch or packed        [pages, page_size, h_kv, d_qk | d_v]   page_table, seqlens_kv
======  =====================  =====================================  ==========================

Keywords that all three functions share:

cu_seqlens_q, cu_seqlens_kv: [b + 1] integers, starts of the packed sequences and their total.
page_table: [b, max_pages] integers, the pages of each sequence; seqlens_kv: [b], its keys.
softmax_scale: 1 / sqrt(d_qk) by default.
gqa_interleave: query head h reads K/V head ``h % h_kv`` instead of ``h // (h_q / h_kv)``.
block_size: 32, 64 or 128, of queries and of keys, in tokens.
backend: "auto"; for tensors in CPU memory "cpu" or "reference" (double precision, slow on purpose);
    for tensors on a GPU "cuda" (what suits the card), "sm80" or "sm90".
cpu_target: "auto" or one of ``info()["cpu_targets"]``.
num_threads: of the CPU backend; 0: as many as the process may use.

On a GPU (bfloat16 and float16) a call is queued on the current stream of torch or CuPy, of the
device that q is on, and takes its workspace from their allocators; all tensors are on that device,
lengths on the CPU. Nothing waits and nothing is allocated outside the framework's allocator, so
calls can be captured in CUDA graphs, with these exceptions, which wait for the stream: ``audit``,
``min_kept_mass``, an index that lies on the CPU, and frameworks without a current stream (JAX).

Errors, all before anything is written: ValueError for what is invalid (it names the tensor or
option, what was expected and what came), UnsupportedError for what is valid but not in this build
or on this machine (a tensor on a GPU without the CUDA backends), TypeError for what is no tensor.

The functions compute the forward pass only. Under torch's grad mode ``prefill`` and ``attend`` run
on tensors that require a gradient, and ``backward()`` through the result raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from flex_prefill import _core
from flex_prefill._call import Call, Lengths
from flex_prefill._tensors import (
    Tensor,
    borrow,
    exported,
    has_stream,
    is_cupy,
    is_torch,
    make_empty,
    make_output,
)
from flex_prefill.audit import Audit, AuditRows
from flex_prefill.block_index import BlockIndex
from flex_prefill.patterns import FlexPrefill, Pattern, check_pattern

__all__ = [
    "Audit",
    "BlockIndex",
    "attend",
    "flex_prefill_attention",
    "prefill",
    "prefill_workspace_size",
    "select",
]


def _result(out: Tensor, lse: Tensor | None, audit: Audit | None) -> Any:
    """out alone, or a tuple of what was asked for."""
    asked = [x for x in (lse, audit) if x is not None]
    return (out, *asked) if asked else out


def _check_rank(q: Tensor) -> None:
    if not hasattr(q, "shape"):
        raise TypeError(f"q: expected a tensor that speaks DLPack, got {type(q)}")
    if len(q.shape) not in (3, 4):
        raise ValueError(
            "q: expected rank 4 [b, s_q, h_q, d_qk] or packed rank 3 [t_q, h_q, d_qk], got rank "
            f"{len(q.shape)}"
        )


def out_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """[b, s_q, h_q, d_v] or packed [t_q, h_q, d_v]."""
    return (*q.shape[:-1], v.shape[-1])


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """[b, h_q, s_q] or packed [h_q, t_q]."""
    if len(q.shape) == 4:
        return (q.shape[0], q.shape[2], q.shape[1])
    return (q.shape[1], q.shape[0])


def audit_shape(q: Tensor, cu_seqlens_q: Lengths) -> tuple[int, int, int]:
    """[b, h_q, 8]: the eight fields of an Audit."""
    if len(q.shape) == 4:
        return (q.shape[0], q.shape[2], 8)
    return (0 if cu_seqlens_q is None else max(len(cu_seqlens_q) - 1, 0), q.shape[1], 8)


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    return_lse: bool,
    options: dict[str, Any],
    stage: Callable[[Call, _core.Tensor, _core.Tensor | None], None],
) -> tuple[Tensor, Tensor | None]:
    """Makes what the caller did not give, lets ``stage(call, out, lse)`` fill it: (out, lse)."""
    call = Call(q, k, v, **options)
    if out is None:
        out, finish = make_output(out_shape(q, v), q, call.core_q)
    elif is_torch(out) or is_cupy(out) or isinstance(out, np.ndarray):
        finish = None
    else:
        raise ValueError(
            "out: expected a torch.Tensor, numpy.ndarray or cupy.ndarray to write to, got "
            f"{type(out).__module__}.{type(out).__name__}"
        )
    core_out = call.borrow(out, "out", writable=True)
    if not return_lse:
        stage(call, core_out, None)
        return finish() if finish else out, None
    lse, finish_lse = make_output(lse_shape(q), q, call.core_q, float32=True)
    if call.device.kind == "cuda":  # borrow refuses float32 there
        core_lse = _core.Tensor(exported(lse, call.stream), "lse")
    else:
        core_lse = borrow(lse, "lse", writable=True)
    stage(call, core_out, core_lse)
    return finish() if finish else out, finish_lse()


def run_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    return_lse: bool,
    audit: bool,
    min_kept_mass: float | None,
    compared_rows: int,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None, AuditRows | None]:
    """out, lse and the audit's arrays; the last two None where not asked for."""
    rows: npt.NDArray[np.float32] | None = None
    comparison: npt.NDArray[np.float32] | None = None
    guard: tuple[float, float] = (0, 0)

    def stage(call: Call, core_out: _core.Tensor, core_lse: _core.Tensor | None) -> None:
        nonlocal rows, comparison, guard
        b, h_q, fields = audit_shape(q, options["cu_seqlens_q"])
        rows = np.empty((b, h_q, fields), np.float32) if audit else None
        comparison = np.empty((b, h_q, 4), np.float32) if compared_rows > 0 else None
        core_pattern = pattern.to_core()
        guard = call.run(
            lambda: _core.prefill_workspace_size(call.core, core_pattern),
            lambda scratch: _core.prefill(
                call.core,
                core_pattern,
                core_out,
                core_lse,
                rows,
                scratch,
                min_kept_mass,
                compared_rows,
                comparison,
            ),
        )

    result, lse = _compute(q, k, v, out, return_lse, options, stage)
    if rows is None:
        return result, lse, None
    return result, lse, AuditRows(rows, np.array(guard, np.float32), comparison)


def run_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None,
    *,
    return_lse: bool,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """out and lse, None where not asked for."""

    def stage(call: Call, core_out: _core.Tensor, core_lse: _core.Tensor | None) -> None:
        rows = None if index is None else index._rows
        if index is not None and rows is not None and rows.device == call.device:
            call.check_rows(rows)
            call.run(
                lambda: _core.attend_on_device_workspace_size(call.core),
                lambda scratch: _core.attend_on_device(
                    call.core, call.core_rows(rows), core_out, core_lse, scratch
                ),
            )
            return
        core_index = None if index is None else index._core
        call.run(
            lambda: _core.attend_workspace_size(call.core),
            lambda scratch: _core.attend(call.core, core_index, core_out, core_lse, scratch),
        )

    return _compute(q, k, v, out, return_lse, options, stage)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = FlexPrefill(),  # noqa: B008 (immutable)
    *,
    cu_seqlens_q: Lengths = None,
    cu_seqlens_kv: Lengths = None,
    page_table: Tensor | None = None,
    seqlens_kv: Lengths = None,
    softmax_scale: float | None = None,
    gqa_interleave: bool = False,
    block_size: int = 128,
    return_lse: bool = False,
    audit: bool = False,
    min_kept_mass: float | None = None,
    compared_rows: int = 0,
    out: Tensor | None = None,
    backend: str = "auto",
    cpu_target: str = "auto",
    num_threads: int = 0,
) -> Any:
    """Attention over the blocks that ``pattern`` chooses: both stages in one call.

    Returns out ``[b, s_q, h_q, d_v]`` or packed ``[t_q, h_q, d_v]``, of q's element type; or a
    tuple ``(out[, lse][, Audit])`` as asked. lse is float32 ``[b, h_q, s_q]`` or packed
    ``[h_q, t_q]``: the natural logarithm of the sum of ``exp(scale * q k)`` over the kept keys.
    ``min_kept_mass``: a floor, in [0, 1]: where a head keeps less of the probe's mass, the call
    is selected anew, with gamma raised half way to 1 up to three times (FlexPrefill, BlockCover),
    then dense; the Audit's ``guard`` says so. On a GPU the host must see the figures to judge them:
    the call waits for the stream once for each selection.
    ``compared_rows``: with ``audit``, that many rows of every head are compared with dense
    attention, as in ``compare_with_dense``: the Audit's ``comparison``. Tensors in CPU memory.
    ``out``: where to write instead, a torch or NumPy tensor that shares no memory with the inputs.
    The other keywords, layouts and errors: see the module.
    """
    _check_rank(q)
    check_pattern(pattern)
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
        "page_table": page_table,
        "seqlens_kv": seqlens_kv,
        "softmax_scale": softmax_scale,
        "gqa_interleave": gqa_interleave,
        "block_size": block_size,
        "backend": backend,
        "cpu_target": cpu_target,
        "num_threads": num_threads,
    }
    if compared_rows and not audit:
        raise ValueError("compared_rows: expected audit=True, whose comparison has the figures")
    run: Callable[..., Any] = run_prefill
    if is_torch(q):
        from flex_prefill import _torch_op

        run = _torch_op.prefill
    result, lse, rows = run(
        q,
        k,
        v,
        pattern,
        return_lse=return_lse,
        audit=audit,
        min_kept_mass=min_kept_mass,
        compared_rows=compared_rows,
        out=out,
        **options,
    )
    return _result(result, lse, None if rows is None else Audit.from_rows(rows))


def prefill_workspace_size(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = FlexPrefill(),  # noqa: B008 (immutable)
    *,
    softmax_scale: float | None = None,
    gqa_interleave: bool = False,
    block_size: int = 128,
    backend: str = "auto",
    cpu_target: str = "auto",
    num_threads: int = 0,
) -> int:
    """Bytes that ``prefill`` of a batch takes for the call, beyond its inputs and outputs."""
    _check_rank(q)
    check_pattern(pattern)
    call = Call(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        page_table=None,
        seqlens_kv=None,
        softmax_scale=softmax_scale,
        gqa_interleave=gqa_interleave,
        block_size=block_size,
        backend=backend,
        cpu_target=cpu_target,
        num_threads=num_threads,
    )
    return _core.prefill_workspace_size(call.core, pattern.to_core())


def select(
    q: Tensor,
    k: Tensor,
    pattern: Pattern = FlexPrefill(),  # noqa: B008 (immutable)
    *,
    cu_seqlens_q: Lengths = None,
    cu_seqlens_kv: Lengths = None,
    page_table: Tensor | None = None,
    seqlens_kv: Lengths = None,
    softmax_scale: float | None = None,
    gqa_interleave: bool = False,
    block_size: int = 128,
    audit: bool = False,
    backend: str = "auto",
    cpu_target: str = "auto",
    num_threads: int = 0,
) -> Any:
    """Decides, per head, which blocks matter: a BlockIndex, or ``(BlockIndex, Audit)``.

    A sequence with ``s_q <= block_size``, or ``s_kv <= max(2 * block_size, min_budget)`` rounded up
    to blocks, keeps every causal block. Of torch's and CuPy's tensors on a GPU the index stays
    there: see BlockIndex. Keywords, layouts and errors: see the module.
    """
    _check_rank(q)
    check_pattern(pattern)
    call = Call(
        q,
        k,
        None,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        page_table=page_table,
        seqlens_kv=seqlens_kv,
        softmax_scale=softmax_scale,
        gqa_interleave=gqa_interleave,
        block_size=block_size,
        backend=backend,
        cpu_target=cpu_target,
        num_threads=num_threads,
    )
    rows = np.empty(audit_shape(q, cu_seqlens_q), np.float32) if audit else None
    core_pattern = pattern.to_core()
    if call.device.kind == "cuda" and has_stream(q):
        index = _select_on_device(call, core_pattern, rows)
    else:
        core_index = call.run(
            lambda: _core.select_workspace_size(call.core, core_pattern),
            lambda scratch: _core.select(call.core, core_pattern, rows, scratch),
        )
        index = BlockIndex._wrap(core_index)
    return index if rows is None else (index, Audit.from_rows(AuditRows(rows)))


def _select_on_device(
    call: Call, pattern: _core.Pattern, audit: npt.NDArray[np.float32] | None
) -> BlockIndex:
    size = _core.select_on_device_workspace_size(call.core, pattern)  # checks the call
    rows = call.new_rows()
    heads = None if audit is None else make_empty(call.q, (max(audit.nbytes, 1),), "uint8")
    core_rows = call.core_rows(rows)
    call.run(
        lambda: size,
        lambda scratch: _core.select_on_device(
            call.core,
            pattern,
            core_rows,
            audit,
            None if heads is None else exported(heads, call.stream),
            scratch,
        ),
    )
    return BlockIndex._on_device(
        replace(
            rows,
            global_window=core_rows.global_window,
            local_window=core_rows.local_window,
            mean_correction=core_rows.mean_correction,
        )
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None = None,
    *,
    cu_seqlens_q: Lengths = None,
    cu_seqlens_kv: Lengths = None,
    page_table: Tensor | None = None,
    seqlens_kv: Lengths = None,
    softmax_scale: float | None = None,
    gqa_interleave: bool = False,
    block_size: int = 128,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
    cpu_target: str = "auto",
    num_threads: int = 0,
) -> Any:
    """Causal attention over the blocks of ``index``; without one, over every causal block.

    Returns out, or ``(out, lse)``, as ``prefill`` does. Raises ValueError if the index is not of
    the call's lengths, heads and block size. Keywords, layouts and errors: see the module.
    """
    _check_rank(q)
    if index is not None and not isinstance(index, BlockIndex):
        raise TypeError(f"index: expected a BlockIndex or None, got {type(index)}")
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
        "page_table": page_table,
        "seqlens_kv": seqlens_kv,
        "softmax_scale": softmax_scale,
        "gqa_interleave": gqa_interleave,
        "block_size": block_size,
        "backend": backend,
        "cpu_target": cpu_target,
        "num_threads": num_threads,
    }
    if is_torch(q):
        from flex_prefill import _torch_op

        result, lse = _torch_op.attend(q, k, v, index, return_lse=return_lse, out=out, **options)
    else:
        result, lse = run_attend(q, k, v, index, return_lse=return_lse, out=out, **options)
    return _result(result, lse, None)


@overload
def flex_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float,
    tau: float = ...,
    min_budget: int | None = ...,
    max_budget: int | None = ...,
    gqa_interleave: bool = ...,
    softmax_scale: float | None = ...,
    block_size: int = ...,
    return_computational_ratio: Literal[False] = ...,
) -> Tensor: ...
@overload
def flex_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float,
    tau: float = ...,
    min_budget: int | None = ...,
    max_budget: int | None = ...,
    gqa_interleave: bool = ...,
    softmax_scale: float | None = ...,
    block_size: int = ...,
    *,
    return_computational_ratio: Literal[True],
) -> tuple[Tensor, float]: ...
def flex_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float,
    tau: float = 0,
    min_budget: int | None = None,
    max_budget: int | None = None,
    gqa_interleave: bool = False,
    softmax_scale: float | None = None,
    block_size: int = 128,
    return_computational_ratio: bool = False,
) -> Any:
    """The published function, with its names, meanings and defaults (arXiv 2502.20766).

    q ``[b, s_q, h_q, d_qk]``, k ``[b, s_kv, h_kv, d_qk]``, v ``[b, s_kv, h_kv, d_v]``; returns out
    ``[b, s_q, h_q, d_v]``, of q's element type. gamma, tau, min_budget and max_budget as in
    ``FlexPrefill``, in tokens; None: one block, no limit. Beyond what was published: any batch, any
    ``s_q <= s_kv``, float32 and float16, and ``prefill``'s inputs and errors.

    With ``return_computational_ratio``: (out, ratio), ratio = kept blocks / (n_q * n_kv), a mean
    over heads and sequences, so that exact causal attention over n blocks would have about 1/2;
    but 1.0 where nothing was selected and attention was dense.
    """
    pattern = FlexPrefill(gamma, tau, 1 if min_budget is None else min_budget, max_budget)
    out = prefill(
        q,
        k,
        v,
        pattern,
        softmax_scale=softmax_scale,
        gqa_interleave=gqa_interleave,
        block_size=block_size,
        audit=return_computational_ratio,
    )
    if not return_computational_ratio:
        return out
    out, audit = out
    return out, _computational_ratio(audit, q.shape[1], k.shape[1], block_size)


def _computational_ratio(audit: Audit, s_q: int, s_kv: int, block_size: int) -> float:
    if np.all(audit.pattern == "dense"):
        return 1.0
    first_q_block, n_q, n_kv = _core.block_grid(s_q, s_kv, block_size)
    causal = n_q * (first_q_block + 1) + n_q * (n_q - 1) // 2
    kept = np.rint(audit.density.astype(np.float64) * causal)  # a count, whatever float32 did
    return float(kept.mean() / (n_q * n_kv))

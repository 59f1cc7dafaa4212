"""The torch side: the custom op ``torch.ops.flex_prefill.prefill``, and gradients refused.

Imported when the first torch tensor comes, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flex_prefill import attention
from flex_prefill._tensors import int32_array
from flex_prefill.audit import AuditRows
from flex_prefill.block_index import BlockIndex
from flex_prefill.patterns import Pattern, from_values

_LENGTHS = {"cu_seqlens_q": 1, "cu_seqlens_kv": 1, "page_table": 2, "seqlens_kv": 1}


def _refuse_backward(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "flex_prefill computes the forward pass only: call it under torch.no_grad() or "
        "torch.inference_mode(), or detach its inputs"
    )


# For the CPU and for CUDA: what it calls looks at the tensors' device. Results that were not asked
# for are empty tensors, on q's device so that CUDA graphs can hold them: an op always returns the
# same number.
@torch.library.custom_op("flex_prefill::prefill", mutates_args=())
def _prefill_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: str,
    pattern_values: Sequence[float],
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
    page_table: torch.Tensor | None,
    seqlens_kv: torch.Tensor | None,
    softmax_scale: float | None,
    gqa_interleave: bool,
    block_size: int,
    backend: str,
    cpu_target: str,
    num_threads: int,
    return_lse: bool,
    audit: bool,
    min_kept_mass: float | None,
    compared_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse, rows = attention.run_prefill(
        q,
        k,
        v,
        from_values(pattern, pattern_values),
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
        return_lse=return_lse,
        audit=audit,
        min_kept_mass=min_kept_mass,
        compared_rows=compared_rows,
    )
    none = [q.new_empty(0, dtype=torch.float32) for _ in range(4)]  # an op's results share nothing
    return (
        out,
        none[0] if lse is None else lse,
        none[1] if rows is None else torch.from_numpy(rows.heads),
        none[2] if rows is None else torch.from_numpy(rows.guard),
        none[3] if rows is None or rows.comparison is None else torch.from_numpy(rows.comparison),
    )


@_prefill_op.register_fake
def _prefill_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: str,
    pattern_values: Sequence[float],
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
    page_table: torch.Tensor | None,
    seqlens_kv: torch.Tensor | None,
    softmax_scale: float | None,
    gqa_interleave: bool,
    block_size: int,
    backend: str,
    cpu_target: str,
    num_threads: int,
    return_lse: bool,
    audit: bool,
    min_kept_mass: float | None,
    compared_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    lse = attention.lse_shape(q) if return_lse else (0,)
    shape = attention.audit_shape(q, cu_seqlens_q)

    def of_audit(asked: bool, *shape: Any) -> torch.Tensor:
        if not asked:
            return q.new_empty(0, dtype=torch.float32)
        return torch.empty(shape, dtype=torch.float32, device="cpu")  # wherever the call was

    return (
        q.new_empty(attention.out_shape(q, v)),
        q.new_empty(lse, dtype=torch.float32),
        of_audit(audit, *shape),
        of_audit(audit, 2),
        of_audit(audit and compared_rows > 0, *shape[:2], 4),
    )


_prefill_op.register_autograd(_refuse_backward)


class _Attend(torch.autograd.Function):
    """run_attend as a node of the graph whose backward is refused."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, index: Any, options: dict[str, Any]) -> Any:
        out, lse = attention.run_attend(q, k, v, index, **options)
        return out if lse is None else (out, lse)

    backward = staticmethod(_refuse_backward)


def _check_kind(*tensors: tuple[Any, str]) -> None:
    for tensor, name in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor as q is, got {type(tensor)}")


def _check_out(*inputs: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise RuntimeError(
            "out: expected inputs that require no gradient when out is given (call under "
            "torch.no_grad())"
        )


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    return_lse: bool,
    audit: bool,
    min_kept_mass: float | None,
    compared_rows: int,
    out: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, AuditRows | None]:
    """attention.run_prefill through the op, which torch.compile and autograd know."""
    _check_kind((k, "k"), (v, "v"))
    if out is not None:
        _check_out(q, k, v, out)
        return attention.run_prefill(
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
    for name, rank in _LENGTHS.items():
        lengths = options[name]
        if lengths is not None and not isinstance(lengths, torch.Tensor):
            options[name] = torch.from_numpy(int32_array(lengths, name, rank))
    result, lse, *figures = _prefill_op(
        q,
        k,
        v,
        pattern.name,
        pattern.values(),
        return_lse=return_lse,
        audit=audit,
        min_kept_mass=min_kept_mass,
        compared_rows=compared_rows,
        **options,
    )
    rows = None
    if audit:
        heads, guard, comparison = figures  # what was not asked for lies beside q
        rows = AuditRows(
            heads.numpy(), guard.numpy(), comparison.numpy() if compared_rows > 0 else None
        )
    return result, lse if return_lse else None, rows


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: BlockIndex | None,
    *,
    return_lse: bool,
    out: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """attention.run_attend, known to autograd."""
    _check_kind((k, "k"), (v, "v"))
    if out is not None:
        _check_out(q, k, v, out)
        return attention.run_attend(q, k, v, index, return_lse=return_lse, out=out, **options)
    apply: Callable[..., Any] = _Attend.apply
    result = apply(q, k, v, index, {"return_lse": return_lse, **options})
    return result if return_lse else (result, None)

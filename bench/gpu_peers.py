"""The attention kernels that gpu_bench.py compares with: each makes a call from the same tensors.

A peer takes q ``[b, s_q, h_q, d]``, k and v ``[b, s_kv, h_kv, d]`` and returns a function without
arguments that computes causal attention, bottom-right aligned, and returns
``[b, s_q, h_q, d]``; or it raises Unavailable with the reason. What a peer prepares beforehand
(layouts that it likes better, its tables of blocks) is not part of the time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Call = Callable[[], Any]
BLOCK = 128


class Unavailable(Exception):
    """A peer that cannot run here, and why."""


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        raise Unavailable(f"{type(error).__name__}: {error}".splitlines()[0]) from None


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    if q.shape[1] != k.shape[1]:
        raise Unavailable("scaled_dot_product_attention aligns a chunk's mask at the top left")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.transpose(1, 2)

    return call


cudnn = functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
flash_attention_2 = functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)


def flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    function = _import("fa3_fwd_interface").flash_attn_func

    def call() -> torch.Tensor:
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return call


# ---- Blocks: the same kept blocks as tables


def tables(kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Counts and key blocks of ``kept`` [h, n, n]: of those that the diagonal cuts, and of the full
    ones: int32 [1, h, n], [1, h, n, n] each, as flex_attention and FlashAttention-4 take them."""
    n = kept.shape[-1]
    diagonal = torch.eye(n, dtype=torch.bool, device=kept.device)
    found: list[torch.Tensor] = []
    for blocks in (kept & diagonal, kept & ~diagonal):
        order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
        found += [blocks.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]]
    return tuple(found)


def flash_attention_4_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor
) -> Call:
    interface = _import("flash_attn.cute.interface")
    sparsity = _import("flash_attn.cute.block_sparsity")
    mask_mod = _cute_causal()
    blocks = sparsity.BlockSparseTensorsTorch(*tables(kept), block_size=(BLOCK, BLOCK))

    def call() -> torch.Tensor:
        out = interface.flash_attn_func(
            q, k, v, causal=False, mask_mod=mask_mod, block_sparse_tensors=blocks, pack_gqa=False
        )
        return out[0] if isinstance(out, tuple) else out

    return call


@functools.cache
def _cute_causal() -> Any:
    cute = _import("cutlass.cute")

    @cute.jit
    def causal(batch: Any, head: Any, m_idx: Any, n_idx: Any, seqlen_info: Any, aux: Any) -> Any:
        return m_idx >= n_idx

    return causal


def _causal(b: Any, h: Any, q_row: Any, key: Any) -> Any:
    return q_row >= key


@functools.cache
def _compiled_flex_attention() -> Any:
    # Beyond the limit, torch would run it as plain operations, with every score in memory.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex_attention_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None = None
) -> Call:
    """torch's flex_attention, over ``kept`` [h, n, n] or all causal blocks."""
    n = q.shape[1]
    if n != k.shape[1] or n % BLOCK:
        raise Unavailable("measured for whole prompts of whole blocks")
    if kept is None:
        kept = torch.ones(1, n // BLOCK, n // BLOCK, dtype=torch.bool, device=q.device).tril()
    mask = BlockMask.from_kv_blocks(
        *tables(kept), BLOCK_SIZE=BLOCK, mask_mod=_causal, seq_lengths=(n, n)
    )
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    function = _compiled_flex_attention()
    gqa = q.shape[1] != k.shape[1]
    return lambda: function(q, k, v, block_mask=mask, enable_gqa=gqa).transpose(1, 2)


# ---- Selection and attention of others


def published(folder: Path | None, **settings: Any) -> Callable[..., Call]:
    """The published Triton code (github.com/bytedance/FlexPrefill), from a checkout of it."""
    function = _published_function(folder).flex_prefill_attention
    return lambda q, k, v: lambda: function(q, k, v, **settings)


@functools.cache
def _published_function(folder: Path | None) -> Any:
    if folder is None:
        raise Unavailable("no --published FOLDER given")
    file = folder / "flex_prefill" / "ops" / "flex_prefill_attention.py"
    spec = importlib.util.spec_from_file_location("published_flex_prefill", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise Unavailable(f"no {file}")
    module = importlib.util.module_from_spec(spec)  # by its file: the package has our name
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Unavailable(str(error)) from None
    if "h200" in (getattr(module, "GPU_NAME", None) or ""):
        module.GPU_NAME = "nvidia h100"  # its table of warps and stages knows that name
    return module


def flash_prefill_v2(
    folder: Path | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: float
) -> tuple[Call, Call]:
    """FlashPrefill V2 (github.com/qhfan/FlashPrefillv2), built in folder: (index, attention)."""
    if folder is None:
        raise Unavailable("no --flash-prefill FOLDER given")
    for path in (folder / "flashprefill_ops", folder):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    stage = _import("flashprefill").FlashPrefill(abs_threshold=alpha, k_block_n=BLOCK)
    (_, n, h_q, d), h_kv, page = q.shape, k.shape[2], 64
    pages = [x.reshape(n // page, page, h_kv, d) for x in (k, v)]
    table = torch.arange(n // page, dtype=torch.int32, device=q.device)[None]
    lengths = torch.tensor([n], dtype=torch.int32, device=q.device)
    starts = torch.tensor([0, n], dtype=torch.int32, device=q.device)
    rows = q.reshape(n, h_q, d)

    def select() -> Any:
        return stage.index_select(
            rows, pages[0], table, lengths, starts, v_cache=pages[1], q_lens=(n,),
            max_cache_seqlen=n,
        )  # fmt: skip

    index = select()
    return select, lambda: stage.block_sparse_attention(
        rows, *pages, table, lengths, starts, index, max_seqlen_q=n
    )

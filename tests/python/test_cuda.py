"""Tensors on a GPU: the CPU backend's results, on torch's stream, in graphs and compiled."""

import flex_prefill as fp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (fp.info()["cuda"]["devices"] and torch.cuda.is_available()),
        reason="a CUDA build and a GPU",
    ),
]

DTYPES = [torch.bfloat16, torch.float16]
PATTERNS = [
    fp.Dense(),
    fp.FlexPrefill(gamma=0.9, min_budget=256),
    fp.FlexPrefill(gamma=0.8, tau=1, min_budget=128),
    fp.VerticalSlash(256, 256),
    fp.StreamingLlm(100, 300),
    fp.XAttention(16, 0.8),
    fp.FlashPrefill(0.5, 128, 128, 128),
    fp.BlockCover(0.7),
    fp.MInference(
        [
            fp.MInferenceHead("a_shape", 100, 300),
            fp.MInferenceHead("vertical_slash", 256, 256),
            fp.MInferenceHead("block_sparse", 512, 0),
            fp.MInferenceHead("block_sparse", 256, 0),
        ]
    ),
]


def named():
    """The card's backend by its name: the pattern as asked for, also where dense is faster."""
    return {"backend": "sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80"}


def inputs(s=1500, h_q=4, h_kv=2, d=64, dtype=torch.bfloat16, b=1, seed=0):
    """On the GPU; heads look at some keys more than at others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = normal(b, s, h_q, d) + 2 * normal(1, 1, h_q, d)
    k = normal(b, s, h_kv, d) * (1 + 2 * (torch.rand(b, s, 1, 1, generator=generator) < 0.02))
    return [x.to(dtype).cuda() for x in (q, k, normal(b, s, h_kv, d))]


def close(got, expected, dtype):
    """What rounding in the element type explains."""
    rtol = {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got.float().cpu(), expected.float().cpu(), rtol=rtol, atol=rtol / 2)


def on_cpu(tensors):
    return [x.cpu() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128, 80])
@pytest.mark.parametrize("block_size", [128, 64, 32])
def test_attend_agrees_with_the_cpu(dtype, d, block_size):
    tensors = inputs(d=d, dtype=dtype)
    pattern = fp.FlexPrefill(gamma=0.9, min_budget=128)
    index = fp.select(*on_cpu(tensors[:2]), pattern, block_size=block_size)
    for rows in (None, index):
        out, lse = fp.attend(*tensors, rows, block_size=block_size, return_lse=True)
        expected, expected_lse = fp.attend(
            *on_cpu(tensors), rows, block_size=block_size, return_lse=True
        )
        assert out.is_cuda
        assert lse.is_cuda
        close(out, expected, dtype)
        torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_index_stays_on_the_gpu_and_is_the_cpus(pattern):
    tensors = inputs()
    index, audit = fp.select(*tensors[:2], pattern, audit=True)
    expected, expected_audit = fp.select(*on_cpu(tensors[:2]), pattern, audit=True)
    assert index.device == "cuda:0"
    assert index.indptr.is_cuda
    assert index.indices.is_cuda
    index.check()
    # A score within rounding of a threshold may fall on either side of it.
    assert abs(index.density - expected.density) < 0.02
    same = np.mean([
        np.mean(index.to_mask(0, h) == expected.to_mask(0, h)) for h in range(index.h_q)
    ])  # fmt: skip
    assert same > 0.98
    np.testing.assert_array_equal(audit.pattern, expected_audit.pattern)
    np.testing.assert_allclose(audit.kept_mass, expected_audit.kept_mass, atol=0.02)
    # The index from the GPU, there and on the CPU, and as part of prefill.
    out = fp.attend(*tensors, index)
    close(out, fp.attend(*on_cpu(tensors), index), torch.bfloat16)
    torch.testing.assert_close(out, fp.attend(*tensors, index.cpu()), rtol=0, atol=0)
    torch.testing.assert_close(out, fp.prefill(*tensors, pattern, **named()), rtol=0, atol=0)


def test_the_automatic_choice_is_dense_where_that_is_faster():
    tensors = inputs(s=1024)
    pattern = fp.FlexPrefill(gamma=0.5, min_budget=128)
    out = fp.prefill(*tensors, pattern)
    torch.testing.assert_close(out, fp.attend(*tensors), rtol=0, atol=0)
    asked = fp.prefill(*tensors, pattern, **named())
    assert not torch.equal(out, asked)
    audited, audit = fp.prefill(*tensors, pattern, audit=True)
    torch.testing.assert_close(audited, asked, rtol=0, atol=0)
    assert audit.mean_density < 1


def test_a_floor_of_the_kept_mass():
    tensors = inputs(s=2048)
    low = fp.FlexPrefill(gamma=0.5, min_budget=128)
    plain, before = fp.prefill(*tensors, low, audit=True)
    least = before.kept_mass.min()
    out, audit = fp.prefill(*tensors, low, audit=True, min_kept_mass=least / 2)
    assert audit.guard is None
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    raised, audit = fp.prefill(*tensors, low, audit=True, min_kept_mass=least + 0.001)
    assert audit.guard.startswith("gamma 0.")
    gamma = float(audit.guard.split()[1])
    expected = fp.prefill(*tensors, fp.FlexPrefill(gamma, min_budget=128), **named())
    torch.testing.assert_close(raised, expected, rtol=0, atol=0)
    out, audit = fp.prefill(*tensors, fp.VerticalSlash(128, 128), audit=True, min_kept_mass=1)
    assert audit.guard == "dense"
    torch.testing.assert_close(out, fp.attend(*tensors), rtol=0, atol=0)
    with pytest.raises(fp.UnsupportedError, match="compared_rows: the comparison with dense"):
        fp.prefill(*tensors, low, audit=True, compared_rows=8)


def test_packed_paged_and_chunked():
    q, k, v = inputs(s=1024)
    pattern = fp.FlexPrefill(min_budget=128)
    whole = fp.prefill(q, k, v, pattern, **named())
    starts = [0, 1024]
    packed = fp.prefill(
        q[0],
        k[0],
        v[0],
        pattern,
        cu_seqlens_q=starts,
        cu_seqlens_kv=torch.tensor(starts),
        **named(),
    )
    torch.testing.assert_close(packed[None], whole, rtol=0, atol=0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    pages_k, pages_v = (
        torch.empty_like(x[0]).view(16, 64, 2, 64).index_copy_(
            0, order.cuda(), x[0].view(16, 64, 2, 64)
        )
        for x in (k, v)
    )  # fmt: skip
    table = order[None].to(torch.int32).cuda()
    paged = fp.prefill(q, pages_k, pages_v, pattern, page_table=table, seqlens_kv=[1024], **named())
    torch.testing.assert_close(paged, whole, rtol=0, atol=0)
    chunk = fp.prefill(q[:, -300:], k, v, fp.Dense())
    close(chunk, fp.prefill(q, k, v, fp.Dense())[:, -300:], torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"page_table: expected int32 in CUDA memory, got torch\.int64"
    ):
        fp.prefill(q, pages_k, pages_v, page_table=table.long(), seqlens_kv=[1024])
    with pytest.raises(ValueError, match="page_table: expected a tensor on cuda:0 as q is"):
        fp.prefill(q, pages_k, pages_v, page_table=table.cpu(), seqlens_kv=[1024])


def test_what_is_refused():
    q, k, v = inputs(s=64)
    with pytest.raises(fp.UnsupportedError, match=r"q: expected bfloat16 or float16.*float32"):
        fp.prefill(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="k: expected a tensor on cuda:0 as q is, got one on cpu"):
        fp.prefill(q, k.cpu(), v)
    with pytest.raises(ValueError, match="out: expected a tensor on cuda:0"):
        fp.prefill(q, k, v, out=torch.empty_like(q, device="cpu"))
    with pytest.raises(ValueError, match=r'backend: expected "auto" or "cuda" .* got "cpu"'):
        fp.prefill(q, k, v, backend="cpu")
    starts = torch.tensor([0, 64], dtype=torch.int32).cuda()
    with pytest.raises(ValueError, match="cu_seqlens_q: expected lengths on the CPU"):
        fp.prefill(q[0], k[0], v[0], cu_seqlens_q=starts, cu_seqlens_kv=starts)
    index = fp.select(*inputs(s=1024)[:2], fp.FlexPrefill(min_budget=128))
    with pytest.raises(ValueError, match="index: expected sequences"):
        fp.attend(q, k, v, index)


def test_another_stream():
    tensors = inputs(s=4096)
    expected = fp.prefill(*tensors, **named())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on the wrong stream reads zeros
        late = [torch.zeros_like(x) for x in tensors]
        for x, y in zip(late, tensors, strict=True):
            x.copy_(y)
        out = fp.prefill(*late, **named())
        index = fp.select(*late[:2])
        attended = fp.attend(*late, index)
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(attended, expected, rtol=0, atol=0)


def test_nothing_waits():
    tensors = inputs(s=4096)
    fp.attend(*tensors, fp.select(*tensors[:2]))
    fp.attend(*tensors)
    fp.prefill(*tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # half a second
        done = torch.cuda.Event()
        done.record()
        fp.prefill(*tensors)
        fp.attend(*tensors, fp.select(*tensors[:2]))
        fp.attend(*tensors)
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_cuda_graph(pattern):
    tensors = inputs(s=2048)
    other = inputs(s=2048, seed=1)
    expected = [fp.prefill(*x, pattern, return_lse=True, **named()) for x in (tensors, other)]
    static = [x.clone() for x in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = fp.prefill(*static, pattern, return_lse=True, **named())
        two_stages = fp.attend(*static, fp.select(*static[:2], pattern))
    for given, (expected_out, expected_lse) in zip((tensors, other), expected, strict=True):
        for x, y in zip(static, given, strict=True):
            x.copy_(y)
        graph.replay()
        torch.testing.assert_close(out, expected_out, rtol=0, atol=0)
        torch.testing.assert_close(two_stages, expected_out, rtol=0, atol=0)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)


def test_what_waits_is_refused_in_a_capture():
    tensors = inputs(s=2048)
    index = fp.select(*tensors[:2]).cpu()
    for call in (
        lambda: fp.prefill(*tensors, audit=True),
        lambda: fp.prefill(*tensors, min_kept_mass=0.5),
        lambda: fp.attend(*tensors, index),
    ):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(fp.UnsupportedError, match="captured"), torch.cuda.graph(graph):
            call()
        torch.cuda.synchronize()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    def layer(q, k, v):
        out, lse = fp.prefill(q * 1, k, v, fp.FlexPrefill(min_budget=128), return_lse=True)
        return out.transpose(1, 2) + lse[..., None].to(out.dtype)

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(3):
        tensors = inputs(s=2048, seed=seed)
        # The compiled sum is not rounded to bf16 in between: one unit in the last place of it or
        # of lse.
        torch.testing.assert_close(
            compiled(*tensors).clone(), layer(*tensors), rtol=2**-7, atol=0.04
        )


def test_opcheck():
    q, k, v = inputs(s=600)
    fp.prefill(q, k, v)
    pattern = fp.FlexPrefill(min_budget=128)
    for audit in (False, True):
        torch.library.opcheck(
            torch.ops.flex_prefill.prefill.default,
            (q, k, v, pattern.name, pattern.values(), None, None, None, None, None, False, 128,
             "auto", "auto", 0, True, audit, 0.5 if audit else None, 0),
        )  # fmt: skip


def test_the_workspace_is_torchs():
    tensors = inputs(s=4096)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    size = fp.prefill_workspace_size(*tensors)
    out = fp.prefill(*tensors)
    grown = torch.cuda.max_memory_allocated() - before
    assert size <= grown <= size + out.nbytes + 4096


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_the_tensors_device_is_the_calls():
    tensors = inputs()
    expected = fp.prefill(*tensors)
    moved = [x.to("cuda:1") for x in tensors]
    assert torch.cuda.current_device() == 0
    out = fp.prefill(*moved)
    assert out.device.index == 1
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(out.cpu(), expected.cpu(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="k: expected a tensor on cuda:1 as q is"):
        fp.prefill(moved[0], tensors[1], moved[2])


@pytest.mark.parametrize("framework", ["cupy", "jax"])
def test_other_frameworks(framework):
    module = pytest.importorskip(framework)
    tensors = inputs(s=1500, dtype=torch.float16)
    pattern = fp.FlexPrefill(min_budget=128)
    expected, expected_lse = fp.prefill(*tensors, pattern, return_lse=True, **named())
    if framework == "jax":
        if not any(device.platform == "gpu" for device in module.devices()):
            pytest.skip("JAX without a GPU")
        theirs = [module.dlpack.from_dlpack(x.contiguous()) for x in tensors]
    else:
        theirs = [module.from_dlpack(x) for x in tensors]
    torch.cuda.synchronize()
    out, lse = fp.prefill(*theirs, pattern, return_lse=True, **named())
    index = fp.select(*theirs[:2], pattern)
    attended = fp.attend(*theirs, index)
    assert type(out) is type(theirs[0])
    for got, wanted in ((out, expected), (attended, expected), (lse, expected_lse)):
        torch.testing.assert_close(torch.from_dlpack(got), wanted, rtol=0, atol=0)

"""prefill, select and attend against NumPy in float64, on every layout."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import flex_prefill as fp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, attention, grid, select_flex_prefill, visible

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BACKENDS = ["cpu", "reference"]


def rounder(dtype):
    return lambda x: x.astype(DTYPES[dtype]).astype(np.float32)


def normal(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def kv_head(h, h_q, h_kv, interleave):
    return h % h_kv if interleave else h // (h_q // h_kv)


def structured(rng, s_q, s_kv, h_q, h_kv, d):
    """Inputs whose heads look at the first keys, at near keys and at a few heavy ones."""
    q, k = normal(rng, 1, s_q, h_q, d), normal(rng, 1, s_kv, h_kv, d)
    q += 1.5 * rng.standard_normal((1, 1, h_q, d)).astype(np.float32)
    for kv in range(h_kv):
        mean = q[0, :, kv * (h_q // h_kv)].mean(axis=0)
        heavy = np.concatenate([[0, 1], rng.integers(0, s_kv, 12)])
        k[0, heavy, kv] += 1.2 * mean
    return q, k, normal(rng, 1, s_kv, h_kv, d)


@st.composite
def shapes(draw, most=300):
    s_kv = draw(st.integers(1, most))
    return {
        "s_q": draw(st.integers(1, s_kv)),
        "s_kv": s_kv,
        "h_kv": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 3)),
        "d_qk": 8 * draw(st.integers(2, 10)),
        "d_v": 8 * draw(st.integers(2, 10)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    shape=shapes(),
    b=st.integers(1, 2),
    block_size=st.sampled_from([32, 64, 128]),
    interleave=st.booleans(),
    heads_first=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=25, deadline=None)
def test_attend(shape, b, block_size, interleave, heads_first, scale, backend, dtype):
    rng = np.random.default_rng(shape["seed"])
    s_q, s_kv, h_kv = shape["s_q"], shape["s_kv"], shape["h_kv"]
    h_q = h_kv * shape["group"]

    def tensor(s, h, d):
        if heads_first:  # [b, h, s, d] in memory, as transformers has them
            return normal(rng, b, h, s, d, dtype=dtype).transpose(0, 2, 1, 3)
        return normal(rng, b, s, h, d, dtype=dtype)

    q = tensor(s_q, h_q, shape["d_qk"])
    k, v = tensor(s_kv, h_kv, shape["d_qk"]), tensor(s_kv, h_kv, shape["d_v"])
    masks = []
    for _ in range(b):
        first, n_q, n_kv = grid(s_q, s_kv, block_size)
        causal = np.arange(n_kv)[None, :] <= first + np.arange(n_q)[:, None]
        masks.append((rng.random((h_q, n_q, n_kv)) < 0.6) & causal)
    index = fp.BlockIndex.from_mask(masks, [(s_q, s_kv)] * b, block_size)
    out, lse = fp.attend(
        q,
        k,
        v,
        index,
        return_lse=True,
        block_size=block_size,
        gqa_interleave=interleave,
        softmax_scale=scale,
        backend=backend,
    )
    assert out.shape == (b, s_q, h_q, shape["d_v"])
    assert out.dtype == q.dtype
    assert lse.shape == (b, h_q, s_q)
    assert lse.dtype == np.float32
    for s in range(b):
        for h in range(h_q):
            kv = kv_head(h, h_q, h_kv, interleave)
            one = (q[s, :, h], k[s, :, kv], v[s, :, kv])
            seen = visible(s_q, s_kv, block_size, masks[s][h])
            assert_close(out[s, :, h], *one, seen, scale, dtype, rounder(dtype))
            np.testing.assert_allclose(lse[s, h], attention(*one, seen, scale)[1], 1e-5, 1e-5)


@given(
    lengths=st.lists(
        st.integers(1, 200).flatmap(lambda s: st.tuples(st.integers(1, s), st.just(s))),
        min_size=1,
        max_size=4,
    ),
    paged=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=25, deadline=None)
def test_packed_and_paged(lengths, paged, backend):
    rng = np.random.default_rng(len(lengths))
    h_q, h_kv, d, page_size = 4, 2, 32, 16
    q = normal(rng, sum(s_q for s_q, _ in lengths), h_q, d)
    ks = [normal(rng, s_kv, h_kv, d) for _, s_kv in lengths]
    vs = [normal(rng, s_kv, h_kv, d) for _, s_kv in lengths]
    starts = np.cumsum([0] + [s_q for s_q, _ in lengths])
    if paged:
        counts = [-(-s_kv // page_size) for _, s_kv in lengths]
        order = rng.permutation(sum(counts) + 2)  # two pages that nobody has
        cache = np.full((len(order), page_size, 2, h_kv, d), np.nan, np.float32)
        table = np.full((len(lengths), max(counts)), -1)  # what is not needed is not read
        for s, count in enumerate(counts):
            table[s, :count], order = order[:count], order[count:]
            for i, (key, value) in enumerate(zip(ks[s], vs[s], strict=True)):
                cache[table[s, i // page_size], i % page_size] = key, value
        k, v = cache[:, :, 0], cache[:, :, 1]
        layout = {"page_table": table, "seqlens_kv": [s_kv for _, s_kv in lengths]}
    else:
        k, v = np.concatenate(ks), np.concatenate(vs)
        layout = {"cu_seqlens_kv": np.cumsum([0] + [s_kv for _, s_kv in lengths])}
    out, lse = fp.attend(q, k, v, cu_seqlens_q=starts, return_lse=True, backend=backend, **layout)
    assert lse.shape == (h_q, len(q))
    for s, (s_q, s_kv) in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        for h in range(h_q):
            one = (q[rows, h], ks[s][:, h // 2], vs[s][:, h // 2])
            seen = visible(s_q, s_kv, 128)
            assert_close(out[rows, h], *one, seen)
            np.testing.assert_allclose(lse[h, rows], attention(*one, seen)[1], 1e-5, 1e-5)


def bits(array):
    return np.asarray(array).view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_a_sequence_is_pruned_as_if_it_were_alone(layout, dtype, framework):
    """Sparse, with lse, audit and index: to the bit what each sequence gives by itself."""
    lengths, page_size = [(400, 400), (150, 555), (20, 700)], 64
    rng = np.random.default_rng(3)
    alone = [[x.astype(DTYPES[dtype]) for x in structured(rng, *s, 4, 2, 32)] for s in lengths]
    q = np.concatenate([x[0][0] for x in alone])
    starts = np.cumsum([0] + [s_q for s_q, _ in lengths])
    if layout == "packed":
        k, v = (np.concatenate([x[i][0] for x in alone]) for i in (1, 2))
        options = {"cu_seqlens_kv": np.cumsum([0] + [s_kv for _, s_kv in lengths])}
    else:
        counts = [-(-s_kv // page_size) for _, s_kv in lengths]
        pages = rng.permutation(sum(counts))
        k, v = np.zeros((2, len(pages), page_size, 2, 32), DTYPES[dtype])
        table = np.zeros((len(lengths), max(counts)), np.int32)
        for s, (_, s_kv) in enumerate(lengths):
            table[s, : counts[s]], pages = pages[: counts[s]], pages[counts[s] :]
            for i in range(s_kv):
                page = table[s, i // page_size], i % page_size
                k[page], v[page] = alone[s][1][0, i], alone[s][2][0, i]
        options = {"page_table": table, "seqlens_kv": [s_kv for _, s_kv in lengths]}
    pattern = fp.FlexPrefill(gamma=0.7, min_budget=64)
    both = {"block_size": 32, "audit": True}
    options |= {"cu_seqlens_q": starts, **both}
    given = (q, k, v)
    if framework == "torch":
        torch = pytest.importorskip("torch")
        integers = np.int16 if q.dtype.itemsize == 2 else np.int32
        of = getattr(torch, dtype)
        given = [torch.from_numpy(x.view(integers)).view(of) for x in (q, k, v)]
    out, lse, audit = fp.prefill(*given, pattern, return_lse=True, **options)
    index, _ = fp.select(*given[:2], pattern, **options)
    if framework == "torch":
        out = out.view(getattr(torch, np.dtype(integers).name)).numpy().view(DTYPES[dtype])
        lse = lse.numpy()
    assert 0 < audit.mean_density < 0.9
    for s, one in enumerate(alone):
        rows = slice(starts[s], starts[s + 1])
        one_out, one_lse, one_audit = fp.prefill(*one, pattern, return_lse=True, **both)
        np.testing.assert_array_equal(bits(out[rows]), bits(one_out[0]))
        np.testing.assert_array_equal(lse[:, rows], one_lse[0])
        for field in ("pattern", "density", "kept_mass", "vertical_blocks", "slash_blocks"):
            np.testing.assert_array_equal(getattr(audit, field)[s], getattr(one_audit, field)[0])
        for h in range(4):
            kept = fp.select(*one[:2], pattern, block_size=32).to_mask(0, h)
            np.testing.assert_array_equal(index.to_mask(s, h), kept)


SELECT_CASES = {
    "one block size of 32": dict(s_q=700, s_kv=700, block_size=32),
    "ragged": dict(s_q=1111, s_kv=1111, block_size=128),
    "chunk that starts inside a block": dict(s_q=500, s_kv=933, block_size=64),
    "query-aware heads": dict(s_q=600, s_kv=600, block_size=32, tau=1.0),
    "budgets": dict(s_q=900, s_kv=900, block_size=64, min_budget=150, max_budget=300),
    "low gamma, scale": dict(s_q=800, s_kv=800, block_size=64, gamma=0.4, scale=0.5),
    "dense: minimum budget": dict(s_q=640, s_kv=640, block_size=64, min_budget=640),
    "dense: short chunk": dict(s_q=64, s_kv=640, block_size=64),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SELECT_CASES)
def test_select(name, backend):
    case = {"gamma": 0.9, "tau": 0.1, "min_budget": 64, "max_budget": None, "scale": None}
    case |= SELECT_CASES[name]
    pattern = fp.FlexPrefill(*(case[x] for x in ("gamma", "tau", "min_budget", "max_budget")))
    q, k, _ = structured(np.random.default_rng(7), case["s_q"], case["s_kv"], 4, 2, 32)
    index, audit = fp.select(
        q,
        k,
        pattern,
        block_size=case["block_size"],
        softmax_scale=case["scale"],
        audit=True,
        backend=backend,
    )
    densities = []
    for h in range(4):
        mask, kind = select_flex_prefill(
            q[0, :, h],
            k[0, :, h // 2],
            case["block_size"],
            *(case[x] for x in ("gamma", "tau", "min_budget", "max_budget", "scale")),
        )
        np.testing.assert_array_equal(index.to_mask(0, h), mask)
        assert audit.pattern[0, h] == kind
        first, n_q, n_kv = grid(case["s_q"], case["s_kv"], case["block_size"])
        causal = sum(min(first + i, n_kv - 1) + 1 for i in range(n_q))
        densities.append(mask.sum() / causal)
    np.testing.assert_allclose(audit.density[0], densities, 1e-6)
    np.testing.assert_allclose([index.density, audit.mean_density], np.mean(densities), 1e-6)
    if name == "query-aware heads":
        assert (audit.pattern == "query_aware").all()
    elif name.startswith("dense"):
        assert index.density == 1
    else:
        assert index.density < 1


PATTERNS = [
    fp.Dense(),
    fp.FlexPrefill(min_budget=64),
    fp.FlexPrefill(gamma=0.5, tau=1, min_budget=64, max_budget=128),
    fp.VerticalSlash(64, 128),
    fp.StreamingLlm(50, 100),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_prefill_is_select_and_attend(pattern, backend):
    s_q, s_kv, block_size = 417, 600, 32
    q, k, v = structured(np.random.default_rng(3), s_q, s_kv, 4, 2, 32)
    options = {"block_size": block_size, "backend": backend}
    out, lse, audit = fp.prefill(q, k, v, pattern, return_lse=True, audit=True, **options)
    index, select_audit = fp.select(q, k, pattern, audit=True, **options)
    attend_out, attend_lse = fp.attend(q, k, v, index, return_lse=True, **options)
    np.testing.assert_array_equal(out, attend_out)
    np.testing.assert_array_equal(lse, attend_lse)
    assert audit.mean_density == pytest.approx(index.density)
    for field in ("pattern", "vertical_blocks", "slash_blocks", "density"):
        np.testing.assert_array_equal(getattr(audit, field), getattr(select_audit, field))
    windows = (50, 100) if isinstance(pattern, fp.StreamingLlm) else None
    for h in range(4):
        seen = visible(s_q, s_kv, block_size, index.to_mask(0, h), windows)
        assert_close(out[0, :, h], q[0, :, h], k[0, :, h // 2], v[0, :, h // 2], seen)
    if not isinstance(pattern, fp.Dense):
        assert index.density < 1


def test_kept_mass_is_what_the_probe_sees():
    q, k, v = structured(np.random.default_rng(5), 640, 640, 2, 1, 32)
    _, audit = fp.prefill(q, k, v, fp.FlexPrefill(min_budget=64), block_size=64, audit=True)
    index = fp.select(q, k, fp.FlexPrefill(min_budget=64), block_size=64)
    for h in range(2):
        probe = (q[0, -64:, h], k[0, :, 0], v[0, :, 0])
        _, every = attention(*probe, visible(64, 640, 64))
        _, kept = attention(*probe, visible(64, 640, 64, index.to_mask(0, h)[-1:]))
        assert audit.kept_mass[0, h] == pytest.approx(np.exp(kept - every).mean(), abs=1e-5)


def test_the_output_is_written_where_asked():
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 1, 90, 4, 32), normal(rng, 1, 90, 2, 32), normal(rng, 1, 90, 2, 32)
    expected = fp.prefill(q, k, v)
    memory = np.full((1, 4, 90, 40), 7, np.float32)
    view = memory[..., 4:36].transpose(0, 2, 1, 3)
    assert fp.prefill(q, k, v, out=view) is view
    np.testing.assert_array_equal(view, expected)
    assert (memory[..., :4] == 7).all()
    assert (memory[..., 36:] == 7).all()
    assert fp.attend(q, k, v, out=view, return_lse=True)[0] is view


def test_threads_do_not_change_the_result():
    q, k, v = structured(np.random.default_rng(1), 500, 500, 4, 2, 64)
    one, two = (
        fp.prefill(q, k, v, fp.FlexPrefill(min_budget=64), block_size=32, num_threads=n)
        for n in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("target", fp.info()["cpu_targets"])
def test_cpu_targets_agree(target):
    q, k, v = structured(np.random.default_rng(2), 300, 300, 2, 1, 64)
    out = fp.attend(q, k, v, backend="cpu", cpu_target=target)
    for h in range(2):
        assert_close(out[0, :, h], q[0, :, h], k[0, :, 0], v[0, :, 0], visible(300, 300, 128))


def test_nan_and_inf_stay_where_dense_attention_has_them():
    q, k, v = structured(np.random.default_rng(4), 200, 200, 2, 1, 32)
    v[0, 150, 0, 3] = np.nan
    q[0, 20, 1] = np.inf
    out = fp.prefill(q, k, v, fp.Dense())
    expected = np.zeros_like(out, dtype=bool)
    expected[0, 150:, :, 3] = True
    expected[0, 20, 1] = True
    np.testing.assert_array_equal(np.isnan(out), expected)


class TestPublishedFunction:
    def test_is_prefill_with_the_published_defaults(self):
        q, k, v = structured(np.random.default_rng(8), 900, 900, 4, 2, 64)
        out, ratio = fp.flex_prefill_attention(
            q, k, v, 0.8, block_size=64, return_computational_ratio=True
        )
        pattern = fp.FlexPrefill(0.8, 0.0, 1)
        np.testing.assert_array_equal(out, fp.prefill(q, k, v, pattern, block_size=64))
        index = fp.select(q, k, pattern, block_size=64)
        assert ratio == len(index.indices) / (4 * 15 * 15)
        assert 0 < ratio < 0.5
        np.testing.assert_array_equal(fp.flex_prefill_attention(q, k, v, 0.8, block_size=64), out)

    def test_the_other_arguments_reach_the_call(self):
        q, k, v = structured(np.random.default_rng(9), 700, 700, 4, 2, 64)
        given_in_order = fp.flex_prefill_attention(q, k, v, 0.9, 1, 64, 256, True, 0.2, 32)
        pattern = fp.FlexPrefill(0.9, 1, 64, 256)
        np.testing.assert_array_equal(
            given_in_order,
            fp.prefill(q, k, v, pattern, gqa_interleave=True, softmax_scale=0.2, block_size=32),
        )

    @pytest.mark.parametrize(("s_q", "s_kv"), [(1, 700), (256, 256), (100, 700), (600, 600)])
    def test_ratio_is_one_where_attention_was_dense(self, s_q, s_kv):
        q, k, v = structured(np.random.default_rng(10), s_q, s_kv, 2, 1, 32)
        out, ratio = fp.flex_prefill_attention(
            q, k, v, 0.5, min_budget=640, return_computational_ratio=True
        )
        assert ratio == 1.0
        np.testing.assert_array_equal(out, fp.attend(q, k, v))

    def test_ratio_of_a_chunk_and_of_a_batch(self):
        q, k, v = structured(np.random.default_rng(11), 400, 900, 2, 1, 32)
        q, k, v = (np.concatenate([x, x[:, ::-1]]) for x in (q, k, v))
        _, ratio = fp.flex_prefill_attention(
            q, k, v, 0.5, block_size=32, return_computational_ratio=True
        )
        index = fp.select(q, k, fp.FlexPrefill(0.5, 0, 1), block_size=32)
        _, n_q, n_kv = grid(400, 900, 32)
        assert ratio == pytest.approx(len(index.indices) / (2 * 2 * n_q * n_kv), rel=1e-12)


@pytest.mark.parametrize("pattern", [fp.Dense(), fp.FlexPrefill()], ids=repr)
def test_workspace_of_a_long_prompt(pattern):
    q = np.zeros((1, 32768, 8, 128), np.float16)  # never touched
    k = np.zeros((1, 32768, 2, 128), np.float16)
    assert 0 < fp.prefill_workspace_size(q, k, k, pattern) <= 0.1 * (q.nbytes + 2 * k.nbytes)


def test_calls_from_many_threads():
    inputs = [structured(np.random.default_rng(seed), 300, 300, 4, 2, 32) for seed in range(6)]

    def call(x):
        return fp.prefill(*x, fp.FlexPrefill(min_budget=64), block_size=32)

    with ThreadPoolExecutor(6) as pool:
        for x, out in zip(inputs, pool.map(call, inputs), strict=True):
            np.testing.assert_array_equal(out, call(x))


def test_other_python_threads_run_during_a_call():
    q, k, v = structured(np.random.default_rng(0), 1500, 1500, 4, 2, 64)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(fp.attend, q, k, v, backend="reference")  # slow
        turns = 0
        while not call.done():
            time.sleep(0.001)
            turns += 1
    assert turns >= 5


def test_an_empty_batch():
    q, k = np.zeros((0, 9, 2, 32), np.float32), np.zeros((0, 9, 1, 32), np.float32)
    out, lse, audit = fp.prefill(q, k, k, return_lse=True, audit=True)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 9)
    assert audit.mean_density == 1


def test_importing_needs_no_torch():
    program = (
        "import sys, numpy as np\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import flex_prefill as fp\n"
        "x = np.ones((1, 40, 2, 16), np.float32)\n"
        "out, ratio = fp.flex_prefill_attention(x, x, x, .9, return_computational_ratio=True)\n"
        "assert np.allclose(out, 1) and ratio == 1\n"
        "assert fp.info()['threads'] >= 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    program = "import sys, flex_prefill; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)

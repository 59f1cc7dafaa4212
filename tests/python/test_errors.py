"""What bad input gets: an error that says what was expected and what came, nothing written."""

import flex_prefill as fp
import numpy as np
import pytest


def inputs():
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((1, 100, 4, 32)).astype(np.float32),
        "k": rng.standard_normal((1, 100, 2, 32)).astype(np.float32),
        "v": rng.standard_normal((1, 100, 2, 32)).astype(np.float32),
    }


def packed():
    starts = {"cu_seqlens_q": [0, 40, 100], "cu_seqlens_kv": [0, 40, 100]}
    return {name: x[0] for name, x in inputs().items()} | starts


def paged():
    x = inputs()
    pages = {name: x[name].reshape(5, 20, 2, 32)[:, :16].copy() for name in "kv"}
    return {"q": x["q"][:, :64], **pages, "page_table": [[3, 1, 4, 0]], "seqlens_kv": [64]}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


BATCH_ERRORS = {
    # Tensors: name, what it becomes, message.
    "rank": ("q", zeros(100, 32), "q: expected rank 4 .* or packed rank 3 .*, got rank 2"),
    "rank of k": ("k", zeros(100, 2, 32), "k: expected rank 4"),
    "rank 5": ("v", zeros(1, 1, 100, 2, 32), "v: expected rank 1 to 4, got rank 5"),
    "element type": ("q", zeros(1, 100, 4, 32, dtype=np.float64), "q: .* got float64"),
    "integers": ("k", zeros(1, 100, 2, 32, dtype=np.int32), "k: .* got int32"),
    "two types": ("v", zeros(1, 100, 2, 32, dtype=np.float16), "v: .*float32.*, got float16"),
    "heads": ("q", zeros(1, 100, 3, 32), r"q: expected .* multiple of h_kv = 2, got h_q = 3"),
    "no heads": ("q", zeros(1, 100, 0, 32), "q: expected a number of heads"),
    "head dim": ("q", zeros(1, 100, 4, 40), "k: expected shape .*40"),
    "head dim of v": ("v", zeros(1, 100, 2, 12), "v: expected a head dim .*, got 12"),
    "batch": ("q", zeros(2, 100, 4, 32), r"k: expected shape \[b = 2, .*got \[1, 100, 2, 32\]"),
    "more queries": ("q", zeros(1, 101, 4, 32), "expected 1 <= s_q <= s_kv, got s_q = 101"),
    "no queries": ("q", zeros(1, 0, 4, 32), "expected 1 <= s_q <= s_kv, got s_q = 0"),
    "v shorter": ("v", zeros(1, 99, 2, 32), "v: expected shape as k"),
    "stride": ("k", zeros(1, 100, 2, 64)[..., ::2], "k: expected a contiguous last dimension"),
    "transposed": (
        "q",
        zeros(1, 100, 32, 4).swapaxes(2, 3),
        r"q: expected a contiguous last dimension \(stride 1\), got stride 4",
    ),
    # Options.
    "block size": ("block_size", 16, "block_size: expected 32, 64 or 128, got 16"),
    "backend": (
        "backend",
        "gpu",
        'backend: expected "auto", "cpu", "reference", "cuda", "sm80" or "sm90", got "gpu"',
    ),
    "target": ("cpu_target", "sse", 'cpu_target: expected one of .*, got "sse"'),
    "threads": ("num_threads", -1, "num_threads: expected at least 0, got -1"),
    "scale": ("softmax_scale", float("nan"), "softmax_scale: expected a finite number, got nan"),
    "starts without packing": ("cu_seqlens_q", [0, 100], "cu_seqlens_q: expected packed q"),
    "starts of k": ("cu_seqlens_kv", [0, 100], "cu_seqlens_kv: expected packed q and k"),
}


@pytest.mark.parametrize("name", BATCH_ERRORS)
@pytest.mark.parametrize("call", [fp.prefill, fp.attend], ids=["prefill", "attend"])
def test_batch(name, call):
    argument, value, message = BATCH_ERRORS[name]
    arguments = inputs()
    out = np.full_like(arguments["q"], 7)
    arguments |= {argument: value}
    with pytest.raises(ValueError, match=message):
        call(**arguments, out=out)
    assert (out == 7).all()
    with pytest.raises(ValueError, match=message):
        call(**arguments, return_lse=True)


@pytest.mark.parametrize("name", [x for x in BATCH_ERRORS if BATCH_ERRORS[x][0] != "v"])
def test_select(name):
    argument, value, message = BATCH_ERRORS[name]
    arguments = inputs() | {argument: value}
    del arguments["v"]
    with pytest.raises(ValueError, match=message):
        fp.select(**arguments, audit=True)


LAYOUT_ERRORS = {
    "no starts": (packed, "cu_seqlens_q", None, r"cu_seqlens_q: expected \[b \+ 1\] starts"),
    "no starts of k": (packed, "cu_seqlens_kv", None, "cu_seqlens_kv: expected"),
    "late": (packed, "cu_seqlens_q", [1, 40, 100], "cu_seqlens_q: expected to begin with 0"),
    "descending": (packed, "cu_seqlens_q", [0, 110, 100], "cu_seqlens_q: expected ascending"),
    "early": (packed, "cu_seqlens_q", [0, 40, 99], "cu_seqlens_q: expected to end with .* 100"),
    "fewer": (packed, "cu_seqlens_kv", [0, 100], "cu_seqlens_kv: expected 3 entries"),
    "longer": (packed, "cu_seqlens_q", [0, 60, 100], "sequence 0: expected 1 <= s_q <= s_kv"),
    "empty": (packed, "cu_seqlens_q", [0, 0, 100], "sequence 0: expected 1 <= s_q <= s_kv"),
    "floats": (packed, "cu_seqlens_q", [0.0, 40.0, 100.0], "cu_seqlens_q: expected integers"),
    "rank": (packed, "cu_seqlens_q", [[0, 40, 100]], "cu_seqlens_q: expected rank 1, got rank 2"),
    "too big": (packed, "cu_seqlens_q", [0, 40, 2**40], "cu_seqlens_q: .* fit int32"),
    "no lengths": (paged, "seqlens_kv", None, "page_table: expected .* b = 0 .*, got 1 rows"),
    "more lengths": (paged, "seqlens_kv", [64, 64], "page_table: expected .* b = 2 .*, got 1"),
    "beyond": (paged, "seqlens_kv", [65], "seqlens_kv: expected at most .* 64 keys, got 65"),
    "page": (paged, "page_table", [[3, 1, 5, 0]], r"page_table: expected pages from 0 to 4, got 5"),
    "negative": (paged, "page_table", [[3, 1, -1, 0]], "page_table: expected pages .* got -1"),
    "table's rank": (paged, "page_table", [3, 1, 4, 0], "page_table: expected rank 2"),
    "two rows": (paged, "page_table", [[3, 1, 4, 0]] * 2, "page_table: .* b = 1 .*, got 2 rows"),
    "starts": (paged, "cu_seqlens_kv", [0, 64], "cu_seqlens_kv: expected none with a page_table"),
}


@pytest.mark.parametrize("name", LAYOUT_ERRORS)
def test_packed_and_paged(name):
    layout, argument, value, message = LAYOUT_ERRORS[name]
    out = np.full_like(layout()["q"], 7)
    fp.prefill(**layout(), audit=True)
    for call in (fp.prefill, fp.attend):
        with pytest.raises(ValueError, match=message):
            call(**(layout() | {argument: value}), out=out)
    assert (out == 7).all()


def test_pages_of_odd_size():
    pages = zeros(9, 8, 2, 32)
    with pytest.raises(ValueError, match="k: expected pages of a multiple of 16 rows, got 8"):
        fp.attend(inputs()["q"][:, :8], pages, pages, page_table=[[3]], seqlens_kv=[8])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (fp.FlexPrefill(gamma=float("nan")), r"gamma: expected a number in \(0, 1\], got .*nan"),
        (fp.FlexPrefill(gamma=0.0), r"gamma: expected a number in \(0, 1\]"),
        (fp.FlexPrefill(gamma=1.5), "gamma: expected a number"),
        (fp.FlexPrefill(tau=-0.1), r"tau: expected a number in \[0, 1\]"),
        (fp.FlexPrefill(tau=1.1), "tau: expected a number"),
        (fp.FlexPrefill(tau=float("nan")), r"tau: expected a number in \[0, 1\], got .*nan"),
        (fp.FlexPrefill(min_budget=-1), "min_budget: expected at least 0 tokens, got -1"),
        (fp.FlexPrefill(max_budget=-1), "max_budget: expected at least 0 tokens, got -1"),
        (fp.FlexPrefill(min_budget=10, max_budget=9), "max_budget: expected at least min_budget"),
        (fp.VerticalSlash(-1, 1), "vertical_size: expected at least 0"),
        (fp.VerticalSlash(1, -1), "slash_size: expected at least 0"),
        (fp.StreamingLlm(-1, 1), "global_window: expected at least 0"),
        (fp.StreamingLlm(1, 0), "local_window: expected at least 1"),
        (fp.BlockCover(gamma=0.0), r"gamma: expected a number in \(0, 1\]"),
        (fp.BlockCover(gamma=float("nan")), "gamma: expected a number"),
        (fp.BlockCover(column_share=-0.1), r"column_share: expected a number in \[0, 1\]"),
        (fp.BlockCover(column_share=1.1), "column_share: expected a number"),
        (fp.BlockCover(max_budget=-1), "max_budget: expected at least 0 tokens, got -1"),
    ],
    ids=repr,
)
def test_patterns(pattern, message):
    arguments = inputs()
    out = np.full_like(arguments["q"], 7)
    with pytest.raises(ValueError, match=message):
        fp.prefill(**arguments, pattern=pattern, out=out)
    assert (out == 7).all()
    with pytest.raises(ValueError, match=message):
        fp.select(arguments["q"], arguments["k"], pattern)
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=message):
        fp.prefill(*map(torch.from_numpy, arguments.values()), pattern)


def test_what_is_no_pattern():
    for pattern in ("flex_prefill", None, 0.9, fp.FlexPrefill):
        with pytest.raises(TypeError, match=r"^pattern: expected one of Dense, FlexPrefill"):
            fp.prefill(**inputs(), pattern=pattern)
        with pytest.raises(TypeError, match=r"^pattern: expected one of Dense, FlexPrefill"):
            fp.select(inputs()["q"], inputs()["k"], pattern)
    with pytest.raises(TypeError, match="nothing"):
        fp.prefill(**inputs(), nothing=1)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (zeros(1, 99, 4, 32), "out: expected .*shape"),
        (zeros(100, 4, 32), "out: expected rank 4"),
        (zeros(1, 100, 4, 32, dtype=np.float16), "out: expected element type float32"),
        (np.broadcast_to(zeros(1, 1, 4, 32), (1, 100, 4, 32)), "out: expected writable memory"),
        (
            np.lib.stride_tricks.as_strided(zeros(9999), (1, 100, 4, 32), (0, 4, 400, 4)),
            "out: expected strides that give every element its own place",
        ),
        (zeros(1, 100, 4, 64)[..., ::2], "out: expected a contiguous last dimension"),
        (
            [[0.0]],
            "out: expected a torch.Tensor, numpy.ndarray or cupy.ndarray .*, got builtins.list",
        ),
    ],
    ids=range(7),
)
def test_outputs(out, message):
    for call in (fp.prefill, fp.attend):
        with pytest.raises(ValueError, match=message):
            call(**inputs(), out=out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_output_that_shares_memory_with_an_input(name):
    memory = np.random.default_rng(1).standard_normal((1, 100, 5, 32)).astype(np.float32)
    before = memory.copy()
    arguments = inputs() | {name: memory[:, :, : 4 if name == "q" else 2]}
    with pytest.raises(ValueError, match=f"out: expected memory of its own, .* overlaps {name}"):
        fp.prefill(**arguments, out=memory[:, :, 1:])
    np.testing.assert_array_equal(memory, before)


def test_an_index_of_another_call():
    x = inputs()
    for sequences, h_q, block_size, message in (
        ([(100, 100)], 4, 64, "index: expected block_size 128, got 64"),
        ([(100, 100)], 2, 128, "index: expected h_q = 4, got 2"),
        ([(100, 100)] * 2, 4, 128, "index: expected 1 sequences, got 2"),
        ([(99, 100)], 4, 128, r"index: sequence 0: expected .*\(100, 100\), got \(99, 100\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.attend(**x, index=fp.BlockIndex.dense(sequences, h_q, block_size))
    with pytest.raises(TypeError, match="index: expected a BlockIndex or None"):
        fp.attend(**x, index=np.ones((4, 1, 1), bool))


def test_a_target_that_the_machine_lacks():
    lacking = {"avx512", "avx512_bf16", "amx_bf16", "neon"} - set(fp.info()["cpu_targets"])
    for target in lacking:
        with pytest.raises(fp.UnsupportedError, match=f"cpu_target: .*got {target}"):
            fp.attend(**inputs(), cpu_target=target)
    assert lacking
    assert issubclass(fp.UnsupportedError, RuntimeError)

"""BlockIndex: from and to masks, storage, flex_attention's BlockMask, drawing."""

import copy
import pickle

import flex_prefill as fp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, grid, visible


def causal_mask(s_q, s_kv, block_size):
    first, n_q, n_kv = grid(s_q, s_kv, block_size)
    return np.arange(n_kv)[None, :] <= first + np.arange(n_q)[:, None]


def random_index(seed, sequences, h_q=3, block_size=32, share=0.5):
    rng = np.random.default_rng(seed)
    masks = [
        (rng.random((h_q, *causal_mask(*s, block_size).shape)) < share)
        & causal_mask(*s, block_size)
        for s in sequences
    ]
    return masks, fp.BlockIndex.from_mask(masks, sequences, block_size)


SEQUENCES = st.lists(
    st.integers(1, 700).flatmap(lambda s: st.tuples(st.integers(1, s), st.just(s))),
    max_size=3,
)


@given(
    sequences=SEQUENCES,
    h_q=st.integers(1, 4),
    block_size=st.sampled_from([32, 64, 128]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=50, deadline=None)
def test_masks_round_trip(sequences, h_q, block_size, share):
    masks, index = random_index(1, sequences, h_q, block_size, share)
    assert index.sequences == sequences
    index.check()
    kept = causal = 0
    for s, mask in enumerate(masks):
        for h in range(h_q):
            np.testing.assert_array_equal(index.to_mask(s, h), mask[h])
        kept += mask.sum()
        causal += h_q * causal_mask(*sequences[s], block_size).sum()
    assert index.density == (kept / causal if causal else 1)
    assert fp.BlockIndex.from_bytes(index.to_bytes()) == index


def test_dense():
    index = fp.BlockIndex.dense([(100, 300), (64, 64)], 2, 64)
    np.testing.assert_array_equal(index.to_mask(0, 1), causal_mask(100, 300, 64))
    assert index.density == 1
    assert index.h_q == 2


def test_views_are_the_rows_and_read_only():
    _, index = random_index(2, [(100, 200)])
    assert index.indptr.dtype == np.int64
    assert index.indices.dtype == np.int32
    assert index.indptr[-1] == len(index.indices)
    for view in (index.indptr, index.indices):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    indices = index.indices
    expected = indices.copy()
    del index  # the view keeps the memory alive
    np.testing.assert_array_equal(indices, expected)


def test_storage(tmp_path):
    _, index = random_index(3, [(100, 200), (31, 31)])
    path = tmp_path / "index.bin"
    index.save(path)
    assert fp.BlockIndex.load(path) == index
    assert pickle.loads(pickle.dumps(index)) == index
    assert copy.deepcopy(index) == index
    assert len({index, fp.BlockIndex.load(path)}) == 1
    assert index != random_index(4, [(100, 200), (31, 31)])[1]
    assert index != "index"
    assert "density" in repr(index)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_refused_or_sound(data):
    whole = bytearray(random_index(5, [(100, 200)])[1].to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = fp.BlockIndex.from_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except ValueError as error:
        assert str(error).startswith("index: ")  # noqa: PT017 (both ways are right)
    else:
        index.check()


def test_bytes_that_end_early_are_refused():
    whole = random_index(5, [(100, 200)])[1].to_bytes()
    for end in range(len(whole)):
        with pytest.raises(ValueError, match=r"^index: "):
            fp.BlockIndex.from_bytes(whole[:end])


ROWS = {"sequences": [(64, 64)], "h_q": 1, "block_size": 32}  # two rows


@pytest.mark.parametrize(
    ("indptr", "indices", "changes", "message"),
    [
        ([0, 1, 3], [0, 1, 0], {}, "row 1: expected ascending blocks"),
        ([0, 1, 3], [0, 0, 0], {}, "row 1: expected ascending blocks"),
        ([0, 1, 2], [1, 1], {}, "row 0: expected blocks up to the diagonal 0, got 1"),
        ([0, 1, 2], [0, -1], {}, "row 1: expected ascending blocks from 0, got -1"),
        ([0, 2, 1], [0], {}, "expected indptr to ascend"),
        ([0, 1], [0], {}, r"indptr: expected rows \+ 1 = 3 entries, got 2"),
        ([1, 1, 1], [0], {}, "indptr: expected to run from 0"),
        ([0, 1, 3], [0, 0], {}, "indptr: expected to run from 0"),
        ([], [], {}, r"indptr: expected rows \+ 1"),
        ([0, 1, 2], [0, 2**40], {}, "expected numbers that fit int32"),
        ([0, 1, 2], [0.0, 1.0], {}, "indices: expected integers of rank 1, got float64"),
        ([[0, 1, 2]], [0, 1], {}, "indptr: expected integers of rank 1"),
        ([0, 1, 2], [0, 1], {"block_size": 16}, "expected block_size 32, 64 or 128, got 16"),
        ([0, 1, 2], [0, 1], {"h_q": 0}, "expected h_q of at least 1"),
        ([0, 1, 2], [0, 1], {"sequences": [(65, 64)]}, "expected 1 <= s_q <= s_kv"),
        ([0, 1, 2], [0, 1], {"sequences": [(0, 64)]}, "expected 1 <= s_q <= s_kv"),
        ([0, 1, 2], [0, 1], {"local_window": -1}, "expected windows of at least 0"),
    ],
)
def test_rows_of_a_users_own_are_checked(indptr, indices, changes, message):
    fp.BlockIndex([0, 1, 2], [0, 1], **ROWS)
    with pytest.raises(ValueError, match=f"^index: .*{message}"):
        fp.BlockIndex(indptr, indices, **(ROWS | changes))


def test_masks_of_a_users_own_are_checked():
    mask = causal_mask(100, 100, 32)[None]
    fp.BlockIndex.from_mask([mask], [(100, 100)], 32)
    for masks, sequences, message in (
        ([mask], [(100, 100)] * 2, "masks: expected one for each of 2 sequences, got 1"),
        ([mask[0]], [(100, 100)], r"masks: sequence 0: expected bool \[h_q, n_q, n_kv\]"),
        ([mask.astype(int)], [(100, 100)], "got int64"),
        ([mask], [(100, 200)], "sequence 0: expected bool"),
        ([np.ones_like(mask)], [(100, 100)], "row 0: expected blocks up to the diagonal"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.BlockIndex.from_mask(masks, sequences, 32)


def test_numbers_out_of_range():
    _, index = random_index(6, [(100, 200)])
    for sequence, head, message in ((1, 0, "sequence"), (-1, 0, "sequence"), (0, 3, "head")):
        with pytest.raises(IndexError, match=f"{message}: expected 0 to"):
            index.to_mask(sequence, head)


@pytest.mark.parametrize(("s_q", "s_kv"), [(200, 200), (100, 196)])
@pytest.mark.parametrize("windows", [None, (20, 50)])
def test_block_mask_is_what_flex_attention_computes(s_q, s_kv, windows):
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, s_q, 4, 32, generator=generator)
    k, v = torch.randn(2, 2, s_kv, 2, 32, generator=generator)
    if windows:
        index = fp.select(q, k, fp.StreamingLlm(*windows), block_size=32)
    else:
        _, index = random_index(7, [(s_q, s_kv)] * 2, 4)
    block_mask = index.to_block_mask()
    dense = block_mask.to_dense().bool().numpy()
    for s in range(2):
        for h in range(4):
            np.testing.assert_array_equal(dense[s, h], index.to_mask(s, h))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = flex_attention(*heads_first, block_mask=block_mask, enable_gqa=True)
    out = fp.attend(q, k, v, index, block_size=32)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    for s in range(2):
        seen = visible(s_q, s_kv, 32, index.to_mask(s, 3), windows)
        one = (x[s, :, h].numpy() for x, h in ((q, 3), (k, 1), (v, 1)))
        assert_close(out[s, :, 3].numpy(), *one, seen)


def test_what_no_block_mask_can_say():
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="sequences of one length"):
        random_index(8, [(64, 64), (32, 64)])[1].to_block_mask()
    with pytest.raises(ValueError, match=r"a chunk that starts at a block, got s_kv - s_q = 100"):
        random_index(8, [(100, 200)])[1].to_block_mask()


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    masks, index = random_index(9, [(100, 200)])
    axes = index.plot(0, 1)
    np.testing.assert_array_equal(axes.images[0].get_array(), masks[0][1])
    assert axes.get_title().startswith("sequence 0, head 1: density 0.")
    assert index.plot(0, 2, ax=axes) is axes

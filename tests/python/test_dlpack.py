"""Tensors of every framework: the same results, of the caller's kind, from memory where it is."""

import flex_prefill as fp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

PATTERN = fp.FlexPrefill(min_budget=64)
BLOCK_SIZE = 32


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 300, 4, 32)) + rng.standard_normal((1, 1, 4, 32))
    k, v = rng.standard_normal((2, 1, 300, 2, 32))
    return [x.astype(dtype) for x in (q, k, v)]


def bits(array):
    return np.asarray(array).view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_torch_gives_the_same_as_numpy(dtype):
    arrays = inputs(dtype)
    out, lse = fp.prefill(*arrays, PATTERN, block_size=BLOCK_SIZE, return_lse=True)
    assert out.dtype == dtype
    torch_out, torch_lse = fp.prefill(
        *map(to_torch, arrays), PATTERN, block_size=BLOCK_SIZE, return_lse=True
    )
    assert isinstance(torch_out, torch.Tensor)
    assert isinstance(torch_lse, torch.Tensor)
    np.testing.assert_array_equal(bits(from_torch(torch_out)), bits(out))
    np.testing.assert_array_equal(torch_lse.numpy(), lse)
    index, torch_index = (
        fp.select(*tensors[:2], PATTERN, block_size=BLOCK_SIZE)
        for tensors in (arrays, [to_torch(x) for x in arrays])
    )
    assert index == torch_index
    attended = fp.attend(*map(to_torch, arrays), index, block_size=BLOCK_SIZE)
    np.testing.assert_array_equal(bits(from_torch(attended)), bits(out))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_jax_gives_the_same_as_numpy(dtype):
    jax = pytest.importorskip("jax")
    arrays = inputs(dtype)
    expected, expected_lse = fp.prefill(*arrays, PATTERN, block_size=BLOCK_SIZE, return_lse=True)
    out, lse = fp.prefill(
        *map(jax.numpy.asarray, arrays), PATTERN, block_size=BLOCK_SIZE, return_lse=True
    )
    assert isinstance(out, jax.Array)
    assert isinstance(lse, jax.Array)
    assert out.dtype == dtype
    np.testing.assert_array_equal(bits(np.asarray(out)), bits(expected))
    np.testing.assert_array_equal(np.asarray(lse), expected_lse)


class Exported:
    """A framework that has no more than DLPack."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_anything_that_speaks_dlpack():
    arrays = inputs()
    out = fp.prefill(*map(Exported, arrays))
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, fp.prefill(*arrays))


def test_frameworks_may_be_mixed_for_lengths():
    q, k, v = (x[0] for x in inputs())
    expected = fp.attend(q, k, v, cu_seqlens_q=[0, 100, 300], cu_seqlens_kv=[0, 100, 300])
    starts = torch.tensor([0, 100, 300])
    for q_, k_, v_ in ((q, k, v), map(torch.from_numpy, (q, k, v))):
        for call in (fp.attend, lambda *a, **o: fp.prefill(*a, fp.Dense(), **o)):
            for given in (starts, starts.to(torch.int32), starts.numpy(), starts.tolist()):
                out = call(q_, k_, v_, cu_seqlens_q=given, cu_seqlens_kv=given)
                np.testing.assert_array_equal(np.asarray(out), expected)


def test_inputs_are_not_copied():
    """A cache of 2^24 pages, 256 GiB as the strides have it: a copy would not fit."""
    one_page = np.random.default_rng(0).standard_normal((1, 64, 2, 32)).astype(np.float32)
    cache = np.broadcast_to(one_page, (2**24, 64, 2, 32))
    q = one_page[:, :, :2]
    out = fp.prefill(q, cache, cache, page_table=[[2**24 - 1]], seqlens_kv=[64])
    np.testing.assert_array_equal(out, fp.prefill(q, one_page, one_page))
    tensors = torch.from_numpy(one_page).expand(2**24, 64, 2, 32)
    out = fp.prefill(
        torch.from_numpy(q).bfloat16(),
        *(torch.from_numpy(one_page).bfloat16().expand(tensors.shape),) * 2,
        page_table=torch.tensor([[2**24 - 1]]),
        seqlens_kv=torch.tensor([64]),
    )
    assert out.dtype == torch.bfloat16


def test_strided_views_are_read_where_they_are():
    q, k, v = inputs()
    expected = fp.prefill(q, k, v)
    padded = np.zeros((1, 4, 310, 48), np.float32)
    view = padded[:, :, 5:305, 8:40].transpose(0, 2, 1, 3)
    view[...] = q
    backwards = k[:, ::-1].copy()[:, ::-1]
    interleaved = np.stack([v, v], axis=3)[:, :, :, 1]
    np.testing.assert_array_equal(fp.prefill(view, backwards, interleaved), expected)


def test_read_only_arrays_are_inputs_but_no_outputs():
    arrays = inputs()
    expected = fp.prefill(*arrays)
    for x in arrays:
        x.flags.writeable = False
    np.testing.assert_array_equal(fp.prefill(*arrays), expected)
    out = np.empty_like(expected)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected writable memory"):
        fp.prefill(*arrays, out=out)


def test_a_torch_tensor_elsewhere_is_refused():
    q, k, v = map(torch.from_numpy, inputs())
    with pytest.raises(
        fp.UnsupportedError, match=r"^k: expected a tensor in CPU or CUDA memory, got one on"
    ):
        fp.attend(q, k.to("meta"), v)
    with pytest.raises(fp.UnsupportedError, match=r"^cu_seqlens_q: "):
        fp.attend(q[0], k[0], v[0], cu_seqlens_q=torch.empty(2, device="meta", dtype=torch.int32))


def test_torch_tensors_that_are_not_plain():
    q, k, v = map(torch.from_numpy, inputs())
    negated = torch.complex(k, k).conj().imag
    assert negated.is_neg()
    for wrong, message in (
        (k.to(torch.float8_e4m3fn), "k: expected element type .*, got torch.float8_e4m3fn"),
        (k.to_sparse(), "k: expected a strided tensor, got layout torch.sparse_coo"),
        (negated, "k: expected plain values, got a negated view"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.attend(q, wrong, v)


@pytest.mark.parametrize(
    "wrong",
    [
        [[1.0]],
        None,
        "q",
        object(),
        np.zeros((1, 8, 2, 16), np.float64),
        np.zeros((1, 8, 2, 16), ">f4"),
    ],
    ids=repr,
)
def test_what_is_no_tensor_of_ours(wrong):
    k = np.zeros((1, 8, 2, 16), np.float32)
    for q_, k_ in ((wrong, k), (k, wrong)):
        with pytest.raises((TypeError, ValueError), match=r"^[qk]: expected"):
            fp.prefill(q_, k_, k)


def test_uint16_is_not_taken_for_bfloat16():
    q, k, v = inputs(ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"^k: expected element type float32, .* got uint16"):
        fp.prefill(q, k.view(np.uint16), v)

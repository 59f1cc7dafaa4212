"""Where a call runs, and what is refused, on machines without a GPU too."""

import flex_prefill as fp
import numpy as np
import pytest
from flex_prefill import _tensors

torch = pytest.importorskip("torch")

CUDA_BUILT = fp.info()["cuda"]["built"]


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


class OnDevice:
    """Says of an array that it lies on another device; its memory is never to be read."""

    def __init__(self, array, device):
        self.shape, self.dtype = array.shape, array.dtype
        self.device = device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        raise AssertionError("exported, though it had to be refused")


def test_info_names_the_cuda_build_and_its_devices():
    cuda = fp.info()["cuda"]
    assert set(cuda) == {"built", "runtime", "driver", "error", "devices"}
    assert not cuda["devices"] or cuda["built"]
    for device in cuda["devices"]:
        assert device["memory_bytes"] > 0
        assert device["compute_capability"] >= (5, 0)


@pytest.mark.skipif(CUDA_BUILT, reason="a build without CUDA")
def test_a_build_without_cuda_says_how_to_get_one():
    q = OnDevice(normal(1, 64, 2, 16), (2, 0))
    for call in (fp.prefill, fp.attend):
        with pytest.raises(fp.UnsupportedError, match=r"q: .*cuda:0 .*FLEXPREFILL_CUDA=ON"):
            call(q, q, q)
    with pytest.raises(fp.UnsupportedError, match="no CUDA backend"):
        fp.select(q, q)


def test_tensors_of_other_devices_are_refused():
    q = normal(1, 64, 2, 16)
    for device, place in (((2, 0), "cuda:0"), ((2, 3), "cuda:3"), ((13, 1), "cuda:1")):
        for name in ("k", "v"):
            tensors = {"q": q, "k": q, "v": q, name: OnDevice(q, device)}
            with pytest.raises(
                ValueError, match=f"{name}: expected .* on cpu as q is, got .*{place}"
            ):
                fp.prefill(**tensors)
    with pytest.raises(fp.UnsupportedError, match="q: expected a tensor in CPU or CUDA memory"):
        fp.prefill(OnDevice(q, (10, 0)), q, q)  # ROCm
    with pytest.raises(ValueError, match=r"cu_seqlens_q: expected lengths on the CPU.*cuda:0"):
        fp.prefill(q[0], q[0], q[0], cu_seqlens_q=OnDevice(np.zeros(2), (2, 0)))


@pytest.mark.parametrize("backend", ["cuda", "sm80", "sm90"])
def test_cuda_backends_refuse_cpu_tensors(backend):
    q = normal(1, 64, 2, 16)
    with pytest.raises(ValueError, match=f'backend: expected "auto" .* on cpu, got "{backend}"'):
        fp.prefill(q, q, q, backend=backend)


def test_devices_are_told_apart():
    assert _tensors.device_of(torch.zeros(1), "q") == _tensors.CPU
    assert _tensors.device_of([1, 2], "q") == _tensors.CPU
    assert str(_tensors.device_of(OnDevice(np.zeros(1), (2, 1)), "q")) == "cuda:1"


def test_an_index_on_the_cpu_is_its_own_copy():
    index = fp.BlockIndex.dense([(64, 64)], 2, 32)
    assert index.device == "cpu"
    assert index.cpu() is index

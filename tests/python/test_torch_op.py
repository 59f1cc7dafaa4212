"""torch: the custom op under compile, autograd and its own checks."""

import subprocess
import sys

import flex_prefill as fp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

OPTIONS = {"block_size": 32}
PATTERN = fp.FlexPrefill(gamma=0.8, min_budget=64)


def inputs(s=300, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = normal(1, s, 4, 32) + normal(1, 1, 4, 32)
    return [x.to(dtype) for x in (q, normal(1, s, 2, 32), normal(1, s, 2, 16))]


def op_arguments(q, k, v, pattern=PATTERN, **changes):
    arguments = {
        "cu_seqlens_q": None,
        "cu_seqlens_kv": None,
        "page_table": None,
        "seqlens_kv": None,
        "softmax_scale": None,
        "gqa_interleave": False,
        "block_size": 32,
        "backend": "auto",
        "cpu_target": "auto",
        "num_threads": 0,
        "return_lse": False,
        "audit": False,
        "min_kept_mass": None,
        "compared_rows": 0,
    }
    return (q, k, v, pattern.name, pattern.values(), *(arguments | changes).values())


def test_opcheck():
    fp.prefill(*inputs())  # makes the op known
    op = torch.ops.flex_prefill.prefill.default
    q, k, v = inputs()
    starts = torch.tensor([0, 100, 300], dtype=torch.int32)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts}
    for arguments in (
        op_arguments(q, k, v),
        op_arguments(q, k, v, fp.Dense(), return_lse=True, audit=True),
        op_arguments(q[0], k[0], v[0], fp.StreamingLlm(32, 64), return_lse=True, **packed),
        op_arguments(*(x.bfloat16() for x in (q, k, v)), audit=True, gqa_interleave=True),
        op_arguments(q, k, v, audit=True, min_kept_mass=0.99, compared_rows=5),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("pattern", [fp.Dense(), PATTERN, fp.VerticalSlash(64, 64)], ids=repr)
def test_values_survive_the_op(pattern):
    tensors = inputs()
    out = fp.prefill(*tensors, pattern, **OPTIONS)
    expected = fp.prefill(*(x.numpy() for x in tensors), pattern, **OPTIONS)
    np.testing.assert_array_equal(out.numpy(), expected)
    no_limit, limit = (fp.FlexPrefill(0.5, 0, 32, most) for most in (None, 64))
    assert not torch.equal(
        fp.prefill(*tensors, no_limit, **OPTIONS), fp.prefill(*tensors, limit, **OPTIONS)
    )


def test_compile_with_a_floor():
    pattern = fp.VerticalSlash(64, 64)

    def layer(q, k, v):
        return fp.prefill(q * 2, k, v, pattern, block_size=32, min_kept_mass=1)

    q, k, v = inputs()
    dense = fp.prefill(q * 2, k, v, fp.Dense(), block_size=32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(q, k, v), dense)


def test_compile_without_a_graph_break():
    def layer(q, k, v):
        out = fp.flex_prefill_attention(q * 2, k, v, 0.9, 0.1, 64, block_size=32)
        out, lse = fp.prefill(out[..., :16], k[..., :16], v, return_lse=True)
        return out.transpose(1, 2) + lse[..., None]

    compiled = torch.compile(layer, fullgraph=True)
    tensors = inputs()
    torch.testing.assert_close(compiled(*tensors), layer(*tensors))


def test_compile_with_packed_sequences_and_other_lengths():
    def layer(q, k, v, starts):
        return fp.prefill(
            q + 1, k, v, PATTERN, cu_seqlens_q=starts, cu_seqlens_kv=starts, block_size=32
        ).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for s in (300, 123, 77):
        q, k, v = (x[0] for x in inputs(s))
        starts = torch.tensor([0, s // 3, s], dtype=torch.int32)
        torch.testing.assert_close(compiled(q, k, v, starts), layer(q, k, v, starts))


def test_compiled_errors_are_those_of_the_call():
    compiled = torch.compile(lambda q, k, v: fp.prefill(q, k, v, fp.FlexPrefill(gamma=2.0)))
    with pytest.raises(ValueError, match="gamma: expected a number in"):
        compiled(*inputs())


@pytest.mark.parametrize("call", [fp.prefill, fp.attend])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_gradient_is_refused_when_it_is_asked_for(call, return_lse):
    q, k, v = inputs()
    expected = call(q, k, v)
    k.requires_grad_()
    out = call(q, k, v, return_lse=return_lse)
    out = out[0] if return_lse else out
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="forward pass only"):
        out.sum().backward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not call(q, k, v).requires_grad
    with pytest.raises(RuntimeError, match="out: expected inputs that require no gradient"):
        call(q, k, v, out=torch.empty_like(expected))
    with torch.no_grad():
        given = torch.empty_like(expected)
        assert call(q, k, v, out=given) is given
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_select_does_not_ask_for_gradients():
    q, k, _ = inputs()
    expected = fp.select(q, k, PATTERN, **OPTIONS)
    assert fp.select(q.requires_grad_(), k, PATTERN, **OPTIONS) == expected


def test_the_audit_comes_through_the_op():
    tensors = inputs()
    out, lse, audit = fp.prefill(*tensors, PATTERN, return_lse=True, audit=True, **OPTIONS)
    _, expected = fp.prefill(*(x.numpy() for x in tensors), PATTERN, audit=True, **OPTIONS)
    assert isinstance(out, torch.Tensor)
    assert lse.shape == (1, 4, 300)
    np.testing.assert_array_equal(audit.pattern, expected.pattern)
    np.testing.assert_array_equal(audit.kept_mass, expected.kept_mass)
    assert 0 < audit.mean_density < 1


def test_tensors_of_two_frameworks_are_refused():
    q, k, v = inputs()
    for call in (fp.prefill, fp.attend):
        with pytest.raises(TypeError, match=r"^v: expected a torch.Tensor as q is"):
            call(q, k, v.numpy())


def test_after_a_fork():
    """A data loader's worker process may call it as well."""
    program = """
import torch, flex_prefill
q = torch.randn(1, 300, 4, 32)
expected = flex_prefill.prefill(q, q, q)

def worker():
    assert torch.equal(flex_prefill.prefill(q, q, q), expected)

process = torch.multiprocessing.get_context("fork").Process(target=worker)
process.start()
process.join(60)
raise SystemExit(process.exitcode)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

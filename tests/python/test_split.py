"""split_mlp: the same logits, less memory at once."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flex_prefill as fp  # noqa: E402
from hf_models import build, tokens  # noqa: E402


def widest_inside(model, inputs):
    """Rows of the largest tensor that an MLP's first projection makes."""
    rows = []
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(lambda m, x, out: rows.append(out.shape[-2]))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, max(rows)


def test_same_logits_in_pieces():
    model = build("llama")
    inputs = {"input_ids": tokens(2, 700)}
    own, rows = widest_inside(model, inputs)
    assert rows == 700
    assert fp.split_mlp(model, 256) is model
    split, rows = widest_inside(model, inputs)
    assert rows == 256
    torch.testing.assert_close(split, own, rtol=1e-5, atol=1e-5)
    fp.split_mlp(model, 64)
    assert widest_inside(model, inputs)[1] == 64
    fp.split_mlp(model, None)
    again, rows = widest_inside(model, inputs)
    assert rows == 700
    torch.testing.assert_close(again, own, rtol=0, atol=0)
    assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)


def test_with_a_pattern_and_short_inputs():
    model = fp.split_mlp(build("llama"), 128)
    fp.patch_model(model, "flex_prefill", {"flex_prefill_min_budget": 128})
    out = model.generate(tokens(1, 600), max_new_tokens=3, do_sample=False)
    fp.split_mlp(model, None)
    torch.testing.assert_close(
        out, model.generate(tokens(1, 600), max_new_tokens=3, do_sample=False), rtol=0, atol=0
    )


def test_gradients_keep_the_own_forward():
    model = fp.split_mlp(build("llama"), 64)
    model(input_ids=tokens(1, 200)).logits.sum().backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None


def test_a_forward_of_the_module_itself_comes_back():
    model = build("llama")
    mlp, calls = model.model.layers[0].mlp, []
    own = mlp.forward
    mlp.forward = hooked = lambda x: (calls.append(x.shape[-2]), own(x))[1]
    fp.split_mlp(model, 100)
    with torch.inference_mode():
        model(input_ids=tokens(1, 250))
    assert calls == [100, 100, 50]
    fp.split_mlp(model, None)
    assert mlp.forward is hooked


def test_errors():
    model = build("llama")
    with pytest.raises(ValueError, match="tokens: expected at least 1 or None, got 0"):
        fp.split_mlp(model, 0)
    with pytest.raises(ValueError, match="Linear has no modules called mlp"):
        fp.split_mlp(torch.nn.Linear(2, 2))

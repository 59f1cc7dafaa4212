"""Patched transformers models on a GPU: prefill there, decoding on the model's own attention."""

import flex_prefill as fp
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hf_models import build  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (fp.info()["cuda"]["devices"] and torch.cuda.is_available()),
        reason="a CUDA build and a GPU",
    ),
]

LAYERS = 2


def ids(b, s):
    return torch.randint(1, 128, (b, s), generator=torch.Generator().manual_seed(0)).cuda()


def closeness(model, reference, inputs):
    """Mean differences of the logits from those in fp32, of this model's and of its own."""
    with torch.inference_mode():
        exact = reference(**inputs).logits.float()
        own = (model(**inputs).logits.float() - exact).abs().mean()
        fp.patch_model(model, "flash")
        with fp.collect_audits() as audits:
            patched = (model(**inputs).logits.float() - exact).abs().mean()
        fp.unpatch_model(model)
    return patched.item(), own.item(), len(audits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3"])
def test_dense_is_as_good_as_the_models_own_attention(family, dtype):
    reference = build(family).cuda()
    model = build(family, dtype).cuda()
    patched, own, computed = closeness(model, reference, {"input_ids": ids(2, 700)})
    assert computed == LAYERS
    assert patched <= 1.5 * own


def test_padded_batches():
    inputs = {"input_ids": ids(3, 500), "attention_mask": torch.ones(3, 500, dtype=torch.long)}
    inputs["attention_mask"][1, :120] = 0
    inputs["attention_mask"][2, :490] = 0
    inputs["attention_mask"] = inputs["attention_mask"].cuda()
    reference, model = build("llama").cuda(), build("llama", torch.bfloat16).cuda()
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        exact = reference(**inputs).logits.float()[real]
        own = (model(**inputs).logits.float()[real] - exact).abs().mean()
        fp.patch_model(model, "flash")
        with fp.collect_audits() as audits:
            patched = (model(**inputs).logits.float()[real] - exact).abs().mean()
    assert len(audits) == LAYERS
    assert patched <= 1.5 * own


def test_generate():
    model = build("llama", torch.bfloat16).cuda()
    prompt = ids(1, 600)
    fp.patch_model(model, "flex_prefill", {"flex_prefill_min_budget": 128})
    with fp.collect_audits() as audits:
        out = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 605)
    assert len(audits) == LAYERS  # the prompt alone


def test_fp32_stays_on_the_models_own_attention():
    model = build("llama").cuda()
    inputs = {"input_ids": ids(1, 400)}
    with torch.inference_mode():
        own = model(**inputs).logits
        fp.patch_model(model, "flash")
        with fp.collect_audits() as audits:
            patched = model(**inputs).logits
    assert not audits
    torch.testing.assert_close(patched, own, rtol=0, atol=0)

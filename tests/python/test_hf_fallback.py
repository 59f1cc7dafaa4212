"""What is not computed here has to reach the model's own attention, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flex_prefill import collect_audits, patch_model  # noqa: E402
from flex_prefill.hf import CausalMask, attention_forward, causal_mask_or_own  # noqa: E402
from hf_models import assert_as_good, build, cache_of, exact_logits, logits, tokens  # noqa: E402
from transformers.masking_utils import eager_mask, sdpa_mask  # noqa: E402


def assert_left_alone(model: Any, ids: torch.Tensor, **inputs: Any) -> None:
    own = logits(model, ids, **inputs)
    patch_model(model, "flash")
    with collect_audits() as audits:
        got = logits(model, ids, **inputs)
    assert audits == []
    assert torch.equal(got, own)


class TestModels:
    @pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
    @pytest.mark.parametrize("padding", [0, 41])
    def test_soft_capping_and_sinks(self, family: str, padding: int):
        model, ids = build(family), tokens(2, 300)
        mask = torch.ones(2, 300, dtype=torch.long)
        mask[1, :padding] = 0
        assert model.config._attn_implementation == "eager"
        assert_left_alone(model, ids, attention_mask=mask)

    def test_models_that_transformers_only_computes_eagerly(self):
        # There may be more in such a model's attention than its arguments say.
        assert_left_alone(build("gemma2", attn_logit_softcapping=None), tokens(1, 300))

    def test_sinks_loaded_with_flex_prefill(self):
        # Nobody said what the model's own attention is: it is what transformers would choose.
        ids = tokens(1, 300)
        direct = build("gpt_oss", attn_implementation="flex_prefill")
        with collect_audits() as audits:
            got = logits(direct, ids)
        assert audits == []
        assert torch.equal(got, logits(build("gpt_oss"), ids))

    def test_sliding_window(self):
        assert_left_alone(build("mistral", sliding_window=100), tokens(1, 300))

    def test_sliding_window_in_some_layers(self):
        model = build("qwen2", use_sliding_window=True, sliding_window=100, max_window_layers=1)
        assert model.config.layer_types == ["full_attention", "sliding_attention"]
        ids = tokens(1, 300)
        own, exact = logits(model, ids), exact_logits(model, ids)
        patch_model(model, "flash")
        with collect_audits() as audits:
            got = logits(model, ids)
        assert [layer for layer, _ in audits] == [0]
        assert_as_good(got, own, exact)

    def test_bidirectional(self):
        model = build()
        model.config.is_causal = False
        assert_left_alone(model, tokens(1, 300))

    @pytest.mark.parametrize("head_dim", [8, 20])
    def test_head_dim_that_is_not_offered(self, head_dim: int):
        assert_left_alone(build("qwen3", head_dim=head_dim), tokens(1, 300))

    def test_float64(self):
        assert_left_alone(build(dtype=torch.float64), tokens(1, 300))


class TestCalls:
    @pytest.mark.parametrize("rows", [1, 5, 128])
    def test_few_rows(self, rows: int):
        # Decoding, verifying drafted tokens, a short last chunk.
        model, ids = build(), tokens(1, 300)
        with torch.no_grad():
            past = cache_of(model(ids[:, :-rows], use_cache=True))
            own = model(ids[:, -rows:], **past).logits
            next(iter(past.values())).crop(-rows)
            patch_model(model, "flash")
            with collect_audits() as audits:
                got = model(ids[:, -rows:], **past).logits
        assert audits == []
        assert torch.equal(got, own)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_mask_of_the_callers_own(self, attention: str):
        # The first 100 tokens see each other both ways.
        visible = torch.ones(300, 300, dtype=torch.bool).tril()
        visible[:100, :100] = True
        mask = visible[None, None]
        if attention == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        model = build(attn_implementation=attention)
        assert (logits(model, tokens(1, 300), attention_mask=mask) - logits(model, tokens(1, 300)))[
            0, 0
        ].abs().max() > 0.1
        assert_left_alone(model, tokens(1, 300), attention_mask=mask)

    def test_packed_sequences_in_one_row(self):
        model, ids = build(), tokens(1, 300)
        positions = torch.cat([torch.arange(140), torch.arange(160)])[None]
        inputs = {"position_ids": positions, "use_cache": False}
        packed = logits(model, ids, **inputs)
        torch.testing.assert_close(packed[:, 140:], logits(model, ids[:, 140:]))
        assert_left_alone(model, ids, **inputs)

    def test_gradients(self):
        model, ids = build(), tokens(1, 200)
        weight = model.model.layers[0].self_attn.k_proj.weight
        model(ids).logits.square().sum().backward()
        own, weight.grad = weight.grad, None
        patch_model(model, "flash")
        with collect_audits() as audits:
            model(ids).logits.square().sum().backward()
        assert audits == []
        assert torch.equal(weight.grad, own)

    def test_dropout(self):
        model, ids = build(attention_dropout=0.5).train(), tokens(1, 200)
        torch.manual_seed(3)
        own = logits(model, ids)
        patch_model(model, "flash")
        torch.manual_seed(3)
        with collect_audits() as audits:
            got = logits(model, ids)
        assert audits == []
        assert torch.equal(got, own)

    def test_attention_weights(self):
        model, ids = build(attn_implementation="eager"), tokens(1, 200)
        with torch.no_grad():
            own = model(ids, output_attentions=True).attentions
            patch_model(model, "flash")
            got = model(ids, output_attentions=True).attentions
        assert len(got) == 2
        assert all(torch.equal(a, b) for a, b in zip(got, own, strict=True))

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_padding_reaches_the_own_attention(self, attention: str):
        # Own attention takes over inside the layer, so it has to be given its kind of mask.
        model, ids = build(attn_implementation=attention, head_dim=20), tokens(2, 300)
        mask = torch.ones(2, 300, dtype=torch.long)
        mask[0, :50] = 0
        own = logits(model, ids, attention_mask=mask)
        assert not torch.equal(own, logits(model, ids))
        assert_left_alone(model, ids, attention_mask=mask)

    @pytest.mark.parametrize(
        "extension", ["softcap", "s_aux", "position_bias", "sliding_window", "indices"]
    )
    def test_arguments_that_ask_for_more(self, extension: str, monkeypatch: pytest.MonkeyPatch):
        model = build(attn_implementation="flex_prefill")
        module = model.model.layers[0].self_attn
        q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
        mask = causal_mask_or_own(1, 200, 200, config=model.config)
        seen: dict[str, Any] = {}

        def own_attention(*args: Any, **kwargs: Any) -> tuple[str, None]:
            seen.update(kwargs)
            return "own", None

        monkeypatch.setattr("flex_prefill.hf._own_attention_function", lambda module: own_attention)
        assert attention_forward(module, q, k, k, mask, scaling=0.25)[0] != "own"
        extended = {extension: torch.ones(1)}
        assert attention_forward(module, q, k, k, mask, scaling=0.25, **extended)[0] == "own"
        assert seen == {"scaling": 0.25, "dropout": 0.0, **extended}

    def test_torch_compile(self):
        model, ids = build(), tokens(1, 200)
        own = logits(model, ids, use_cache=False)
        patch_model(model, "flash")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with collect_audits() as audits:
            got = logits(compiled, ids, use_cache=False)
        assert audits == []
        torch.testing.assert_close(got, own)


class TestCausalMask:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_reads_as_the_mask_that_it_stands_for(self, attention: str):
        config = build(attn_implementation="flex_prefill").config
        config.flex_prefill = {"own_attention": attention}
        padding = torch.ones(2, 250, dtype=torch.bool)
        padding[1, :20] = False
        arguments = {"q_offset": 50, "attention_mask": padding}
        mask = causal_mask_or_own(2, 200, 250, config=config, **arguments)
        function = eager_mask if attention == "eager" else sdpa_mask
        expected = function(2, 200, 250, **arguments)
        assert isinstance(mask, CausalMask)
        assert (mask.shape, mask.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(mask.own(), expected)
        assert torch.equal(mask[:, :, 3:7, 1:], expected[:, :, 3:7, 1:])
        assert not isinstance(mask[:1], CausalMask)
        assert "query_offset=50" in repr(mask)

    def test_takes_no_memory_for_a_long_prompt(self):
        # The mask would be 64 GiB.
        mask = causal_mask_or_own(1, 2**18, 2**18)
        assert isinstance(mask, CausalMask)
        assert mask.own() is None  # scaled_dot_product_attention's word for causal
        assert mask.contiguous() is mask

    def test_a_static_cache_counts_on(self):
        seen_tokens = torch.tensor(40)
        mask = causal_mask_or_own(1, 200, 400, q_offset=seen_tokens)
        seen_tokens += 200
        assert mask.query_offset == 40
        assert torch.equal(mask.own(), sdpa_mask(1, 200, 400, q_offset=40))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"q_length": 128},
            {"kv_offset": 3},
            {"mask_function": lambda b, h, i, j: j <= i},
            {"allow_is_causal_skip": False},
            {"device": "meta"},
        ],
        ids=[
            "few rows",
            "window of a cache",
            "another mask",
            "asked for a tensor",
            "another device",
        ],
    )
    def test_only_of_what_is_computed_here(self, arguments: dict[str, Any]):
        arguments = {"batch_size": 1, "q_length": 200, "kv_length": 200, **arguments}
        mask = causal_mask_or_own(**arguments)
        assert not isinstance(mask, CausalMask)
        expected = sdpa_mask(**arguments)
        assert (mask is None) == (expected is None)
        if mask is not None and not mask.is_meta:
            assert torch.equal(mask, expected)

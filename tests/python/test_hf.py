"""Patched transformers models: dense against their own attention, sparse against a masked one."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flex_prefill import collect_audits, patch_model, select, unpatch_model  # noqa: E402
from flex_prefill.patterns import FlexPrefill, Pattern, VerticalSlash  # noqa: E402
from hf_models import (  # noqa: E402
    FAMILIES,
    assert_as_good,
    build,
    cache_of,
    exact_logits,
    logits,
    tokens,
)
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

LAYERS = 2


def padding_mask(kind: str, b: int, s: int) -> torch.Tensor:
    """1 for tokens [b, s]; sequence 0 of the batch has no padding but for `hole`."""
    mask = torch.ones(b, s, dtype=torch.long)
    for i in range(b):
        if kind in ("left", "both"):
            mask[i, : 37 * i] = 0
        if kind in ("right", "both"):
            mask[i, s - 61 * i :] = 0
        if kind == "hole":  # a conversation whose first turn was padded
            mask[i, 90 : 110 + 10 * i] = 0
    return mask


class TestDense:
    """`flash`: every block, so logits have to be those of the model's own attention."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_prompt(self, family: str):
        model, ids = build(family), tokens(2, 300)
        own, exact = logits(model, ids), exact_logits(model, ids)
        patch_model(model, "flash")
        with collect_audits() as audits:
            got = logits(model, ids)
        assert [layer for layer, _ in audits] == [0, 1]
        assert_as_good(got, own, exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["llama", "gemma", "glm4"])
    def test_half_precision(self, family: str, dtype: torch.dtype):
        model, ids = build(family, dtype), tokens(1, 300)
        own, exact = logits(model, ids), exact_logits(model, ids)
        patch_model(model, "flash")
        with collect_audits() as audits:
            got = logits(model, ids)
        assert len(audits) == LAYERS
        assert got.dtype == dtype
        assert_as_good(got, own, exact)

    @pytest.mark.parametrize("kind", ["left", "right", "both", "hole"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_padded_batch(self, family: str, kind: str):
        model, ids, mask = build(family), tokens(3, 300), padding_mask(kind, 3, 300)
        own = logits(model, ids, attention_mask=mask)
        exact = exact_logits(model, ids, attention_mask=mask)
        patch_model(model, "flash")
        with collect_audits() as audits:
            got = logits(model, ids, attention_mask=mask)
        assert len(audits) == LAYERS
        assert_as_good(got, own, exact, mask.bool())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_padding_does_not_leak(self, family: str):
        model, ids, mask = build(family), tokens(2, 300), padding_mask("both", 2, 300)
        patch_model(model, "flash")
        got = logits(model, ids, attention_mask=mask)
        other = torch.where(mask.bool(), ids, tokens(2, 300, seed=9))
        torch.testing.assert_close(
            logits(model, other, attention_mask=mask)[mask.bool()], got[mask.bool()]
        )

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_chunks(self, family: str, cache: str):
        model, ids = build(family), tokens(2, 450)
        own, exact = logits(model, ids), exact_logits(model, ids)
        patch_model(model, "flash")
        past = {}
        if cache == "static":
            static_cache = StaticCache(config=model.config, max_cache_len=600)
            past = dict.fromkeys(cache_of(model(ids[:1, :1])), static_cache)
        chunks = []
        with collect_audits() as audits, torch.no_grad():
            for chunk in ids.split([150, 170, 130], dim=1):
                output = model(chunk, use_cache=True, **past)
                past = cache_of(output)
                chunks.append(output.logits)
        assert len(audits) == 3 * LAYERS
        assert_as_good(torch.cat(chunks, dim=1), own, exact)

    @pytest.mark.parametrize(
        ("padding", "sequences"), [(slice(170), [1, 2, 2]), (slice(290, None), [2, 2, 1])]
    )
    def test_chunks_of_a_padded_batch(self, padding: slice, sequences: list[int]):
        # Sequence 1 begins in the second chunk, or ends in it.
        model, ids = build(), tokens(2, 450)
        mask = torch.ones(2, 450, dtype=torch.long)
        mask[1, padding] = 0
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = {"attention_mask": mask, "position_ids": positions}
        own, exact = logits(model, ids, **inputs), exact_logits(model, ids, **inputs)
        patch_model(model, "flash")
        past, chunks = {}, []
        with collect_audits() as audits, torch.no_grad():
            for start in (0, 150, 300):
                stop = start + 150
                output = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    use_cache=True,
                    **past,
                )
                past = cache_of(output)
                chunks.append(output.logits)
        assert [len(audit.density) for _, audit in audits[::LAYERS]] == sequences
        assert_as_good(torch.cat(chunks, dim=1), own, exact, mask.bool())

    def test_rows_of_nothing_but_padding(self):
        model, ids = build(), tokens(2, 300)
        patch_model(model, "flash")
        got = logits(model, ids, attention_mask=torch.zeros(2, 300, dtype=torch.long))
        assert not got.isnan().any()

    def test_conversation_goes_on(self):
        # A first turn on the model's own attention, the second one patched.
        model, ids = build(), tokens(1, 500)
        own, exact = logits(model, ids), exact_logits(model, ids)
        with torch.no_grad():
            past = cache_of(model(ids[:, :211], use_cache=True))
        patch_model(model, "flash")
        with collect_audits() as audits:
            got = logits(model, ids[:, 211:], **past)
        assert len(audits) == LAYERS
        assert_as_good(got, own[:, 211:], exact[:, 211:])

    def test_inference_mode(self):
        model, ids = build(), tokens(1, 300)
        own = logits(model, ids)
        patch_model(model, "flash")
        with collect_audits() as audits, torch.inference_mode():
            got = model(ids).logits
        assert len(audits) == LAYERS
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)

    def test_prefix_embeddings(self):
        model, ids = build(), tokens(1, 300)
        own = logits(model, ids)
        patch_model(model, "flash")
        with collect_audits() as audits, torch.no_grad():
            got = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert len(audits) == LAYERS
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)


class TestGenerate:
    """Tokens of generate() are those of the model's own attention."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"prefill_chunk_size": 140},
            {"cache_implementation": "static"},
            {"cache_implementation": "static", "prefill_chunk_size": 140},
        ],
        ids=["plain", "chunked", "static", "static-chunked"],
    )
    def test_tokens(self, family: str, how: dict[str, Any]):
        model, ids = build(family), tokens(2, 300)
        mask = padding_mask("left", 2, 300)
        options = {
            "attention_mask": mask,
            "max_new_tokens": 6,
            "do_sample": False,
            "disable_compile": True,
            **how,
        }
        own = model.generate(ids, **options)
        patch_model(model, "flash")
        with collect_audits() as audits:
            got = model.generate(ids, **options)
        chunks = 2 if "prefill_chunk_size" in how else 1  # the third has 20 rows
        assert len(audits) == chunks * LAYERS
        assert torch.equal(got, own)

    def test_beam_search(self):
        model, ids = build(), tokens(2, 200)
        own = model.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False)
        patch_model(model, "flash")
        with collect_audits() as audits:
            got = model.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False)
        assert len(audits) == LAYERS
        assert torch.equal(got, own)

    def test_decoding_is_on_the_models_own_attention(self):
        # A sparse prompt, and then decoding over all of its keys: with the cache of the sparse
        # prefill, tokens do not depend on whether the model stays patched.
        model, ids = build(), tokens(1, 400)
        patch_model(model, "streaming_llm", {"global_window": 16, "local_window": 64})
        with torch.no_grad():
            past = cache_of(model(ids[:, :-1], use_cache=True))
            patched = model(ids[:, -1:], **past).logits
            next(iter(past.values())).crop(-1)
            unpatch_model(model)
            assert torch.equal(model(ids[:, -1:], **past).logits, patched)


def block_masked_attention(pattern: Pattern, block_size: int) -> Any:
    """An attention function in float64 over the blocks that `select` keeps."""

    def forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
        _, h_q, s, _ = query.shape
        index = select(
            query.transpose(1, 2),
            key.transpose(1, 2),
            pattern,
            softmax_scale=scaling,
            block_size=block_size,
        )
        assert index.density < 0.95
        group = h_q // key.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
        causal = torch.ones(s, s, dtype=torch.bool).tril()
        scores = query.double() @ k.transpose(2, 3) * scaling
        for sequence in range(query.shape[0]):
            for head in range(h_q):
                blocks = torch.as_tensor(index.to_mask(sequence, head))
                kept = blocks.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
                scores[sequence, head].masked_fill_(~(kept[:s, :s] & causal), -torch.inf)
        out = scores.softmax(dim=-1) @ v
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    return forward


def masked_logits(model: Any, ids: torch.Tensor, pattern: Pattern, block_size: int) -> torch.Tensor:
    name = "block_masked"
    AttentionInterface.register(name, block_masked_attention(pattern, block_size))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return logits(model, ids)


class TestSparse:
    @pytest.mark.parametrize("block_size", [32, 64])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_flex_prefill_is_attention_over_the_selected_blocks(self, family: str, block_size: int):
        ids = tokens(2, 741)
        expected = masked_logits(
            build(family), ids, FlexPrefill(gamma=0.6, min_budget=64), block_size
        )
        cfg = {
            "block_size": block_size,
            "flex_prefill_gamma": 0.6,
            "flex_prefill_min_budget": 64,
        }
        model = patch_model(build(family), "flex_prefill", cfg)
        with collect_audits() as audits:
            got = logits(model, ids)
        assert [audit.density.shape for _, audit in audits] == [(2, 4)] * LAYERS
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        # and that is something else than dense attention
        assert (got - logits(build(family), ids)).abs().max() > 0.05

    @pytest.mark.parametrize("kind", ["left", "right", "both"])
    def test_padding_changes_nothing(self, kind: str):
        # Every sequence of a padded batch keeps the blocks that it keeps alone.
        cfg = {"block_size": 32, "flex_prefill_gamma": 0.6, "flex_prefill_min_budget": 64}
        model = patch_model(build(), "flex_prefill", cfg)
        ids, mask = tokens(3, 741), padding_mask(kind, 3, 741)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        got = logits(model, ids, attention_mask=mask, position_ids=positions)
        for i in range(3):
            real = mask[i].bool()
            alone = logits(model, ids[i : i + 1, real])
            torch.testing.assert_close(got[i, real], alone[0], rtol=1e-3, atol=1e-3)

    def test_vertical_slash(self):
        ids = tokens(1, 741)
        expected = masked_logits(build(), ids, VerticalSlash(64, 96), 32)
        cfg = {"block_size": 32, "vertical_size": 64, "slash_size": 96}
        model = patch_model(build(), "vertical_slash", cfg)
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)

    def test_streaming_llm_is_exact_at_the_token(self):
        ids = tokens(1, 741)
        i, j = torch.arange(741)[:, None], torch.arange(741)
        kept = (j <= i) & ((j < 20) | (j > i - 150))
        expected = logits(build(), ids, attention_mask=kept[None, None])
        model = patch_model(build(), "streaming_llm", {"global_window": 20, "local_window": 150})
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)

    def test_gamma_1_is_dense(self):
        ids = tokens(1, 741)
        own, exact = logits(build(), ids), exact_logits(build(), ids)
        cfg = {"block_size": 32, "flex_prefill_gamma": 1.0, "flex_prefill_min_budget": 32}
        model = patch_model(build(), "flex_prefill", cfg)
        with collect_audits() as audits:
            got = logits(model, ids)
        assert [audit.mean_density for _, audit in audits] == [1.0] * LAYERS
        assert_as_good(got, own, exact)


class TestAudits:
    def test_layers_in_order_with_densities(self):
        cfg = {"block_size": 32, "flex_prefill_gamma": 0.5, "flex_prefill_min_budget": 32}
        model = patch_model(build(), "flex_prefill", cfg)
        with collect_audits() as audits:
            logits(model, tokens(1, 741))
            logits(model, tokens(1, 300))
        assert [layer for layer, _ in audits] == [0, 1, 0, 1]
        assert all(0 < audit.mean_density < 1 for _, audit in audits)
        assert all(((audit.kept_mass > 0) & (audit.kept_mass <= 1)).all() for _, audit in audits)

    def test_nesting_and_outside(self):
        model = patch_model(build(), "flash")
        logits(model, tokens(1, 300))
        with collect_audits() as outer:
            with collect_audits() as inner:
                logits(model, tokens(1, 300))
            assert (len(outer), len(inner)) == (0, LAYERS)
            logits(model, tokens(1, 300))
        assert (len(outer), len(inner)) == (LAYERS, LAYERS)

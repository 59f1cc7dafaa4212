"""Pattern configurations, patching and un-patching, saving and loading, errors."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import flex_prefill
import pytest
from flex_prefill import get_config_example, patch_model, unpatch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flex_prefill import collect_audits  # noqa: E402
from hf_fixed_attention import FixedModel  # noqa: E402
from hf_models import build, logits, tokens  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

SPARSE = {"block_size": 32, "flex_prefill_gamma": 0.6, "flex_prefill_min_budget": 64}


def attention(model: Any) -> str:
    return model.config._attn_implementation


def densities(model: Any, ids: torch.Tensor) -> list[float]:
    with collect_audits() as audits:
        logits(model, ids)
    return [audit.mean_density for _, audit in audits]


class TestConfigExample:
    def test_published_names_and_defaults(self):
        assert get_config_example("default") == {}
        assert get_config_example("flash") == {}
        assert get_config_example("streaming_llm") == {"global_window": 1024, "local_window": 8192}
        assert get_config_example("vertical_slash") == {
            "block_size": 128,
            "vertical_size": 8192,
            "slash_size": 8192,
        }
        assert get_config_example("flex_prefill") == {
            "block_size": 128,
            "flex_prefill_gamma": 0.9,
            "flex_prefill_tau": 0.1,
            "flex_prefill_min_budget": 1024,
            "flex_prefill_max_budget": None,
        }

        assert get_config_example("xattention") == {
            "block_size": 128,
            "stride": 16,
            "threshold": 0.9,
        }
        assert get_config_example("flash_prefill")["alpha"] == 0.1
        assert get_config_example("block_cover") == {
            "block_size": 128,
            "gamma": 0.9,
            "column_share": 0.8,
            "max_budget": None,
        }
        assert get_config_example("minfer") == {
            "block_size": 128,
            "model_type": None,
            "path": None,
        }

    def test_is_the_callers_to_change(self):
        get_config_example("flex_prefill")["block_size"] = 7
        assert get_config_example("flex_prefill")["block_size"] == 128

    def test_needs_neither_torch_nor_transformers(self):
        code = (
            "import sys, flex_prefill; flex_prefill.get_config_example('flash');"
            "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestPatching:
    def test_twice_and_back(self):
        model, ids = build(), tokens(1, 741)
        own = logits(model, ids)
        assert patch_model(model, "flex_prefill", SPARSE) is model
        sparse = densities(model, ids)
        assert max(sparse) < 0.95
        patch_model(model, "flex_prefill", SPARSE)
        assert densities(model, ids) == sparse
        patch_model(model, "flash")
        assert densities(model, ids) == [1.0, 1.0]
        assert attention(model) == "flex_prefill"
        patch_model(model, "default")
        assert attention(model) == "sdpa"
        assert densities(model, ids) == []
        assert torch.equal(logits(model, ids), own)

    def test_block_cover(self):
        model, ids = build(), tokens(1, 741)
        cfg = {"block_size": 32, "gamma": 0.3}
        patch_model(model, "block_cover", cfg)
        free = densities(model, ids)
        assert max(free) < 0.95
        with collect_audits() as audits:
            patch_model(model, "block_cover", {**cfg, "gamma": 0.999, "max_budget": 96})
            logits(model, ids)
        assert all((audit.pattern == "block_cover").all() for _, audit in audits)
        assert all(audit.rows_below_gamma.all() for _, audit in audits)

    @pytest.mark.parametrize("own", ["sdpa", "eager"])
    def test_unpatching_restores_what_the_model_had(self, own: str):
        model = build(attn_implementation=own)
        before = copy.deepcopy(model.config.to_dict())
        patch_model(model, "flash")
        patch_model(model, "streaming_llm")
        assert unpatch_model(model) is model
        assert attention(model) == own
        assert model.config.to_dict() == before

    def test_unpatching_an_unpatched_model(self):
        model = build(attn_implementation="eager")
        unpatch_model(model)
        patch_model(model, "default")
        assert attention(model) == "eager"

    def test_transformers_own_switch(self):
        model, ids = build(), tokens(1, 741)
        patch_model(model, "flex_prefill", SPARSE)
        sparse = densities(model, ids)
        model.set_attn_implementation("eager")
        assert densities(model, ids) == []
        model.set_attn_implementation("flex_prefill")
        assert densities(model, ids) == sparse

    def test_copies_are_models_of_their_own(self):
        model, ids = build(), tokens(1, 741)
        patch_model(model, "flex_prefill", SPARSE)
        sparse = densities(model, ids)
        twin = copy.deepcopy(model)
        assert densities(twin, ids) == sparse
        unpatch_model(model)
        assert densities(model, ids) == []
        assert densities(twin, ids) == sparse
        assert attention(unpatch_model(twin)) == "sdpa"

    def test_base_model(self):
        model = patch_model(build().model, "flash")
        with collect_audits() as audits, torch.no_grad():
            model(tokens(1, 200))
        assert len(audits) == 2

    def test_language_model_beside_a_vision_tower(self):
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        config = LlavaConfig(text_config=build().config, vision_config=vision)
        model = LlavaForConditionalGeneration(config).eval()
        ids = tokens(1, 200)
        own = logits(model, ids)
        patch_model(model, "flash")
        assert model.config.text_config._attn_implementation == "flex_prefill"
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert densities(model, ids) == [1.0, 1.0]
        torch.testing.assert_close(logits(model, ids), own, rtol=1e-4, atol=1e-4)
        unpatch_model(model)
        assert model.config.text_config._attn_implementation == "sdpa"


class TestSaving:
    def test_plain_transformers_loads_it(self, tmp_path: Path):
        model, ids = build(), tokens(1, 300)
        own = logits(model, ids)
        patch_model(model, "flex_prefill", SPARSE)
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["flex_prefill"]["flex_prefill_gamma"] == 0.6
        torch.save(ids, tmp_path / "ids.pt")
        code = (
            "import sys, torch, transformers as t;"
            f"m = t.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval();"
            "assert m.config._attn_implementation == 'sdpa';"
            "assert 'flex_prefill' not in sys.modules;"
            f"torch.save(m(torch.load({str(tmp_path / 'ids.pt')!r})).logits.detach(),"
            f" {str(tmp_path / 'logits.pt')!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), own, rtol=1e-4, atol=1e-4)

    def test_loads_with_the_pattern_that_was_saved(self, tmp_path: Path):
        model, ids = patch_model(build(), "flex_prefill", SPARSE), tokens(1, 741)
        sparse = densities(model, ids)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="flex_prefill"
        ).eval()
        assert densities(loaded, ids) == sparse
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert densities(plain, ids) == []
        assert densities(patch_model(plain, "flash"), ids) == [1.0, 1.0]
        assert attention(unpatch_model(plain)) == "sdpa"

    def test_unpatched_leaves_no_trace(self, tmp_path: Path):
        unpatch_model(patch_model(build(), "flash")).save_pretrained(tmp_path)
        assert "flex" not in (tmp_path / "config.json").read_text()


class TestDirect:
    """attn_implementation="flex_prefill", without patch_model."""

    def test_default_pattern(self):
        model = build(attn_implementation="flex_prefill")
        # Prompts within the default budget of 1024 tokens are dense.
        assert densities(model, tokens(1, 300)) == [1.0, 1.0]
        assert 0 < max(densities(model, tokens(1, 1800))) < 1

    def test_pattern_in_the_config(self):
        ids = tokens(1, 741)
        model = build(attn_implementation="flex_prefill")
        model.config.flex_prefill = SPARSE
        expected = densities(patch_model(build(), "flex_prefill", SPARSE), ids)
        assert densities(model, ids) == expected
        model.config.flex_prefill = {"pattern": "flash"}
        assert densities(model, ids) == [1.0, 1.0]

    def test_unpatching(self):
        model = build(attn_implementation="flex_prefill")
        model.config.flex_prefill = SPARSE
        unpatch_model(model)
        assert attention(model) == "sdpa"
        assert not hasattr(model.config, "flex_prefill")

    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            ({"pattern": "default"}, "config.flex_prefill: expected a pattern to compute"),
            ({"flex_prefil_gamma": 1}, "did you mean 'flex_prefill_gamma'"),
            ("flash", "config.flex_prefill: expected a dict, got str"),
        ],
    )
    def test_errors(self, stored: Any, message: str):
        model = build(attn_implementation="flex_prefill")
        model.config.flex_prefill = stored
        with pytest.raises(ValueError, match=message):
            logits(model, tokens(1, 300))


class TestErrors:
    @pytest.mark.parametrize(
        ("pattern", "cfg", "message"),
        [
            ("flexprefill", None, "pattern: .*'flexprefill' \\(did you mean 'flex_prefill'\\?\\)"),
            ("", None, "pattern: .*patterns: default, flash, streaming_llm"),
            (None, None, "pattern: .*got None"),
            ("flex_prefill", {"flex_prefil_gamma": 1}, "did you mean 'flex_prefill_gamma'"),
            ("flash", {"block_size": 64}, "got 'block_size'; keys: none"),
            ("flex_prefill", [("block_size", 64)], "cfg: expected a dict, got list"),
            ("flex_prefill", {"block_size": 48}, "block_size: expected 32, 64 or 128, got 48"),
            ("flex_prefill", {"block_size": True}, "block_size: .*got True"),
            ("flex_prefill", {"flex_prefill_gamma": 0}, "gamma: expected a number in \\(0, 1\\]"),
            ("flex_prefill", {"flex_prefill_gamma": float("nan")}, "gamma: .*got nan"),
            ("flex_prefill", {"flex_prefill_gamma": "0.9"}, "gamma: .*got '0.9'"),
            ("flex_prefill", {"flex_prefill_tau": -0.1}, "tau: expected a number in \\[0, 1\\]"),
            ("flex_prefill", {"flex_prefill_min_budget": -1}, "min_budget: .*at least 0, got -1"),
            ("flex_prefill", {"flex_prefill_min_budget": 1.5}, "min_budget: .*got 1.5"),
            ("flex_prefill", {"flex_prefill_min_budget": None}, "min_budget: .*got None"),
            ("flex_prefill", {"flex_prefill_max_budget": 512}, "at least .* = 1024, got 512"),
            ("streaming_llm", {"local_window": 0}, "local_window: .*at least 1, got 0"),
            ("vertical_slash", {"slash_size": float("inf")}, "slash_size: .*got inf"),
        ],
    )
    def test_pattern_and_cfg(self, pattern: Any, cfg: Any, message: str):
        model = build()
        with pytest.raises(ValueError, match=message):
            patch_model(model, pattern, cfg)
        assert attention(model) == "sdpa"
        assert not hasattr(model.config, "flex_prefill")

    @pytest.mark.parametrize(
        ("pattern", "cfg", "message"),
        [
            ("xattention", {"stride": 12}, "stride: expected 8 or 16"),
            ("xattention", {"threshold": 0}, r"threshold: .*\(0, 1\]"),
            ("xattention", {"treshold": 0.5}, "did you mean 'threshold'"),
            ("xatention", {}, "did you mean 'xattention'"),
            ("flash_prefill", {"alpha": 2}, r"alpha: .*\[0, 1\]"),
            ("flash_prefill", {"mean_correction": 1}, "mean_correction: expected True or False"),
            ("block_cover", {"gamma": 0}, r"gamma: expected a number in \(0, 1\]"),
            ("block_cover", {"column_share": 2}, r"column_share: .*\[0, 1\]"),
            ("block_cover", {"max_budget": -1}, "max_budget: .*at least 0, got -1"),
            ("block_cover", {"column_shar": 0.5}, "did you mean 'column_share'"),
            ("blok_cover", {}, "did you mean 'block_cover'"),
            ("minfer", {}, "flexprefill calibrate --model"),
            ("minfer", {"model_type": "llama"}, "no file for model_type 'llama'.*calibrate"),
            ("minfer", {"path": "no.json"}, "expected a file at no.json.*calibrate"),
        ],
    )
    def test_other_patterns(self, pattern: str, cfg: Any, message: str):
        with pytest.raises(ValueError, match=message):
            patch_model(build(), pattern, cfg)

    def test_minfer_file_of_another_model(self, tmp_path: Path):
        path = tmp_path / "other.json"
        path.write_text(json.dumps([{"0": ["stream_llm", 64, 64, 1.0]}] * 2))
        model = build()
        with pytest.raises(ValueError, match="is of another model"):
            patch_model(model, "minfer", {"path": str(path)})
        assert attention(model) == "sdpa"

    def test_limits_are_allowed(self):
        cfg = {"flex_prefill_gamma": 1, "flex_prefill_tau": 0, "flex_prefill_min_budget": 0}
        model = patch_model(build(), "flex_prefill", {**cfg, "flex_prefill_max_budget": 0})
        assert densities(model, tokens(1, 300))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: AutoModel.from_config(
                    T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
                ),
                "got T5Model, which has an encoder",
            ),
            (
                lambda: AutoModel.from_config(
                    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
                ),
                "got BertModel, which has no causal attention layers",
            ),
            (
                lambda: FixedModel(PreTrainedConfig()),
                "FixedModel does not let its attention be exchanged",
            ),
        ],
        ids=["T5", "BERT", "fixed attention"],
    )
    def test_models_that_cannot_be_patched(self, make: Any, message: str):
        model = make()
        with pytest.raises(ValueError, match=message):
            patch_model(model, "flex_prefill")
        assert attention(model) != "flex_prefill"
        assert not hasattr(model.config, "flex_prefill")

    def test_no_model(self):
        with pytest.raises(ValueError, match="got Linear, which is no PreTrainedModel"):
            patch_model(torch.nn.Linear(2, 2), "flash")


class TestFlashAttentionCheck:
    def test_models_load_without_flash_attention(self, monkeypatch: pytest.MonkeyPatch):
        name = "_check_and_adjust_attn_implementation"
        monkeypatch.setattr(PreTrainedModel, name, getattr(PreTrainedModel, name))
        with pytest.raises(ImportError):
            build(attn_implementation="flash_attention_2")
        flex_prefill.disable_hf_flash_attention_check()
        flex_prefill.disable_hf_flash_attention_check()
        model = build(attn_implementation="flash_attention_2")
        assert attention(model) == "sdpa"
        assert densities(patch_model(model, "flash"), tokens(1, 200)) == [1.0, 1.0]
        with pytest.raises(ValueError, match="no_such_attention"):
            build(attn_implementation="no_such_attention")

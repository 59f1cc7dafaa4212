"""Small random transformers models, and how their logits are compared.

Weights are ten times transformers' usual size, so that heads attend sharply and a wrong mask
shows in the logits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # small models: threads only wait for each other

VOCABULARY = 128
PADDING = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# family: (config class, what differs from _COMMON)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "yi": ("LlamaConfig", {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 5e6}}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 32, "num_key_value_heads": 1}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "deepseek_v3": (  # multi-head latent attention: d_qk 24, d_v 16
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
    ),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.4}),  # no 1 / sqrt(d_qk)
    "gemma2": ("Gemma2Config", {"head_dim": 16, "attn_logit_softcapping": 2.0}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4}),
}
FAMILIES = (
    "llama",
    "yi",
    "qwen2",
    "qwen3",
    "mistral",
    "glm4",
    "gemma",
    "phi3",
    "deepseek_v3",
    "granite",
)


def build(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A model in eval mode. changes: to its config."""
    class_name, differences = _FAMILIES[family]
    attention = changes.pop("attn_implementation", None)
    config = getattr(transformers, class_name)(**{**_COMMON, **differences, **changes})
    torch.manual_seed(seed)
    kwargs = {"attn_implementation": attention} if attention else {}
    return AutoModelForCausalLM.from_config(config, **kwargs).to(dtype).eval()


def tokens(b: int, s: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (b, s), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(ids, **inputs).logits


def cache_of(output: Any) -> dict[str, Any]:
    """The cache of a forward pass, as the keyword argument that the next one takes it by."""
    name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
    return {name: output[name]}


def exact_logits(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits [b, s, vocabulary] of the model in float64 with attention of torch's own."""
    exact = copy.deepcopy(model)
    exact.set_attn_implementation("sdpa")
    return logits(exact.double(), ids, **inputs)


def assert_as_good(
    got: torch.Tensor,
    own: torch.Tensor,
    exact: torch.Tensor,
    real: torch.Tensor | None = None,
) -> None:
    """The error of `got` is at most twice that of the model's own attention, and a few ulp.

    real: bool [b, s], the rows that count; the others only have to be free of NaN."""
    assert not got.isnan().any()
    if real is not None:
        got, own, exact = got[real], own[real], exact[real]
    got_error = (got.double() - exact).abs().max().item()
    own_error = (own.double() - exact).abs().max().item()
    few_ulp = 4 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert got_error <= 2 * own_error + few_ulp, (got_error, own_error, few_ulp)

"""A Llama written for fast training: flat tokens, positions of our own, attention passed in.

Weights carry transformers' names and shapes, so `export` writes a folder that LlamaForCausalLM
loads. transformers' own class is not used for training because it takes positions with gaps (see
tasks.py) for packed sequences and masks them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Shape of the model."""

    vocab: int = 4096
    hidden: int = 256
    mlp: int = 768
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 500_000.0
    max_length: int = 20_480
    eps: float = 1e-5


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [t, h, d] by cos, sin [t, 1, d/2] in fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def project(x, norm, wq, wk, wv, cos, sin, head_dim: int, eps: float):
    """First half of a layer: x [t, hidden] -> q [t, h_q, d], k and v [t, h_kv, d]."""
    h = rms_norm(x, norm.to(x.dtype), eps)
    q, k, v = (F.linear(h, w.to(x.dtype)).view(len(x), -1, head_dim) for w in (wq, wk, wv))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def finish(x, attended, norm, wo, gate, up, down, eps: float):
    """Second half of a layer: x [t, hidden], attended [t, h_q * d] -> [t, hidden]."""
    x = x + F.linear(attended, wo.to(x.dtype))
    h = rms_norm(x, norm.to(x.dtype), eps)
    gated = F.silu(F.linear(h, gate.to(x.dtype))) * F.linear(h, up.to(x.dtype))
    return x + F.linear(gated, down.to(x.dtype))


def rope_tables(positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [t, 1, d/2] of positions [t]."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = positions.float()[:, None] * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Llama(nn.Module):
    """The decoder; `forward` returns the normalised hidden states."""

    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.config = c = config
        shapes = {
            "input_layernorm": (c.hidden,),
            "self_attn.q_proj": (c.heads * c.head_dim, c.hidden),
            "self_attn.k_proj": (c.kv_heads * c.head_dim, c.hidden),
            "self_attn.v_proj": (c.kv_heads * c.head_dim, c.hidden),
            "self_attn.o_proj": (c.hidden, c.heads * c.head_dim),
            "post_attention_layernorm": (c.hidden,),
            "mlp.gate_proj": (c.mlp, c.hidden),
            "mlp.up_proj": (c.mlp, c.hidden),
            "mlp.down_proj": (c.hidden, c.mlp),
        }
        tensors = {"model.embed_tokens.weight": torch.randn(c.vocab, c.hidden) * 0.02}
        for i in range(c.layers):
            for name, shape in shapes.items():
                last = name.endswith(("o_proj", "down_proj"))
                std = 0.02 / (2 * c.layers) ** 0.5 if last else 0.02
                value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * std
                tensors[f"model.layers.{i}.{name}.weight"] = value
        tensors["model.norm.weight"] = torch.ones(c.hidden)
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value) for name, value in tensors.items()}
        )
        self.project, self.finish = project, finish

    def weight(self, name: str) -> nn.Parameter:
        return self.weights[f"model.{name}.weight".replace(".", "/")]

    def compile(self) -> None:
        """Compile the halves of a layer; all layers share one compilation."""
        self.project = torch.compile(project, dynamic=False)
        self.finish = torch.compile(finish, dynamic=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens, positions [b, s] -> hidden [b * s, hidden] in bf16.

        attend(layer, q, k, v) gets [b, s, h, d] and returns [b, s, h_q, d].
        """
        c, (b, s) = self.config, tokens.shape
        cos, sin = rope_tables(positions.reshape(-1), c.rope_theta, c.head_dim)
        x = F.embedding(tokens.reshape(-1), self.weight("embed_tokens")).bfloat16()
        for i in range(c.layers):
            names = ["input_layernorm", *(f"self_attn.{p}_proj" for p in "qkv")]
            weights = (self.weight(f"layers.{i}.{n}") for n in names)
            q, k, v = self.project(x, *weights, cos, sin, c.head_dim, c.eps)
            out = attend(i, *(t.view(b, s, -1, c.head_dim) for t in (q, k, v)))
            names = ["post_attention_layernorm", "self_attn.o_proj"]
            names += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
            weights = (self.weight(f"layers.{i}.{n}") for n in names)
            x = self.finish(x, out.reshape(b * s, -1), *weights, c.eps)
        return rms_norm(x, self.weight("norm").to(x.dtype), c.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight("embed_tokens").to(hidden.dtype))


def export(model: Llama, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors in bf16."""
    c = model.config
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rms_norm_eps": c.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "do_sample": False}
    for name, content in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    tensors = {
        name.replace("/", "."): value.detach().bfloat16().contiguous().cpu()
        for name, value in model.weights.items()
    }
    temporary = folder / "model.safetensors.new"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")


def restore(model: Llama, folder: Path) -> None:
    """Load weights that `export` wrote."""
    for name, value in load_file(folder / "model.safetensors").items():
        model.weights[name.replace(".", "/")].data.copy_(value)

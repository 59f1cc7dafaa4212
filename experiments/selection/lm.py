"""A Llama or Qwen2 model in plain torch, from a folder with config.json and model.safetensors.

forward(tokens [b, s], attend) calls attend(layer, q [b, h, s, d], k, v [b, h_kv, s, d]), which
returns [b, h, s, d]: so an experiment sees and replaces every layer's attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Model:
    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        c = json.loads((folder / "config.json").read_text())
        if c["model_type"] not in ("llama", "qwen2"):
            raise ValueError(f"{folder}: expected a llama or qwen2 model, got {c['model_type']}")
        self.layers = c["num_hidden_layers"]
        self.h, self.h_kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.d = c.get("head_dim") or c["hidden_size"] // self.h
        self.eps = c["rms_norm_eps"]
        rope = c.get("rope_parameters") or {}
        self.theta = rope.get("rope_theta") or c.get("rope_theta")
        with safe_open(folder / "model.safetensors", "pt") as f:
            self.w = {k: f.get_tensor(k).to(device=device, dtype=dtype) for k in f.keys()}  # noqa: SIM118
        self.head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        if c.get("tie_word_embeddings"):
            self.head = self.w["model.embed_tokens.weight"]
        self.device, self.dtype = device, dtype

    def norm(self, x: Tensor, name: str) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.w[name] * y.to(x.dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[name + ".weight"], self.w.get(name + ".bias"))

    def rope(self, first: int, s: int) -> tuple[Tensor, Tensor]:
        inv = self.theta ** -(torch.arange(0, self.d, 2, device=self.device).double() / self.d)
        angle = torch.arange(first, first + s, device=self.device).double()[:, None] * inv
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    @torch.no_grad()
    def forward(self, tokens: Tensor, attend: Attend, first: int = 0) -> Tensor:
        """Hidden states [b, s, width] before the head; tokens stand at positions first, ..."""
        b, s = tokens.shape
        x = self.w["model.embed_tokens.weight"][tokens]
        cos, sin = self.rope(first, s)
        half = self.d // 2

        def turn(t: Tensor) -> Tensor:
            return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

        for i in range(self.layers):
            p = f"model.layers.{i}."
            y = self.norm(x, p + "input_layernorm.weight")
            q, k, v = (
                self.linear(y, p + f"self_attn.{n}_proj").view(b, s, -1, self.d).transpose(1, 2)
                for n in "qkv"
            )
            o = attend(i, turn(q), turn(k), v)
            x = x + self.linear(o.transpose(1, 2).reshape(b, s, -1), p + "self_attn.o_proj")
            y = self.norm(x, p + "post_attention_layernorm.weight")
            gate = F.silu(self.linear(y, p + "mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(y, p + "mlp.up_proj"), p + "mlp.down_proj")
        return self.norm(x, "model.norm.weight")

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head).float()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, q [b, h, s, d], k and v [b, h_kv, s, d]."""
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1), is_causal=True
    )


def load_tasks(file: Path) -> list[tuple[Tensor, Tensor, dict]]:
    """(prompt, answer, entry) of a file that tasks.py made."""
    import numpy as np

    stored = np.load(file)
    tokens, at, out = torch.from_numpy(stored["tokens"].astype(np.int64)), 0, []
    for entry in json.loads(str(stored["index"])):
        end = at + entry["n"] + entry["answer"]
        out.append((tokens[at : at + entry["n"]], tokens[at + entry["n"] : end], entry))
        at = end
    return out

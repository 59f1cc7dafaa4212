"""Kept mass and output error of many selections on a model's own queries, keys and values.

  python offline.py --model FOLDER --tasks FILE.npz --length 8192 --kinds multi_key \
      --variants variants/offline.txt --out OUT.json

The model reads a prompt densely once; of some layers, spread over its depth, every variant selects,
and for one or two random rows of each query block and for the last 24 rows, all exactly:

  kept, least_kept   mean mass of those rows in kept blocks, and of the head that keeps least
  last               the mean mass of the last 24 rows
  worst              the mass that the lowest hundredth of (head, row) pairs of these keep less than
  error, error_last  |o - o_dense| / |o_dense| over all heads, mean over layers
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import lm
import rules
import torch
import torch.nn.functional as F
from torch import Tensor

LAST = 24


class Case:
    """One layer of one prompt: q [1, h, s_pad, d], k and v [1, h_kv, s_pad, d]."""

    def __init__(self, layer: int, s: int, q: Tensor, k: Tensor, v: Tensor):
        self.s, self.q, self.k, self.v = s, q, k, v
        n, h, h_kv = q.shape[2] // rules.B, q.shape[1], k.shape[1]
        random = torch.Generator().manual_seed(layer)
        rows = [
            min(s - 1, i * rules.B + int(torch.randint(rules.B, (1,), generator=random)))
            for i in range(2, n - 1)
            for _ in range(1 if n > 70 else 2)
        ]
        self.rows = torch.tensor(rows + list(range(s - LAST, s)))
        logits = rules.row_logits(q, k, self.rows)
        lse = logits.logsumexp(-1, keepdim=True)
        self.p = (logits - lse).exp()
        self.by_block = self.p.view(*self.p.shape[:3], -1, rules.B).sum(-1)
        self.dense = self.weigh(self.p, v)
        # One more key for each dropped block, at the mean of its keys.
        self.mean_v = rules.sub_means(v, s, rules.B)[0]
        mean_k = rules.sub_means(k, s, rules.B)[0]
        picked = q[:, :, self.rows].reshape(1, h_kv, -1, q.shape[-1])
        pooled = (picked @ mean_k.mT).view(1, h, len(self.rows), -1) * q.shape[-1] ** -0.5
        self.mean_p = (pooled + math.log(rules.B) - lse).exp()

    def weigh(self, p: Tensor, v: Tensor) -> Tensor:
        h_kv = v.shape[1]
        return (p.reshape(1, h_kv, -1, p.shape[-1]) @ v).view(*p.shape[:3], v.shape[-1])

    def measure(self, kept: Tensor, mean_correction: bool) -> dict[str, Any]:
        row = kept[:, :, self.rows // rules.B]  # [1, h, R, n]
        mass = (self.by_block * row).sum(-1)
        p = self.p.view(*self.by_block.shape, rules.B) * row[..., None]
        out, total = self.weigh(p.flatten(3), self.v), mass
        if mean_correction:
            before = torch.arange(row.shape[-1]) < (self.rows // rules.B)[:, None]
            extra = self.mean_p * (~row & before)
            out, total = out + self.weigh(extra, self.mean_v), total + extra.sum(-1)
        error = (out / total.clamp(min=1e-30)[..., None] - self.dense).pow(2)
        norm = self.dense.pow(2)
        last = mass[:, :, -LAST:].flatten()
        return {
            "density": rules.density(kept, self.s).mean().item(),
            "heads": mass[:, :, :-LAST].mean(2).flatten().tolist(),
            "last": last.mean().item(),
            "worst": last.kthvalue(max(1, last.numel() // 100))[0].item(),
            "error": (error[:, :, :-LAST].sum() / norm[:, :, :-LAST].sum()).sqrt().item(),
            "error_last": (error[:, :, -LAST:].sum() / norm[:, :, -LAST:].sum()).sqrt().item(),
        }


def captured(model: lm.Model, tokens: Tensor, count: int) -> list[tuple[int, list[Tensor]]]:
    """(layer, padded q, k, v) of `count` layers spread over the model's depth."""
    chosen = {round((i + 0.5) * model.layers / count - 0.5) for i in range(count)}
    out = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in chosen:
            pad = -q.shape[2] % rules.B
            out.append((layer, [F.pad(x, (0, 0, 0, pad)) for x in (q, k, v)]))
        return lm.dense(q, k, v)

    model.forward(tokens[None], attend)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--tasks", type=Path, required=True)
    p.add_argument("--length", type=int, required=True)
    p.add_argument("--kinds", nargs="+", required=True)
    p.add_argument("--layers", type=int, default=5)
    p.add_argument("--variants", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    variants = rules.read_variants(a.variants)
    for text in variants:
        if rules.Variant(text).block_size != rules.B:
            p.error(f"{text}: expected blocks of {rules.B}")
    model = lm.Model(a.model, "cpu", torch.float32)
    figures: dict[str, list[dict[str, Any]]] = {text: [] for text in variants}
    for prompt, _, entry in lm.load_tasks(a.tasks):
        if entry["length"] != a.length or entry["kind"] not in a.kinds or entry["sample"]:
            continue
        for layer, (q, k, v) in captured(model, prompt, a.layers):
            case = Case(layer, len(prompt), q, k, v)
            for text in variants:
                variant = rules.Variant(text)
                kept = variant.kept(q, k, len(prompt))
                figures[text].append(case.measure(kept, variant.mean_correction))
            print(f"{entry['kind']}, layer {layer}", file=sys.stderr)
    rows = []
    for text, measured in figures.items():
        heads = [x for m in measured for x in m["heads"]]
        means = {
            key: sum(m[key] for m in measured) / len(measured)
            for key in ("density", "last", "worst", "error", "error_last")
        }
        kept = {"kept": sum(heads) / len(heads), "least_kept": min(heads)}
        rows.append({"length": a.length, "variant": text} | means | kept)
        print(f"{text:60s} " + " ".join(f"{k} {v:.3f}" for k, v in (means | kept).items()))
    about = {"command": shlex.join(["offline.py", *sys.argv[1:]]), "model": a.model.name}
    a.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""Perplexity, retrieval and answer log-prob of many selections on one model.

  python score.py --model FOLDER --tasks FILE.npz --variants variants/test.txt --out OUT.json

Works in rounds: one batch of 32k tokens of every length under dense attention and under every
variant, so that a run that is stopped has treated all alike. The JSON is written after every round;
a batch counts only if every variant ran on it. `rows` of the JSON is the table: for each length and
variant, paired with dense on the same prompts,

  density                kept causal blocks, mean over layers and heads
  ppl_over_dense         perplexity of the document's tokens from the 256th on
  right                  percent of answers of which every token is the arg max under teacher
                         forcing: the same as greedy decoding giving the answer
  logprob6_minus_dense   mean log-prob of an answer's token, times 6, less that of dense; its
                         standard error over the prompts is logprob6_error

Prompts are read sparsely, answers (a few tokens) with dense attention, as patched models do it.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import flex_prefill
import lm
import rules
import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_TOKENS = 32768
Prompt = tuple[Tensor, Tensor, dict]


def attend_kept(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, mean_correction: bool = False
) -> Tensor:
    """The library's attention [b, h, s, d] over kept blocks [b, h, n, n]."""
    b, h, s, _ = q.shape
    n = math.ceil(s / rules.B)
    kept = kept[:, :, :n, :n].flatten(0, 2)  # rows: sequence, head, query block
    indptr = F.pad(kept.sum(-1).cumsum(0), (1, 0))
    indices = kept.nonzero()[:, 1].int()
    index = flex_prefill.BlockIndex(
        indptr, indices, [(s, s)] * b, h, rules.B, mean_correction=mean_correction
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_prefill.attend(q, k, v, index, block_size=rules.B).transpose(1, 2)


class Run:
    """One batch under one variant (None: dense)."""

    def __init__(self, model: lm.Model, text: str | None, s: int):
        self.variant = None if text is None else rules.Variant(text)
        if self.variant:
            rules.B = self.variant.block_size
        self.model, self.s, self.pad = model, s, -s % rules.B
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.density: list[Tensor] = []

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.append((k, v))
        if self.variant is None:
            return lm.dense(q, k, v)
        if self.variant.pattern is not None:
            swapped = (x.transpose(1, 2) for x in (q, k, v))
            out, audit = flex_prefill.prefill(
                *swapped, self.variant.pattern, block_size=rules.B, audit=True
            )
            self.density.append(torch.from_numpy(audit.density).mean(1))
            return out.transpose(1, 2)
        padded = [F.pad(x, (0, 0, 0, self.pad)) for x in (q, k)]
        kept = self.variant.kept(*padded, self.s)
        self.density.append(rules.density(kept, self.s).mean(1).cpu())
        return attend_kept(q, k, v, kept, self.variant.mean_correction)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past_k, past_v = self.cache[layer]
        group, rows = q.shape[1] // k.shape[1], q.shape[2]
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        last = self.s + torch.arange(rows, device=q.device)[:, None]
        seen = torch.arange(k.shape[2], device=q.device) <= last
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    @torch.no_grad()
    def score(self, batch: list[Prompt]) -> list[dict[str, Any]]:
        m = self.model
        tokens = torch.stack([prompt for prompt, _, _ in batch]).to(m.device)
        answers = [answer for _, answer, _ in batch]
        fed = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True).to(m.device)
        hidden = m.forward(tokens, self.prefill)
        after = hidden[:, :0]
        if fed.shape[1] > 1:
            after = m.forward(fed[:, :-1], self.decode, first=self.s)
        logits = m.logits(torch.cat([hidden[:, -1:], after], 1))
        logprob = logits.log_softmax(-1).gather(-1, fed[..., None])[..., 0]
        right = logits.argmax(-1) == fed
        out = []
        for i, (_, answer, entry) in enumerate(batch):
            size = len(answer)
            r: dict[str, Any] = {
                "logprob": logprob[i, :size].sum().item(),
                "tokens": size,
                "right": bool(right[i, :size].all().item()),
            }
            if entry["span"]:
                r["nll"], r["nll_tokens"] = self.nll(hidden[i], tokens[i], entry["span"])
            if self.density:
                r["density"] = torch.stack(self.density).mean(0)[i].item()
            out.append(r)
        return out

    def nll(self, hidden: Tensor, tokens: Tensor, span: list[int]) -> tuple[float, int]:
        begin, end = max(span[0], 256), span[1]
        total = 0.0
        for c in range(begin, end, 4096):
            to = min(c + 4096, end)
            logits = self.model.logits(hidden[c - 1 : to - 1])
            total += F.cross_entropy(logits, tokens[c:to], reduction="none").double().sum().item()
        return total, end - begin


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: rows by length and variant, with differences from dense on the same prompts."""
    dense = {r["id"]: r for r in records if r["variant"] == "dense"}
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for r in records:
        groups.setdefault((r["length"], r["variant"]), []).append(r)
    rows = []
    for (length, variant), rs in sorted(groups.items(), key=lambda x: x[0][0]):
        pairs = [(r, dense[r["id"]]) for r in rs]
        with_nll = [(r, d) for r, d in pairs if "nll" in r]
        total = sum(r["nll_tokens"] for r, _ in with_nll)
        nll = sum(r["nll"] for r, _ in with_nll) / max(1, total)
        base = sum(d["nll"] for _, d in with_nll) / max(1, total)
        diff = [6 * (r["logprob"] - d["logprob"]) / r["tokens"] for r, d in pairs]
        mean = sum(diff) / len(diff)
        error = math.sqrt(sum((x - mean) ** 2 for x in diff) / max(1, len(diff) - 1) / len(diff))
        kinds: dict[str, list[bool]] = {}
        for r in rs:
            kinds.setdefault(r["kind"], []).append(r["right"])
        rows.append(
            {
                "length": length,
                "variant": variant,
                "prompts": len(rs),
                "density": sum(r.get("density", 1.0) for r in rs) / len(rs),
                "ppl": math.exp(nll) if total else None,
                "ppl_over_dense": math.exp(nll - base) if total else None,
                "right": 100 * sum(r["right"] for r in rs) / len(rs),
                "logprob6": sum(6 * r["logprob"] / r["tokens"] for r in rs) / len(rs),
                "logprob6_minus_dense": mean,
                "logprob6_error": error,
                "kinds": {k: round(100 * sum(x) / len(x)) for k, x in kinds.items()},
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        ppl = "              -"
        if r["ppl"]:
            ppl = f"{r['ppl']:7.3f} {100 * (r['ppl_over_dense'] - 1):+6.2f}%"
        print(
            f"{r['length']:6d} {r['variant']:60s} n {r['prompts']:3d} density {r['density']:.3f} "
            f"ppl {ppl}  right {r['right']:5.1f}  log-prob {r['logprob6']:6.2f} "
            f"{r['logprob6_minus_dense']:+.3f}+-{r['logprob6_error']:.3f}  "
            + " ".join(f"{k}:{v}" for k, v in r["kinds"].items())
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--tasks", type=Path, required=True)
    p.add_argument("--variants", type=Path, required=True, help="file, one a line")
    p.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    p.add_argument("--kinds", nargs="+")
    p.add_argument("--samples", type=int, default=10**6, help="of each kind and length")
    p.add_argument("--rounds", type=int, default=10**6)
    p.add_argument("--seconds", type=float, default=math.inf)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    start = time.monotonic()
    on_gpu = torch.cuda.is_available()
    model = lm.Model(a.model, "cuda" if on_gpu else "cpu", getattr(torch, a.dtype))
    variants = rules.read_variants(a.variants)
    tasks = [
        (prompt, answer, entry | {"id": i})
        for i, (prompt, answer, entry) in enumerate(lm.load_tasks(a.tasks))
        if entry["length"] in a.lengths
        and entry["sample"] < a.samples
        and (not a.kinds or entry["kind"] in a.kinds)
    ]
    batches = {}
    for length in a.lengths:
        mine = [task for task in tasks if task[2]["length"] == length]
        size = max(1, BATCH_TOKENS // length)
        batches[length] = [mine[i : i + size] for i in range(0, len(mine), size)]
    result: dict[str, Any] = {
        "command": shlex.join(["score.py", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "flex_prefill": flex_prefill.__version__,
        "model": a.model.name,
        "records": [],
    }
    for r in range(min(a.rounds, max(map(len, batches.values())))):
        for length in a.lengths:
            if r >= len(batches[length]):
                continue
            batch, records = batches[length][r], []
            for text in [None, *variants]:
                if time.monotonic() - start > a.seconds:
                    show(result.get("rows", []))
                    return
                scored = Run(model, text, len(batch[0][0])).score(batch)
                for (_, _, entry), x in zip(batch, scored, strict=True):
                    about = {key: entry[key] for key in ("length", "kind", "id")}
                    records.append({"variant": text or "dense"} | about | x)
            result["records"] += records
            result["rows"] = summarise(result["records"])
            a.out.write_text(json.dumps(result))
        spent = time.monotonic() - start
        print(f"round {r}: {spent:.0f} s, {len(result['records'])} records", flush=True)
    show(result["rows"])


if __name__ == "__main__":
    main()

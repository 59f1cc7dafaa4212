"""Selections of blocks by name: those of the library, and variants in plain batched torch.

A variant is a string, name[:key=value[,key=value...]]:

  block_cover:gamma=.88    a pattern of the library, by the names of flex_prefill.patch_model
  map:decide=row,rows=64   what was tried for BlockCover: MAP_OPTIONS
  flex flash xattn stream  the library's patterns once more in torch, for runs without it

Each also takes block_size=64 (or 32): the tokens of a block, 128 unless given.

kept(q, k, s) gives bool [b, h, n, n] on blocks of B; q [b, h, s_pad, d], k [b, h_kv, s_pad, d],
s_pad a multiple of B; rows from s on are padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

B = 128  # tokens of a block; score.py sets it to that of the variant it runs


def causal(n: int, device: torch.device) -> Tensor:
    i = torch.arange(n, device=device)
    return i[:, None] >= i


def near(n: int, device: torch.device, local: int = 2) -> Tensor:
    """Block 0, the diagonal and its local - 1 neighbours."""
    i = torch.arange(n, device=device)
    distance = i[:, None] - i
    return ((i == 0) | (distance < local)) & (distance >= 0)


def density(kept: Tensor, s: int) -> Tensor:
    n = -(-s // B)
    return kept[:, :, :n, :n].sum((-1, -2)).float() / (n * (n + 1) / 2)


# ---- Scores -------------------------------------------------------------------------------------


def row_logits(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Scaled causal logits of single rows: [b, h, R, s_pad], -inf where not seen."""
    b, h, _, d = q.shape
    g = h // k.shape[1]
    probe = q[:, :, rows].reshape(b, k.shape[1], g * len(rows), d).float()
    logits = (probe @ k.float().mT).view(b, h, len(rows), -1) * d**-0.5
    keys = torch.arange(k.shape[2], device=q.device)
    return logits.masked_fill_(keys > rows[:, None], -torch.inf)


def row_block_mass(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Softmax mass of each key block for single rows: [b, h, R, n]. One pass: log-sums by block."""
    logits = row_logits(q, k, rows)
    return logits.view(*logits.shape[:3], -1, B).logsumexp(-1).softmax(-1)


def sub_means(x: Tensor, s: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of sub-blocks of `size` tokens [b, h, s_pad / size, d], variances, tokens of each."""
    b, h, s_pad, d = x.shape
    m = s_pad // size
    valid = (torch.arange(s_pad, device=x.device) < s).view(m, size)
    count = valid.sum(-1).float()
    y = x.view(b, h, m, size, d).float() * valid[..., None]
    mean = y.sum(-2) / count.clamp(min=1)[:, None]
    variance = (y * y).sum(-2) / count.clamp(min=1)[:, None] - mean * mean
    return mean, variance.clamp(min=0), count


def pooled_map(q: Tensor, k: Tensor, s: int, o: dict[str, Any]) -> Tensor:
    """[b, h, n, n]: mass of key block j for query block i, estimated from sub-block means."""
    b, h, s_pad, d = q.shape
    n, scale, sq, sk = s_pad // B, d**-0.5, o["sq"], o["sk"]
    mean_q, _, count_q = sub_means(q, s, sq)
    if o["qrow"]:  # the last real row of each sub-block instead of the mean
        at = torch.arange(s_pad // sq, device=q.device) * sq + sq - 1
        mean_q = q[:, :, at.clamp(max=s - 1)].float()
    mean_k, var_k, count_k = sub_means(k, s, sk)
    if o["mbf"]:  # means stored in bf16
        mean_q, mean_k = mean_q.bfloat16().float(), mean_k.bfloat16().float()
    mq = mean_q.reshape(b, k.shape[1], -1, d)
    logits = scale * (mq @ mean_k.mT)
    if o["var"]:
        logits += o["var"] * 0.5 * scale * scale * (mq * mq) @ var_k.mT
    logits = logits.view(b, h, s_pad // sq, s_pad // sk)
    first_key = torch.arange(s_pad // sk, device=q.device) * sk
    last_row = torch.arange(s_pad // sq, device=q.device) * sq + sq - 1
    logits += count_k.log()
    logits.masked_fill_(first_key > last_row[:, None], -torch.inf)
    p = logits.softmax(-1).view(b, h, n, B // sq, n, B // sk).sum(-1)
    weight = count_q.view(n, B // sq, 1)
    if o["agg"] == "max":
        return (p * (weight > 0)).amax(3)
    if o["agg"] == "rms":
        return ((p * p * weight).sum(3) / weight.sum(1).clamp(min=1)).sqrt()
    return (p * weight).sum(3) / weight.sum(1).clamp(min=1)


def exact_map(q: Tensor, k: Tensor, s: int) -> Tensor:
    """What pooled_map estimates, from every row: the yardstick. As slow as dense attention."""
    n = q.shape[2] // B
    parts = []
    for i in range(n):
        rows = torch.arange(i * B, max(i * B + 1, min((i + 1) * B, s)), device=q.device)
        x = row_block_mass(q[:, :, : (i + 1) * B], k[:, :, : (i + 1) * B], rows).mean(2)
        parts.append(torch.nn.functional.pad(x, (0, n - x.shape[-1])))
    return torch.stack(parts, 2)


# ---- Decisions ----------------------------------------------------------------------------------


def cover(p: Tensor, forced: Tensor, g: float, flat: bool = False) -> Tensor:
    """Smallest set of entries per row (or per head) that holds the share g, forced ones first."""
    shape = p.shape
    forced = forced.expand(shape)
    if flat:
        p, forced = p.flatten(-2), forced.flatten(-2)
    order = (p + 4 * forced).argsort(stable=True, dim=-1, descending=True)
    mass = p.gather(-1, order)
    # float64 only for the long sums of a flattened map
    run = mass.double().cumsum(-1) if flat else mass.cumsum(-1)
    kept = (run - mass) < g * run[..., -1:]
    kept = torch.zeros_like(kept).scatter_(-1, order, kept) | forced
    return kept.view(shape)


def asking_rows(s: int, rows: int, span: int, device: torch.device) -> Tensor:
    """`rows` rows spread over the last `span` ones, the last row among them."""
    span = min(span, s)
    rows = min(rows, span)
    i = torch.arange(rows, device=device)
    return s - 1 - ((rows - 1 - i) * span) // rows


def spread_rows(s: int, count: int, device: torch.device) -> Tensor:
    """`count` rows spread over all s rows: the middle of each of `count` equal parts."""
    count = min(count, s)
    i = torch.arange(count, device=device)
    return ((2 * i + 1) * s) // (2 * count)


def share_group(x: Tensor, h_kv: int, how: str) -> Tensor:
    """The heads of a K/V head get their mean or maximum."""
    b, h = x.shape[:2]
    y = x.view(b, h_kv, h // h_kv, *x.shape[2:])
    y = y.amax(2, keepdim=True) if how == "max" else y.mean(2, keepdim=True)
    return y.expand(b, h_kv, h // h_kv, *x.shape[2:]).reshape(x.shape)


def calibrated(p: Tensor, x: Tensor, rows: Tensor, forced: Tensor, g: float, stat: str) -> Tensor:
    """Per head, the threshold at which {statistic >= t} and forced hold g of the sample rows' mass.

    p [b, h, n, n] pooled; x [b, h, R, n] exact masses of `rows`. The mean over rows of what is kept
    is >= g. stat: "p" the pooled mass, "max" relative to the row's best, "cov" the place in the
    row's cover, "len" relative to the mean of the row.
    """
    n = p.shape[-1]
    low = causal(n, p.device)
    if stat == "max":
        y = p / p.masked_fill(~low, 0).amax(-1, keepdim=True).clamp(min=1e-20)
    elif stat == "cov":
        y = p.masked_fill(~low, 0)
        order = (y + 4 * forced).argsort(stable=True, dim=-1, descending=True)
        mass = y.gather(-1, order)
        y = 1 - torch.zeros_like(y).scatter_(-1, order, mass.cumsum(-1) - mass)
    elif stat == "len":
        y = p * torch.arange(1, n + 1, device=p.device)[:, None]
    else:
        y = p
    block = rows // B
    fr = forced[..., block, :].expand(x.shape)
    key = torch.where(fr, 1e9, y[:, :, block]).masked_fill(~low[block], -1.0).flatten(2)
    order = key.argsort(dim=-1, descending=True, stable=True)
    sorted_y, mass = key.gather(-1, order), x.flatten(2).gather(-1, order)
    run = mass.double().cumsum(-1)
    at = (run < g * run[..., -1:]).sum(-1, keepdim=True).clamp(max=run.shape[-1] - 1)
    t = sorted_y.gather(-1, at).clamp(min=0).float()  # [b, h, 1]
    t = torch.where(t > 1e8, 1e9, t)
    return (y >= t[..., None]) & low | forced


MAP_OPTIONS: dict[str, Any] = {
    # The map: sub-blocks of queries and keys, share of the second-order term, last rows instead of
    # means, exact rows, how the sub-rows of a block are put together, means in bf16.
    "sq": 32, "sk": 32, "var": 0.0, "qrow": 0, "exact": 0, "agg": "mean", "mbf": 0,
    # What of it is kept: flat, row (covers of g), thr (p >= g), max (p >= g of the row's best), cal
    # (a threshold that is set on crows exact rows), none; the forced diagonals; one selection for
    # the heads of a K/V head (mean, max, union).
    "decide": "flat", "g": 0.85, "crows": 0, "stat": "p", "local": 2, "group": "",
    # The next diagonal too, where a sub-row has this share of its map there (0: as the rest).
    "near": 0.0,
    # Key blocks raised by what the asking rows have there over what the map says, at most so much.
    "lift": 0.0,
    # Columns: max or mean over the asking rows, each row its own, none; the share c; the rows;
    # for all later rows or the last ones; the last `tail` rows dense.
    "cols": "max", "c": 0.8, "rows": 128, "span": 512, "use": "all", "tail": 0,
    "mc": 0,  # the mean correction
}  # fmt: skip


def columns_of(x: Tensor, o: dict[str, Any]) -> Tensor:
    """Which key blocks [b, h, n] the asking rows with exact masses x [b, h, R, n] ask for."""
    if o["cols"] == "each":  # every row its own cover
        return cover(x, torch.zeros_like(x, dtype=torch.bool), o["c"]).any(2)
    m = x.amax(2) if o["cols"] == "max" else x.mean(2)
    return cover(m, torch.zeros_like(m, dtype=torch.bool), o["c"])


def map_kept(q: Tensor, k: Tensor, s: int, o: dict[str, Any]) -> Tensor:
    n, dev = q.shape[2] // B, q.device
    forced, low = near(n, dev, o["local"]), causal(n, dev)
    kept = forced.expand(*q.shape[:2], n, n).clone()
    last, i = (s - 1) // B, torch.arange(n, device=dev)
    rows = asking_rows(s, o["rows"], o["span"], dev)
    x = row_block_mass(q, k, rows)
    if o["decide"] != "none":
        p = exact_map(q, k, s) if o["exact"] else pooled_map(q, k, s, o)
        if o["lift"]:
            ratio = x.sum(2) / p[:, :, rows // B].sum(2).clamp(min=1e-9)
            p = p * ratio.clamp(1.0, o["lift"])[:, :, None, :]
            p = p / p.sum(-1, keepdim=True)
        if o["group"] in ("max", "mean"):
            p = share_group(p, k.shape[1], o["group"])
        if o["near"]:
            peak = pooled_map(q, k, s, o | {"agg": "max"})
            next_ = near(n, dev, o["local"] + 1) & ~forced
            forced = forced | next_ & (peak >= o["near"])
            kept |= forced
        p = p.masked_fill(~low, 0.0)
        p[:, :, last + 1 :] = 0
        if o["decide"] in ("flat", "row"):
            kept |= cover(p, forced, o["g"], o["decide"] == "flat")
        elif o["decide"] == "thr":
            kept |= (p >= o["g"]) & low
        elif o["decide"] == "max":
            kept |= (p >= o["g"] * p.amax(-1, keepdim=True)) & low
        else:
            sample, mass = rows, x
            if o["crows"]:
                sample = spread_rows(s, o["crows"], dev)
                mass = row_block_mass(q, k, sample)
            if o["group"] in ("max", "mean"):
                mass = share_group(mass, k.shape[1], "mean")
            kept |= calibrated(p, mass, sample, forced, o["g"], o["stat"])
    if o["cols"] != "none":
        if o["group"] in ("max", "mean"):
            x = share_group(x, k.shape[1], "max")
        use = torch.ones(n, dtype=torch.bool, device=dev)
        if o["use"] == "last":  # only for the query blocks that hold asking rows
            use = i >= rows[0] // B
        kept |= columns_of(x, o)[:, :, None, :] & use[:, None]
    if o["tail"]:
        kept |= i[:, None] >= max(0, s - o["tail"]) // B
    if o["group"] == "union":
        kept = share_group(kept.float(), k.shape[1], "max") > 0
    kept &= low
    kept[:, :, last + 1 :] = False
    return kept


# ---- The published rule and others --------------------------------------------------------------


def _terms(p: Tensor, m: Tensor) -> Tensor:
    return torch.where((p > 0) & (m > 0), p * (p / m).log(), 0.0).sum(-1)


def _until(x: Tensor, limit: float) -> Tensor:
    return (x.sort(-1, descending=True).values.cumsum(-1) <= limit).sum(-1)


def _best(x: Tensor, count: Tensor) -> Tensor:
    return x.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count[..., None]


def flex(q: Tensor, k: Tensor, s: int, o: dict[str, Any]) -> Tensor:
    """FlexPrefill, step by step as in docs/design.md."""
    b, h, s_pad, d = q.shape
    n, dev, probe = s_pad // B, q.device, min(B, s)
    n_real = -(-s // B)
    rows = s - probe + torch.arange(probe, device=dev)
    a = row_logits(q, k, rows).softmax(-1)
    vertical = a.mean(2)
    # slash[t] = sum over r of a[r, s - probe + r - t]: one strided view of the keys, reversed
    width, off = s_pad + probe + s_pad - s, s_pad - s + probe - 1
    back = torch.nn.functional.pad(a.flip(-1), (0, width - s_pad)).contiguous()
    strides = (h * probe * width, probe * width, width - 1, 1)
    slash = back.as_strided((b, h, probe, s_pad), strides, off).sum(2)
    slash /= probe
    least = min(-(-o["budget"] // B), n_real)
    n_v, n_s = (((_until(x, o["g"]) + 1) // B + 1).clamp(least, n_real) for x in (vertical, slash))
    vb, sb = (x.view(b, h, n, B).sum(-1) for x in (vertical, slash))
    mean_k, _, count = sub_means(k, s, B)
    mean_k = mean_k.repeat_interleave(h // k.shape[1], 1)
    share = (count / B).log()
    mean_probe = q[:, :, rows].float().mean(2)[:, :, None]
    pooled = ((mean_probe * mean_k).sum(-1) * d**-0.5 + share).softmax(-1)
    mid = (pooled + vb) / 2
    jsd = ((_terms(pooled, mid) + _terms(vb, mid)) / 2).clamp(min=0).sqrt()
    aware = jsd < o["tau"]
    n_v, n_s = (torch.where(aware, least, x) for x in (n_v, n_s))
    i = torch.arange(n, device=dev)
    columns = _best(vb.masked_fill(i == 0, torch.inf), n_v)
    diagonals = _best(sb.masked_fill(i == 0, torch.inf), n_s)
    distance = (i[:, None] - i).clamp(min=0)
    kept = columns[:, :, None, :] | diagonals[..., distance]
    low = causal(n, dev)
    mean_q = sub_means(q, s, B)[0]
    p = (d**-0.5 * mean_q @ mean_k.mT + share).masked_fill(~low, -torch.inf).softmax(-1)
    p[:, :, n_real:] = 0
    p = p.flatten(2)
    keep = _best(p, _until(p, o["g"] * n_real)).view(b, h, n, n) & aware[..., None, None]
    kept = (kept | keep | (i == 0) | (distance == 0)) & low
    kept[:, :, n_real:] = False
    return kept


def flash(q: Tensor, k: Tensor, s: int, o: dict[str, Any]) -> Tensor:
    """FlashPrefill: scores by key block means, threshold relative to the row's best."""
    b, h, s_pad, d = q.shape
    n, dev = s_pad // B, q.device
    mk = sub_means(k, s, B)[0].repeat_interleave(h // k.shape[1], 1).to(q.dtype)
    low = causal(n, dev)
    logits = (q.float() @ mk.float().mT) * d**-0.5  # [b, h, s_pad, n]
    logits = logits.view(b, h, n, B, n).masked_fill(~low[:, None], -torch.inf)
    valid = (torch.arange(s_pad, device=dev) < s).view(n, B, 1)
    p = (logits.softmax(-1) * valid).sum(3)
    kept = (p >= o["alpha"] * p.amax(-1, keepdim=True)) & low | near(n, dev, o["local"])
    kept = kept | (torch.arange(n, device=dev)[:, None] >= max(0, s - o["tail"]) // B) & low
    kept[:, :, (s - 1) // B + 1 :] = False
    return kept


def xattn(q: Tensor, k: Tensor, s: int, o: dict[str, Any]) -> Tensor:
    """XAttention: sums along antidiagonals of stride x stride tiles, cover per row."""
    b, h, s_pad, d = q.shape
    n, t, dev = s_pad // B, o["stride"], q.device
    valid = (torch.arange(s_pad, device=dev) < s)[:, None]
    q, k = q * valid, k * valid
    qg = q.view(b, h, s_pad // t, t, d).flip(3).flatten(3)
    kg = k.view(b, k.shape[1], s_pad // t, t, d).flatten(3).repeat_interleave(h // k.shape[1], 1)
    m = s_pad // t
    logits = (qg @ kg.mT).float() * (d**-0.5 / t)
    logits = logits.masked_fill(~causal(m, dev), -torch.inf)
    p = logits.softmax(-1).view(b, h, n, B // t, n, B // t).sum((3, 5))
    kept = cover(p, near(n, dev, 1), o["g"]) & causal(n, dev)
    kept[:, :, (s - 1) // B + 1 :] = False
    return kept


def stream(q: Tensor, k: Tensor, s: int, o: dict[str, Any]) -> Tensor:
    n, i = q.shape[2] // B, torch.arange(q.shape[2] // B, device=q.device)
    distance = i[:, None] - i
    kept = ((i < o["glob"] // B) | (distance < o["window"] // B + 1)) & (distance >= 0)
    kept = kept.expand(*q.shape[:2], n, n).clone()
    kept[:, :, (s - 1) // B + 1 :] = False
    return kept


RULES: dict[str, Any] = {
    "map": (map_kept, MAP_OPTIONS),
    "flex": (flex, {"g": 0.9, "tau": 0.1, "budget": 512, "mc": 0}),
    "flash": (flash, {"alpha": 0.1, "tail": 512, "local": 2, "mc": 0}),
    "xattn": (xattn, {"stride": 16, "g": 0.9, "mc": 0}),
    "stream": (stream, {"glob": 1024, "window": 4096, "mc": 0}),
}


# ---- Variants by name ---------------------------------------------------------------------------


class Variant:
    """A rule of RULES, or a pattern of the library: then `pattern` is one of flex_prefill."""

    def __init__(self, text: str):
        self.text, self.pattern = text, None
        name, _, rest = text.partition(":")
        pairs = dict(part.split("=") for part in rest.split(",")) if rest else {}
        self.block_size = int(pairs.pop("block_size", 128))
        if name in RULES:
            self.rule, defaults = RULES[name]
            unknown = set(pairs) - set(defaults)
            if unknown:
                raise ValueError(f"{text}: no option {', '.join(unknown)}")
            self.options = defaults | {k: type(defaults[k])(v) for k, v in pairs.items()}
            self.mean_correction = bool(self.options["mc"])
            return
        from flex_prefill.patch import check_config, get_config_example, pattern_of

        known = {key.removeprefix("flex_prefill_"): key for key in get_config_example(name)}
        values = {known.get(k, k): float(v) for k, v in pairs.items()}
        values = {k: bool(v) if k == "mean_correction" else v for k, v in values.items()}
        self.pattern = pattern_of(name, check_config(name, values))[0]
        self.mean_correction = bool(getattr(self.pattern, "mean_correction", False))

    def kept(self, q: Tensor, k: Tensor, s: int) -> Tensor:
        if self.pattern is None:
            return self.rule(q, k, s, self.options)
        import flex_prefill

        q_, k_ = (x[:, :, :s].transpose(1, 2) for x in (q, k))
        index = flex_prefill.select(q_, k_, self.pattern, block_size=B).cpu()
        n = math.ceil(s / B)
        kept = torch.zeros(*q.shape[:2], q.shape[2] // B, q.shape[2] // B, dtype=torch.bool)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                kept[b, h, :n, :n] = torch.from_numpy(index.to_mask(b, h))
        return kept.to(q.device)


def read_variants(file: Any) -> list[str]:
    """One a line, # begins a comment; all are checked."""
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    texts = [line for line in lines if line]
    for text in texts:
        Variant(text)
    return texts

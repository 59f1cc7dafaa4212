"""Every causal language model type of the installed transformers that a small random config builds:
is it computed here, left to its own attention, or refused, and are the logits those of its own?

    python experiments/transformers/sweep.py --json experiments/transformers/results.json

Each type runs in a process of its own, with one prompt, one padded batch and one prompt in two
chunks through a cache. docs/transformers.md states the sums.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "is_decoder": True,
}
# What differs from COMMON in further attempts; `...` leaves an option out.
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": ...},
    {"head_dim": ..., "num_key_value_heads": 4},
    {"head_dim": ..., "num_hidden_layers": 4, "num_key_value_heads": 4},
    {"sliding_window": 4096},
    {"sliding_window": 4096, "num_hidden_layers": 4, "hidden_size": 256},
)
MOST_PARAMETERS = 30_000_000


def build(model_type: str, attempt: dict[str, Any]) -> Any:
    """A model in eval mode, its weights large enough that a wrong mask shows in the logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in (COMMON | attempt).items() if value is not ...}
    config = AutoConfig.for_model(model_type, **options)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > MOST_PARAMETERS:
        raise MemoryError(f"{size / 1e6:.0f} M parameters with the common options")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.mul_(0.2 / parameter.std().clamp(min=1e-3))
    return model


def inputs(torch: Any) -> dict[str, dict[str, Any]]:
    ids = torch.randint(2, 128, (2, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :41] = 0
    return {"prompt": {"input_ids": ids[:1]}, "padded": {"input_ids": ids, "attention_mask": mask}}


def in_chunks(torch: Any, model: Any, ids: Any) -> Any:
    past, logits = {}, []
    for chunk in ids.split([150, 150], dim=1):
        output = model(chunk, use_cache=True, **past)
        name = "cache" if "cache" in output else "past_key_values"
        past = {name: output[name]}
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def judge(torch: Any, model: Any) -> dict[str, Any]:
    from flex_prefill import collect_audits, patch_model

    cases = inputs(torch)
    ids = cases["prompt"]["input_ids"]
    with torch.no_grad():
        own = {name: model(**case).logits for name, case in cases.items()}
        own_chunks = in_chunks(torch, model, ids)
        try:
            patch_model(model, "flash")
        except ValueError as error:
            return {"result": "refused", "why": str(error)}
        found: dict[str, Any] = {"layers": {}, "error": {}}
        for name, case in cases.items():
            with collect_audits() as audits:
                got = model(**case).logits
            real = case.get("attention_mask", torch.ones_like(case["input_ids"])).bool()
            found["layers"][name] = len(audits)
            found["error"][name] = relative(torch, got[real], own[name][real])
        with collect_audits() as audits:
            got = in_chunks(torch, model, ids)
        found["layers"]["chunks"] = len(audits)
        found["error"]["chunks"] = relative(torch, got, own_chunks)
    wrong = any(not error < 1e-3 for error in found["error"].values())
    kind = "computed here" if any(found["layers"].values()) else "left alone"
    return {"result": "WRONG" if wrong else kind, **found}


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


def relative(torch: Any, got: Any, own: Any) -> float:
    return float((got - own).abs().max() / own.abs().max())


def one(model_type: str) -> dict[str, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for attempt in ATTEMPTS:
        try:
            model = build(model_type, attempt)
            with torch.no_grad():
                for case in inputs(torch).values():
                    assert bool(model(**case).logits.isfinite().all()), "own logits not finite"
                in_chunks(torch, model, inputs(torch)["prompt"]["input_ids"])
        except Exception as error:  # whatever a model type does with options unknown to it
            why = one_line(error)
        else:
            break
    else:
        return {"result": "not built", "why": why}
    try:
        return judge(torch, model)
    except Exception as error:
        return {"result": "FAILED", "why": one_line(error)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--type", help="judge this one and print it as JSON")
    parser.add_argument("--json", type=Path, help="write all results here")
    arguments = parser.parse_args()
    if arguments.type:
        print(json.dumps(one(arguments.type)))
        return 0

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    results = {}
    for model_type in sorted(NAMES):
        command = [sys.executable, __file__, "--type", model_type]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            results[model_type] = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
            results[model_type] = {"result": "not built", "why": type(error).__name__}
        print(f"{model_type:30} {results[model_type]['result']}", flush=True)
    sums = Counter(result["result"] for result in results.values())
    print(dict(sums))
    if arguments.json:
        lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in results.items())
        head = json.dumps({"transformers": transformers.__version__, "sums": sums})[:-1]
        arguments.json.write_text(f'{head}, "types": {{\n' + ",\n".join(lines) + "\n}}\n")
    return int("WRONG" in sums or "FAILED" in sums)


if __name__ == "__main__":
    sys.exit(main())

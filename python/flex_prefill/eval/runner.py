"""Which cells (pattern, length, task) a run has, what of them is there, and their results.

The results folder:

    run.json                          the model and how it is asked: one folder, one model
    replies/PATTERN/TASK-LENGTH.jsonl every reply, as soon as it is there
    cells/PATTERN/TASK-LENGTH.json    the figures of a finished cell
    results.json, table.md, *.png     all cells of the folder

A run that was killed goes on where it was: the same command again. Further patterns, lengths, tasks
or samples add to the folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flex_prefill
from flex_prefill.cli.common import CommandError, require
from flex_prefill.cli.models import NamedPattern
from flex_prefill.eval import lm
from flex_prefill.eval.data import SOURCES, DataFolder, how_to_get, write_atomically
from flex_prefill.eval.tasks import Sample, Task, missing_files
from flex_prefill.patch import patch_model, unpatch_model


@dataclass(frozen=True)
class Plan:
    """What to evaluate. samples: prompts of each task, by length."""

    patterns: list[NamedPattern]
    tasks: list[Task]
    samples: dict[int, int]
    out: Path
    data: DataFolder
    chat_template: bool = False
    skip_missing: bool = False

    def cells(self) -> Iterator[tuple[NamedPattern, int, Task]]:
        for pattern in self.patterns:
            for length in sorted(self.samples):
                for task in self.tasks:
                    yield pattern, length, task


@dataclass
class Prompts:
    """The samples of every task and length of a plan."""

    by_cell: dict[tuple[str, int], list[Sample]] = field(default_factory=dict)

    def of(self, task: Task, length: int) -> list[Sample]:
        """None at all where no prompt of this length holds the task."""
        return self.by_cell.get((task.name, length), [])


def check(plan: Plan, context: int | None) -> None:
    """Refuses what would fail later: lengths beyond the context, tasks without data."""
    for length in plan.samples:
        if context is not None and length > context:
            raise CommandError(f"--length: the model's context is {context} tokens, got {length}")
        for task in plan.tasks:
            if length < task.least_tokens:
                raise CommandError(
                    f"--length: {task.name} needs at least {task.least_tokens} tokens, got {length}"
                )
    missing = missing_files(plan.tasks, plan.data)
    if missing:
        lines = [
            f"{', '.join(tasks)} {how_to_get(SOURCES[name])}" for name, tasks in missing.items()
        ]
        raise CommandError(
            "tasks without data ('flexprefill eval prepare' gets it where a network allows, "
            "--skip-missing leaves them out):\n  " + "\n  ".join(lines)
        )


def check_patterns(plan: Plan, model: Any) -> None:
    """Refuses a pattern that this model cannot have or that does not run on its device, before
    any other is computed: each reads a few blocks once."""
    torch = require("torch", "torch")
    collect_audits = require("flex_prefill.hf", "transformers").collect_audits
    # Of the smallest vocabulary too; more rows than any block size has.
    ids = torch.arange(640, device=model.device)[None] % 16
    try:
        for pattern in plan.patterns:
            try:
                patch_model(model, pattern.name, pattern.config)
                with collect_audits() as audits:
                    model(input_ids=ids, use_cache=False, logits_to_keep=1)
            except (ValueError, flex_prefill.UnsupportedError) as error:
                raise CommandError(f"--pattern {pattern.label}: {error}") from None
            if pattern.name != "default" and not audits:
                raise CommandError(f"--pattern {pattern.label}: {lm.NOT_SPARSE}")
    finally:
        unpatch_model(model)


def progress_bar(transient: bool = False) -> Any:
    """Bars on standard error that stay there while output is redirected."""
    console = require("rich.console", "transformers").Console(file=sys.stderr)
    progress = require("rich.progress", "transformers")
    return progress.Progress(
        progress.TextColumn("{task.description:<44}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=transient,
    )


def make_prompts(plan: Plan, tokenizer: Any, context: int | None, bar: Any) -> Prompts:
    """Every prompt of the plan, from the data folder where an earlier run made it."""
    room = _chat_tokens(tokenizer) if plan.chat_template else 0
    prompts = Prompts()
    wanted = [(task, length) for length in sorted(plan.samples) for task in plan.tasks]
    step = bar.add_task("prompts", total=len(wanted))
    for task, length in wanted:
        bar.update(step, description=f"prompts: {task.name}, {length} tokens")
        extra = room
        if task.suite == "retrieval" and context is not None:
            # Its length is that of the prompt alone.
            extra += max(0, length + room + task.max_new_tokens - context)
        try:
            samples = _stored_samples(plan, task, tokenizer, length, extra)
        except ValueError as error:
            if not plan.skip_missing:
                raise CommandError(f"{error} (--skip-missing leaves it out)") from None
            print(f"left out: {error}", file=sys.stderr)
        else:
            prompts.by_cell[task.name, length] = samples
        bar.advance(step)
    bar.update(step, description="prompts")
    return prompts


def _chat_tokens(tokenizer: Any) -> int:
    """What the chat template adds to a prompt, in tokens."""
    if not tokenizer.chat_template:
        raise CommandError("--chat-template: the model's tokenizer has none", usage=True)
    messages = [{"role": "user", "content": "x"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text)["input_ids"]) + 8


def _stored_samples(plan: Plan, task: Task, tokenizer: Any, length: int, room: int) -> list[Sample]:
    count = plan.samples[length]
    identity = [
        _tokenizer_state(tokenizer),
        room,
        {name: _digest(plan.data.path / name) for name in (*task.files, *task.may_read)},
        importlib.metadata.version("flex_prefill"),
        importlib.metadata.version("lm_eval"),
    ]
    folder = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = plan.data.path / "samples" / folder / f"{task.name}-{length}.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["asked"] >= count:
            return list(stored["samples"][:count])
    except (FileNotFoundError, ValueError, KeyError):
        pass
    samples = task.make(tokenizer, length, count, room, plan.data)
    write_atomically(path, json.dumps({"asked": count, "samples": samples}))
    return samples


def _tokenizer_state(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(state.encode()).hexdigest()


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Makes the results folder this model's, or refuses one that is another's."""
    path = out / "run.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_atomically(path, json.dumps(identity, indent=1) + "\n")
        return
    except ValueError:
        raise CommandError(f"--out: {path} is not JSON: give another folder") from None
    for name, value in identity.items():
        if before.get(name) != value:
            raise CommandError(
                f"--out: {out} has the results of another run: {name} was {before.get(name)!r}, "
                f"is {value!r}; give another folder"
            )


def model_identity(folder: Path, model: Any) -> dict[str, Any]:
    """What tells models apart: the name, the configuration's SHA-256, the weights' sizes."""
    weights = sorted(
        (path.name, path.stat().st_size)
        for pattern in ("*.safetensors", "*.bin")
        for path in folder.glob(pattern)
    )
    return {
        "model": folder.resolve().name,
        "config_sha256": _digest(folder / "config.json"),
        "weights": [list(pair) for pair in weights],
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def run(
    plan: Plan,
    prompts: Prompts,
    model: Any,
    tokenizer: Any,
    context: int | None,
    made_by: dict[str, Any],
    bar: Any,
) -> list[dict[str, Any]]:
    """Computes what is not there yet; the rows of the plan's cells, in its order.

    made_by: commit, command and the like, kept in each row.
    """
    # The longest prompt decides where the configuration states no context.
    audited = lm.make_lm(model, tokenizer, context or max(plan.samples) + 4096)
    manager = require("lm_eval.tasks", "eval").TaskManager(include_defaults=False)
    total = sum(len(prompts.of(task, length)) for _, length, task in plan.cells())
    step = bar.add_task("replies", total=total)
    rows = []
    try:
        for pattern, length, task in plan.cells():
            bar.update(step, description=f"{pattern.name}, {length}, {task.name}")
            patch_model(model, pattern.name, pattern.config)
            name = f"{task.name}-{length}"
            samples = prompts.of(task, length)
            if not samples:
                continue
            audited.journal = lm.Journal(plan.out / "replies" / slug(pattern) / f"{name}.jsonl")
            audited.must_be_sparse = pattern.name != "default"
            audited.on_reply = lambda record: bar.advance(step)
            mean = lm.evaluate(audited, lm.make_task(task, samples), manager, plan.chat_template)
            row = _row(pattern, length, task, samples, mean, audited.used)
            write_atomically(
                plan.out / "cells" / slug(pattern) / f"{name}.json",
                json.dumps({**row, "made_by": made_by}, indent=1) + "\n",
            )
            rows.append(row)
    finally:
        unpatch_model(model)
    bar.update(step, description="replies")
    return rows


def slug(pattern: NamedPattern) -> str:
    """A folder's name for a pattern: readable, and another for other settings."""
    config = json.dumps(pattern.config, sort_keys=True)
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", pattern.label).strip("-")
    return f"{readable[:60]}-{hashlib.sha256(config.encode()).hexdigest()[:6]}"


def _row(
    pattern: NamedPattern,
    length: int,
    task: Task,
    samples: list[Sample],
    mean: float,
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    scores = [
        task.score(sample, record["reply"]) for sample, record in zip(samples, records, strict=True)
    ]
    spread = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    return {
        "pattern": pattern.name,
        "config": pattern.config,
        "label": pattern.label,
        "suite": task.suite,
        "task": task.name,
        "length": length,
        "samples": len(scores),
        "score": mean,
        "standard_error": spread,
        "density": statistics.fmean(record["density"] for record in records),
        "kept_mass": statistics.fmean(record["kept_mass"] for record in records),
        "seconds_per_sample": statistics.median(record["seconds"] for record in records),
    }


def all_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of every finished cell of a results folder."""
    rows = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((out / "cells").glob("*/*.json"))
    ]
    return sorted(rows, key=lambda r: (r["suite"], r["label"], r["length"], r["task"]))

"""lm-eval's Hugging Face model, with an audit of every prefill and a journal of replies."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flex_prefill.cli.common import CommandError, require
from flex_prefill.eval.tasks import Sample, Task

NOT_SPARSE = (
    "no layer of the model ran under the pattern: docs/transformers.md says what "
    "is left to a model's own attention (pattern 'default' evaluates that)"
)


class Journal:
    """Replies of one cell, one JSON line each, on the disk before the next is computed.

    A line that a killed run left torn is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        good = 0
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line)
                self._records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            good += len(line)
        if good < len(content):
            os.truncate(path, good)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._records.get(key)

    def add(self, record: dict[str, Any]) -> None:
        self._records[record["key"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def key_of(prompt: str, options: dict[str, Any]) -> str:
    """What a reply is the answer to."""
    text = json.dumps([prompt, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def make_lm(model: Any, tokenizer: Any, context: int) -> Any:
    """The model for lm-eval. Set `journal`, `must_be_sparse` and `on_reply` before each cell;
    `used` then has the journal's records of the cell's requests, in their order."""
    # It warns about a model object and, for every task, about keywords that are not used here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    base = require("lm_eval.models.huggingface", "eval").HFLM
    collect_audits = require("flex_prefill.hf", "transformers").collect_audits

    class AuditedLM(base):  # type: ignore[misc, valid-type]
        journal: Journal
        must_be_sparse: bool
        on_reply: Callable[[dict[str, Any]], None]
        used: list[dict[str, Any]]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self.used = []
            for request in requests:
                prompt, options = request.args
                key = key_of(prompt, options)
                record = self.journal.get(key)
                if record is None:
                    record = {"key": key, **self._reply(request)}
                    self.journal.add(record)
                self.used.append(record)
                self.on_reply(record)
            return [record["reply"] for record in self.used]

        def _reply(self, request: Any) -> dict[str, Any]:
            start = time.perf_counter()
            with collect_audits() as collected:
                (reply,) = super().generate_until([request], disable_tqdm=True)
            audits = [audit for _, audit in collected]
            if self.must_be_sparse and not audits:
                raise CommandError(NOT_SPARSE)
            return {
                "reply": reply,
                "seconds": time.perf_counter() - start,
                "density": _mean([float(audit.mean_density) for audit in audits]),
                "kept_mass": _mean([float(audit.kept_mass.mean()) for audit in audits]),
            }

    return AuditedLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=context,
        batch_size=1,
    )


def _mean(values: list[float]) -> float:
    """1 where there are none: everything was kept."""
    return statistics.fmean(values) if values else 1.0


def make_task(task: Task, samples: list[Sample]) -> Any:
    """The task for lm-eval."""
    datasets = require("datasets", "eval")

    def score(sample: Sample, replies: list[str]) -> dict[str, float]:
        return {"score": task.score(sample, replies[0])}

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(samples)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda sample: sample["input"],
        "doc_to_target": lambda sample: ", ".join(sample["outputs"]),
        "target_delimiter": task.delimiter,
        "process_results": score,
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": task.max_new_tokens,
            "until": list(task.until),
        },
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    if "gen_prefix" in samples[0]:
        config["gen_prefix"] = "gen_prefix"  # the field's name
    return require("lm_eval.api.task", "eval").ConfigurableTask(config=config)


def evaluate(lm: Any, task: Any, task_manager: Any, chat_template: bool) -> float:
    """The mean score of one task, by lm-eval."""
    simple_evaluate = require("lm_eval", "eval").simple_evaluate
    with contextlib.redirect_stderr(io.StringIO()):  # its bars; ours stays on standard error
        results = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=task_manager,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=chat_template,
        )
    return float(results["results"][task.config.task]["score,none"])

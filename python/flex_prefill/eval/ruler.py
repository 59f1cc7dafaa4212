"""RULER (Hsieh et al., arXiv 2404.06654): 13 tasks, samples by lm-eval's generators.

lm-eval makes 500 samples of every task and length when it loads a task, and fetches the texts then.
Here its generators are called for as many samples as are asked for, on texts of the data folder.
Differences: prompts leave room for the answer and a chat template within the length (lm-eval's
can be some 50 tokens longer than asked), and a question is right when one of its answers is
found, as in RULER's own code (lm-eval counts the share of the answers).
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from flex_prefill.cli.common import require
from flex_prefill.eval.data import DataFolder, haystack

_PACKAGE = "lm_eval.tasks.ruler."
LEAST_TOKENS = 4096  # below it RULER's parameters are others
_PREFIX_TOKENS = 64  # what an answer begins with; the generators do not count it
SEED = 42

# Task: (new tokens, delimiter before the answer's beginning, files that it reads), as in lm-eval.
TASKS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "niah_single_1": (128, " ", ()),
    "niah_single_2": (128, " ", ("essays.txt",)),
    "niah_single_3": (128, " ", ("essays.txt",)),
    "niah_multikey_1": (128, " ", ("essays.txt",)),
    "niah_multikey_2": (128, " ", ()),
    "niah_multikey_3": (128, " ", ()),
    "niah_multiquery": (128, " ", ("essays.txt",)),
    "niah_multivalue": (128, " ", ("essays.txt",)),
    "ruler_vt": (30, " ", ()),
    "ruler_cwe": (120, "\n\n", ()),
    "ruler_fwe": (50, " ", ()),
    "ruler_qa_squad": (32, " ", ("squad.json",)),
    "ruler_qa_hotpot": (32, " ", ("hotpot.json",)),
}

_NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"haystack": "repeat", "k": "words", "v": "numbers"},
    "niah_single_2": {"haystack": "essay", "k": "words", "v": "numbers"},
    "niah_single_3": {"haystack": "essay", "k": "words", "v": "uuids"},
    "niah_multikey_1": {"haystack": "essay", "k": "words", "v": "numbers", "num_needle_k": 4},
    "niah_multikey_2": {"haystack": "needle", "k": "words", "v": "numbers"},
    "niah_multikey_3": {"haystack": "needle", "k": "uuids", "v": "uuids"},
    "niah_multiquery": {"haystack": "essay", "k": "words", "v": "numbers", "num_needle_q": 4},
    "niah_multivalue": {"haystack": "essay", "k": "words", "v": "numbers", "num_needle_v": 4},
}


class _Counter:
    """A tokenizer for the generators that counts `room` tokens more than there are."""

    def __init__(self, tokenizer: Any, room: int) -> None:
        self._tokenizer, self._room = tokenizer, room

    def with_room(self, more: int) -> _Counter:
        return _Counter(self._tokenizer, self._room + more)

    def __call__(self, text: str) -> Any:
        ids = self._tokenizer(text)["input_ids"]
        return SimpleNamespace(input_ids=[*ids, *[0] * self._room])


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for what a module of lm-eval's would fetch from the network."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def make_samples(
    task: str, tokenizer: Any, length: int, count: int, room: int, data: DataFolder
) -> list[dict[str, Any]]:
    """`count` samples whose prompt and answer fit `length` tokens, with `room` left of it.

    Each has `input`, `gen_prefix` (how the answer begins) and `outputs` (what it must hold). The
    first n of them are the same whatever `count` is. Raises ValueError where none fits.
    """
    counter = _Counter(tokenizer, room + _PREFIX_TOKENS)
    module = _load(task)  # which draws random numbers of its own
    random.seed(f"{SEED}/{task}/{length}")
    np.random.seed(SEED)  # noqa: NPY002 (the one that they use)
    # The generators print, and draw bars of their own.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        samples = _generate(task, module, counter, length, count, data)
    # A list of no words, where ten do not fit.
    samples = [sample for sample in samples if sample["outputs"]]
    if not samples:
        raise ValueError(f"{task}: no prompt of {length} tokens of this tokenizer holds it")
    return [{key: s[key] for key in ("input", "gen_prefix", "outputs")} for s in samples]


def _load(task: str) -> Any:
    """lm-eval's module that makes the task's samples."""
    if task in _NIAH:
        return _prepare_niah()
    return require(_PACKAGE + task.split("_")[1] + "_utils", "eval")


def _generate(
    task: str, module: Any, counter: _Counter, length: int, count: int, data: DataFolder
) -> list[dict[str, Any]]:
    generated: list[dict[str, Any]]
    if task in _NIAH:
        spec = dict(_NIAH[task])
        kind = spec.pop("haystack")
        generated = module.generate_samples(
            haystack(data) if kind == "essay" else module.get_haystack(kind),
            TOKENIZER=counter,
            max_seq_length=length,
            template=require(_PACKAGE + "niah_utils", "eval").TEMPLATE,
            type_haystack=kind,
            type_needle_k=spec.pop("k"),
            type_needle_v=spec.pop("v"),
            num_samples=count,
            **spec,
        )
    elif task == "ruler_vt":
        make = module.sys_vartrack_w_noise_random
        example = make(counter, num_samples=1, max_seq_length=500, incremental=5)[0]
        generated = make(counter, num_samples=count, max_seq_length=length, icl_example=example)
    elif task == "ruler_cwe":
        module.RNG.seed(SEED)
        generated = module.sys_word_pair_random(count, length, tokenizer=counter)
    elif task == "ruler_fwe":
        roomy = counter.with_room(TASKS[task][0])  # it does not count the answer itself
        generated = module.sys_kwext(roomy, length, num_samples=count)
    else:
        read = module.read_squad if task == "ruler_qa_squad" else module.read_hotpotqa
        content = json.loads(data.text(TASKS[task][2][0]))
        with _replaced(module, "download_json", lambda url: content):
            questions, documents = read.__wrapped__(url="")
        generated = module.generate_samples(
            counter,
            documents,
            questions,
            max_seq_length=length,
            num_samples=min(count, len(questions)),
        )
    return generated


def _prepare_niah() -> Any:
    """lm-eval's needle generator, with a sentence splitter that is there without a download.

    Importing it fetches NLTK's punkt_tab. Where that is not installed, sentences end where white
    space follows a full stop, question or exclamation mark.
    """
    nltk = require("nltk", "eval")
    try:
        nltk.data.find("tokenizers/punkt_tab")
        found = True
    except LookupError:
        found = False
    with _replaced(nltk, "download", lambda *_, **__: False):
        module = require(_PACKAGE + "prepare_niah", "eval")
    if not found:
        module.cached_sent_tokenize = split_sentences
    return module


def split_sentences(text: str) -> list[str]:
    """Cuts after a full stop, question or exclamation mark before white space."""
    return [sentence for sentence in re.split(r"(?<=[.?!])\s+", text) if sentence]


def score(task: str, outputs: list[str], reply: str) -> float:
    """Share of the outputs that the reply holds; of a question: whether it holds one."""
    text = re.sub(r"[\x00-\x1f]", "\n", reply.strip()).strip().lower()
    found = [output.lower() in text for output in outputs]
    return float(any(found)) if "_qa_" in task else sum(found) / len(found)

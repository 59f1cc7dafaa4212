"""Ten tasks of InfiniteBench (Zhang et al., arXiv 2402.13718), with its metrics.

The ten that FlexPrefill's and MInference's papers report: all but Code.Run and Math.Calc. Prompts
are the benchmark's for models that continue text. A prompt longer than the length loses
its middle, as in the benchmark's own code. The retrieval tasks (passkey, number string, key and
value) are synthetic: where their files are not there they are made here, to the length, by the
paper's recipe.
"""

from __future__ import annotations

import json
import random
import re
import string
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from flex_prefill.cli.common import require
from flex_prefill.eval.data import DataFolder

_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
_OPTIONS = "A. {options[0]}\nB. {options[1]}\nC. {options[2]}\nD. {options[3]}"

# Split: (new tokens, prompt).
TASKS: dict[str, tuple[int, str]] = {
    "passkey": (
        6,
        _HIDDEN + " and memorize it. I will quiz you about the important information.\n\n"
        "{context}\n\n{input}\n\nThe pass key is",
    ),
    "number_string": (
        12,
        _HIDDEN + ". I will quiz you about the important information there.\n\n"
        "{context}\n\n{input}\n\nThe sequence of digits is",
    ),
    "kv_retrieval": (
        50,
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "{context}\n\n{input}",
    ),
    "longbook_sum_eng": (1200, "Summarize the book below.\n\n{context}\n\nSummary:"),
    "longbook_qa_eng": (
        40,
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
        "Question: {input}\nAnswer:",
    ),
    "longbook_choice_eng": (
        40,
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
        + _OPTIONS
        + "\n\nThe letter of the correct answer is",
    ),
    "longdialogue_qa_eng": (
        40,
        "Below is a dialogue script where one random occurrence of a character name is replaced "
        'with "$$MASK$$", and you should try to guess who that character is.\n\n{context}\n\n'
        "The name that has been replaced with $$MASK$$ is likely",
    ),
    "longbook_qa_chn": (
        40,
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：",  # noqa: RUF001
    ),
    "code_debug": (
        5,
        "Following is a Python code where exactly one of the functions/methods has a deliberate "
        "error that makes it crash.\n\n{context}\n\nOptions:\n" + _OPTIONS + "\n\n"
        "The correct option is:",
    ),
    "math_find": (3, "{prefix}\n\n{context}\n\n{input}"),
}
SYNTHETIC = ("passkey", "number_string", "kv_retrieval")
SEED = 42


def file_of(split: str) -> str:
    return f"infinitebench/{split}.jsonl"


def make_samples(
    split: str, tokenizer: Any, length: int, count: int, room: int, data: DataFolder
) -> list[dict[str, Any]]:
    """`count` samples (or as many as the file has) whose prompt and answer fit `length` tokens.

    Each has `input` (the prompt), `outputs` (the answers) and for a choice `options`.
    """
    limit = length - TASKS[split][0] - room
    if data.has(file_of(split)):
        records = data.lines(file_of(split), count)
    elif split in SYNTHETIC:
        records = _made_records(split, tokenizer, limit, count)
    else:
        data.file(file_of(split))  # raises
    return [
        {
            "input": _without_middle(_prompt(split, record), tokenizer, limit),
            "outputs": _answers(record),
            "options": list(record.get("options") or []),
        }
        for record in records
    ]


def _answers(record: dict[str, Any]) -> list[str]:
    answer = record["answer"]
    return [str(a) for a in answer] if isinstance(answer, list) else [str(answer)]


def _prompt(split: str, record: dict[str, Any]) -> str:
    prefix = ""
    if split == "math_find":
        asked = re.search(r"The .+ of", record["input"])
        target = asked[0].lower()[:-3] if asked else "the number asked for"
        prefix = f"What is {target} in the following list?"
    options = list(record.get("options") or []) or [""] * 4
    # Braces in the context are text: format fills each field once.
    return TASKS[split][1].format(
        context=record["context"], input=record["input"], options=options, prefix=prefix
    )


def _without_middle(text: str, tokenizer: Any, limit: int) -> str:
    """The text, or of a longer one its first and last `limit` / 2 tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = len(tokenizer("")["input_ids"])
    if len(ids) + special <= limit:
        return text
    half = (limit - special - 4) // 2  # tokens at the seam may join into others
    return str(tokenizer.decode(ids[:half])) + str(tokenizer.decode(ids[-half:]))


_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)


def _made_records(split: str, tokenizer: Any, limit: int, count: int) -> list[dict[str, Any]]:
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    records = []
    for i in range(count):
        rng = random.Random(f"{SEED}/{split}/{limit}/{i}")
        if split == "kv_retrieval":
            record = _made_pairs(rng, tokens, limit)
        else:
            record = _made_hidden(split, rng, tokens, limit)
        records.append(record)
    return records


def _made_hidden(
    split: str, rng: random.Random, tokens: Callable[[str], int], limit: int
) -> dict[str, Any]:
    """A line with a number, hidden at a random depth of lines that say nothing."""
    if split == "passkey":
        key = str(rng.randrange(10_000, 100_000))
        line = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
        question = "What is the pass key?"
    else:
        digits = "".join(rng.choices(string.digits, k=5))
        key = "".join(digit * 2 for digit in digits)  # ten digits, each twice
        line = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
        question = "What is the sequence of digits?"
    record = {"context": line, "input": question, "answer": key}
    left = limit - tokens(_prompt(split, record)) - 8
    lines = [_NOISE] * max(1, left // tokens(_NOISE * 16) * 16 + left % tokens(_NOISE * 16) // 32)
    lines.insert(rng.randrange(len(lines) + 1), line)
    return {**record, "context": "".join(lines)}


def _made_pairs(rng: random.Random, tokens: Callable[[str], int], limit: int) -> dict[str, Any]:
    """A JSON object of random identifiers, one of whose values is asked for."""

    def identifier() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    pairs = {identifier(): identifier() for _ in range(max(2, limit // 40))}

    def record(count: int, key: str) -> dict[str, Any]:
        kept = dict(list(pairs.items())[:count])
        return {
            "context": "JSON data:\n" + json.dumps(kept),
            "input": f'Key: "{key}"\nThe value associated with the specified key is: ',
            "answer": kept[key],
        }

    # The most pairs that fit, by bisection: `most` of them never do or are all.
    first = next(iter(pairs))
    least, most = 1, len(pairs)
    while least < most:
        middle = (least + most + 1) // 2
        if tokens(_prompt("kv_retrieval", record(middle, first))) + 8 <= limit:
            least = middle
        else:
            most = middle - 1
    return record(least, list(pairs)[rng.randrange(least)])


def score(split: str, outputs: list[str], options: list[str], reply: str) -> float:
    """The benchmark's metric: accuracy, F1 (questions) or ROUGE-Lsum (summaries), in [0, 1]."""
    reply = reply.strip()
    if split in ("passkey", "number_string"):
        numbers = re.findall(r"[0-9]+", reply)
        return float(bool(numbers) and numbers[0] == outputs[0].strip())
    if split == "kv_retrieval":
        return float(outputs[0] in re.sub(r"""[\n:"'.,?!{}]""", " ", reply).split())
    if split == "longdialogue_qa_eng":
        return float(any(name.upper() in reply.upper() for name in outputs))
    if split == "longbook_qa_eng":
        words = _english_words(reply)
        return max(_f1(words, _english_words(answer)) for answer in outputs)
    if split == "longbook_qa_chn":
        characters = _chinese_characters(reply)
        return max(_f1(characters, _chinese_characters(answer)) for answer in outputs)
    if split == "longbook_sum_eng":
        scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rougeLsum"])
        return float(scorer.score(outputs[0], reply)["rougeLsum"].fmeasure)
    if split == "math_find":
        number = re.search(r"\d+\.\d+|\d+", reply)
        return float(number is not None and float(number[0]) == float(outputs[0]))
    letter = _letter_of(outputs, options)
    if split == "code_debug":
        return float(_is_option(reply, letter, outputs[0]))
    return float(_is_letter(reply, letter))


def _letter_of(outputs: list[str], options: list[str]) -> str:
    """The letter of a choice; the files hold the option's text, some the letter beside it."""
    if outputs[0] in options:
        return string.ascii_uppercase[options.index(outputs[0])]
    return next(a for a in outputs if len(a) == 1)


def _is_letter(reply: str, letter: str) -> bool:
    alone: list[str] = re.findall(r"\b[A-D]\b", reply)
    if alone:
        return alone[-1] == letter
    if reply[:1] in tuple("ABCD"):
        return reply[0] == letter
    words = re.sub(r"""[\n"'.,?!{}]""", " ", reply)
    for beginning in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = words.partition(beginning)
        if found and rest.strip():
            return rest.strip()[0] == letter
    return False


def _is_option(reply: str, letter: str, function: str) -> bool:
    alone: list[str] = re.findall(r"\b[A-J]\b", reply)
    if alone:
        return alone[-1] == letter
    words = re.sub(r"[\n`'\"*-]|[Oo]ption", " ", reply)
    words = " ".join(words.split())
    if words.startswith((letter, function)):
        return True
    for beginning in ("answer is:", "is:", "answer:", "correct option is:"):
        _, found, rest = words.partition(beginning)
        if found:
            return rest.strip().startswith((letter, function))
    return False


def _english_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese_characters(text: str) -> list[str]:
    return [c for c in text.lower() if c.isalnum()]


def _f1(words: list[str], answer: list[str]) -> float:
    common = sum((Counter(words) & Counter(answer)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(answer)
    return 2 * precision * recall / (precision + recall)

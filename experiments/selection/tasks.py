"""Prompts of exact lengths in one model's tokens: OUT_dev.npz and OUT_test.npz.

  python tasks.py --model FOLDER --texts TEXTS --out qwen [--longest 32768] [--samples 16]

*dev* chooses, *test* checks: other books, other seeds, four more tasks. The lengths have two ragged
ends and one that is a multiple of 128.

  single          one access code in a document
  multi_key       one for every 512 tokens
  recall          the document again from one of its lines on: 64 tokens given, 32 scored
  question_mid    330 tokens of other text between the question and the answer
  word            two words instead of a code
  multi_value     three codes of one name
  key_value       a list of codes, no document
  question_first  the question before the document only

The tokenizer is the model's; names and codes come from flex_prefill.retrieval.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flex_prefill import retrieval
from tokenizers import Tokenizer

BOOKS = {
    "dev": ["reference", "cargo", "rust-by-example", "unstable-book", "clippy"],
    "test": ["book", "rustc", "nomicon", "embedded-book", "edition-guide"],
}
LENGTHS = {4096: 4096 - 29, 8192: 8192 - 91, 16384: 16384, 32768: 32768 - 40}
DEV_KINDS = ["single", "multi_key", "recall", "question_mid"]
KINDS = {
    "dev": DEV_KINDS,
    "test": [*DEV_KINDS, "word", "multi_value", "key_value", "question_first"],
}
SAMPLES = {
    "dev": {4096: 8, 8192: 8, 16384: 8, 32768: 4},
    "test": {4096: 10, 8192: 10, 16384: 8, 32768: 4},
}
HEADER = "Document. Some of its lines state access codes; a question about them follows.\n\n"
REPEATED = "\n\nThe document above, repeated from one of its lines on:\n\n"

Ids = list[int]
Made = tuple[Ids, Ids, tuple[int, int] | None]  # prompt, answer, the document's tokens


class Maker:
    def __init__(self, encode: Callable[[str], Ids], books: list[list[Ids]], rng: random.Random):
        self.encode, self.books, self.rng = encode, books, rng
        rng.random()  # as when the results were made
        self.names = retrieval.random_names(rng, 200)
        self.name, self.answer = self.names[0], self.code()

    def code(self) -> str:
        return str(self.rng.randrange(100000, 1000000))

    def haystack(self, n: int) -> list[Ids]:
        """Consecutive paragraphs of books, exactly n tokens."""
        out: list[Ids] = []
        left = n
        while left > 0:
            book = self.rng.choice(self.books)
            for paragraph in book[self.rng.randrange(len(book)) :]:
                out.append(paragraph[:left])
                left -= len(out[-1])
                if left <= 0 or len(out) % 4000 == 3999:
                    break
        return out

    def place(self, paragraphs: list[Ids], needles: list[Ids]) -> list[Ids]:
        """Needles between paragraphs, stratified over the depth."""
        low, high, k = 0.02, 0.92, len(needles)
        ends = np.cumsum([len(p) for p in paragraphs])
        spots = sorted(
            (low + (high - low) * (i + self.rng.random()) / k) * ends[-1] for i in range(k)
        )
        out: list[Ids] = []
        j = 0
        for paragraph, end in zip(paragraphs, ends, strict=True):
            out.append(paragraph)
            while j < k and spots[j] <= end:
                out.append(needles[j])
                j += 1
        return out + needles[j:]

    def needle(self, name: str, code: str) -> Ids:
        return self.encode(retrieval.NEEDLE.format(name=name, code=code))

    def pairs(self, n: int, header: Ids, tail: Ids) -> Ids:
        lines = [self.encode(retrieval.PAIR.format(name=self.name, code=self.answer))]
        left = n - len(header) - len(tail) - len(lines[0])
        for other in retrieval.random_names(self.rng, min(left // 10 + 1, 8000)):
            if other == self.name:
                continue
            line = self.encode(retrieval.PAIR.format(name=other, code=self.code()))
            if len(line) > left:
                break
            lines.append(line)
            left -= len(line)
        self.rng.shuffle(lines)
        return [token for line in lines for token in line] + [self.encode("\n")[0]] * left

    def make(self, kind: str, n: int) -> Made:
        encode, name = self.encode, self.name
        question = (
            f"\n\nQuestion: What is the access code of {name}? "
            f"Find the line about {name} in the text above.\n"
        )
        reply = f"Answer: The access code of {name} is "
        header = encode(HEADER)
        before, tail = header, encode(question + reply)
        needles, answer = [self.needle(name, self.answer)], encode(self.answer)
        if kind == "multi_key":
            others = self.names[1 : max(8, n // 512)]
            needles = [self.needle(other, self.code()) for other in others]
            needles.insert(self.rng.randrange(len(others) + 1), self.needle(name, self.answer))
        elif kind == "word":
            words = f"{self.rng.choice(retrieval._ADJECTIVES)} {self.rng.choice(retrieval._NOUNS)}"
            needles = [encode(f"The secret animal of {name} is the {words}.\n\n")]
            tail = encode(
                f"\n\nQuestion: What is the secret animal of {name}? Find the line about {name} in "
                f"the text above.\nAnswer: The secret animal of {name} is the"
            )
            answer = encode(" " + words)
        elif kind == "multi_value":
            codes = [self.code() for _ in range(3)]
            needles = [self.needle(name, code) for code in codes]
            tail = encode(
                f"\n\nQuestion: The text above states three access codes of {name}. List all three "
                f"in the order of the text.\nAnswer: The access codes of {name} are "
            )
            answer = encode(", ".join(codes))
        elif kind == "question_mid":
            between = [token for p in self.haystack(330) for token in p]
            tail = encode(question) + between + encode("\n\n" + reply)
        elif kind == "question_first":
            asked = (
                f"Question: What is the access code of {name}? "
                f"Find the line about {name} in the text below.\n\n"
            )
            before = encode(asked) + header
            tail = encode("\n\n" + reply)
        elif kind == "key_value":
            return header + self.pairs(n, header, tail) + tail, answer, None
        elif kind == "recall":
            return self.recall(n, header)
        left = n - len(before) - len(tail) - sum(map(len, needles))
        body = [token for p in self.place(self.haystack(left), needles) for token in p]
        return before + body + tail, answer, (len(before), len(before) + len(body))

    def recall(self, n: int, header: Ids) -> Made:
        tail = self.encode(REPEATED)
        left = n - len(header) - len(tail) - 64
        flat = [token for p in self.haystack(left) for token in p]
        at = self.rng.randrange(int(0.05 * left), int(0.8 * left))
        prompt = header + flat + tail + flat[at : at + 64]
        return prompt, flat[at + 64 : at + 96], (len(header), len(header) + left)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--texts", type=Path, required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--longest", type=int, default=32768)
    p.add_argument("--samples", type=int, help="of each kind and length, instead of SAMPLES")
    a = p.parse_args()
    tokenizer = Tokenizer.from_file(str(a.model / "tokenizer.json"))

    def encode(text: str) -> Ids:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for split, books in BOOKS.items():
        paragraphs = []
        for book in books:
            text = (a.texts / f"{book}.txt").read_text(encoding="utf-8")
            parts = [part + "\n\n" for part in text.split("\n\n") if part.strip()]
            encoded = tokenizer.encode_batch(parts, add_special_tokens=False)
            paragraphs.append([e.ids for e in encoded])
        tokens: Ids = []
        index: list[dict[str, Any]] = []
        for length, n in LENGTHS.items():
            samples = a.samples or SAMPLES[split][length]
            for sample in range(samples if length <= a.longest else 0):
                for kind in KINDS[split]:
                    rng = random.Random(f"{split}/{kind}/{length}/{sample}")
                    prompt, answer, span = Maker(encode, paragraphs, rng).make(kind, n)
                    assert len(prompt) == n, (kind, len(prompt), n)
                    about = {"kind": kind, "length": length, "sample": sample, "span": span}
                    index.append(about | {"n": n, "answer": len(answer)})
                    tokens += prompt + answer
        np.savez_compressed(
            f"{a.out}_{split}.npz", tokens=np.array(tokens, np.uint32), index=json.dumps(index)
        )
        print(split, len(index), "prompts,", len(tokens), "tokens")


if __name__ == "__main__":
    main()

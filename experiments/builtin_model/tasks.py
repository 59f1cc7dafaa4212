"""Training sequences: library text with access codes and questions, lists, copies.

Sequences are put together from token lists made once; the pieces join where the tokenizer splits
anyway, so the tokens are those of the joined text (`python tasks.py` checks it). Each target token
carries a weight class: IGNORED (cannot be known), TEXT, or ANSWER.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path

import numpy as np
from common import retrieval
from tokenizers import Tokenizer

IGNORED, TEXT, ANSWER = 0, 1, 2
MAX_POSITION = 20_480

# How a name can be followed by its code. The long form is the one of the evaluation; the short
# ones make any mention of a name a place where the code may come next, so that heads look the code
# up at every mention and not at the very last token only.
ANSWER_FORMS = [
    "Question: what is the access code of {name}?\nAnswer: {code}.\n\n",
    "Question: state the access code of {name}.\nThe access code of {name} is {code}.\n\n",
    "As stated above, the code of {name} is {code}.\n\n",
    "The access code of {name} is {code}.\n\n",
    "- {name}: {code}\n\n",
]
LONG_FORM = retrieval.QUESTION + "{code}.\n\n"


class Sequence:
    """Tokens and weight classes under construction."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.classes: list[int] = []

    def add(self, tokens: list[int], weight_class: int) -> None:
        self.tokens += tokens
        self.classes += [weight_class] * len(tokens)


class TaskMaker:
    """Draws training sequences."""

    def __init__(self, data: Path, tokenizer: Path) -> None:
        encoder = Tokenizer.from_file(str(tokenizer))
        self.encode = lambda text: encoder.encode(text, add_special_tokens=False).ids
        self.text = np.fromfile(data / "tokens.bin", np.uint16)
        self.starts = np.fromfile(data / "paragraphs.bin", np.uint32)
        self.vocab = encoder.get_vocab_size()
        self.words = {
            word: self.encode(word)
            for word in (
                *(" " + a for a in retrieval._ADJECTIVES),
                *("-" + n for n in retrieval._NOUNS),
            )
        }
        self.digits = [self.encode(digit)[0] for digit in "0123456789"]
        self.forms = {
            form: self._pieces(form)
            for form in (
                *ANSWER_FORMS,
                LONG_FORM,
                retrieval.NEEDLE,
                retrieval.PAIR,
                retrieval.QUESTION,
            )
        }
        self.headers = [self.encode(retrieval.DOCUMENT_HEADER), self.encode(retrieval.LIST_HEADER)]
        self.newline = self.encode("\n")
        self.pair_end = self.encode("\n\n")
        self.answer_end = self.encode(".\n\n")

    def _pieces(self, form: str) -> list[list[int] | str]:
        parts = [p for p in re.split(r" ?(\{name\})|(\{code\})", form) if p]
        return [part if part[0] == "{" else self.encode(part) for part in parts]

    def name_tokens(self, name: str) -> list[int]:
        adjective, noun = name.split("-")
        return self.words[" " + adjective] + self.words["-" + noun]

    def fill(self, out: Sequence, form: str, name: list[int], code: list[int], known: bool) -> None:
        """Append a form; with `known` its code can be looked up and is an answer."""
        answered = False
        for piece in self.forms[form]:
            if piece == "{name}":
                out.add(name, TEXT if known else IGNORED)
            elif piece == "{code}":
                out.add(code, ANSWER if known else IGNORED)
                answered = True
            else:
                out.add(piece, (ANSWER if answered else TEXT) if known else IGNORED)

    def entries(self, rng: random.Random, count: int) -> list[tuple[list[int], list[int]]]:
        names = retrieval.random_names(rng, count, held_out=False)
        return [
            (self.name_tokens(n), [self.digits[int(d)] for d in retrieval.random_code(rng)])
            for n in names
        ]

    def ask(self, rng: random.Random, out: Sequence, entry: tuple[list[int], list[int]]) -> None:
        form = LONG_FORM if rng.random() < 0.5 else rng.choice(ANSWER_FORMS)
        self.fill(out, form, *entry, known=True)

    def paragraphs(self, rng: random.Random, length: int) -> list[list[int]]:
        first = rng.randrange(len(self.starts) - 2)
        last = int(np.searchsorted(self.starts, self.starts[first] + length))
        cuts = self.starts[first : last + 1]
        return [self.text[a:b].tolist() for a, b in itertools.pairwise(cuts)]

    def document(self, rng: random.Random, length: int) -> Sequence:
        """Library text with needles in it and questions after it, now and then between."""
        out = Sequence()
        most = min(64, length // 40)
        entries = self.entries(rng, round(math.exp(rng.uniform(0, math.log(most)))))
        tail = min(rng.uniform(0.15, 0.6) * length, rng.uniform(200, 1800))
        document = self.paragraphs(rng, max(64, int(length - tail) - 16 * len(entries)))
        places = sorted((rng.random() * len(document), e) for e in range(len(entries)))
        between = rng.random() < 0.3
        out.add(self.headers[0], IGNORED)
        seen = []
        for i, paragraph in enumerate(document):
            out.add(paragraph, TEXT)
            while places and places[0][0] <= i + 1:
                entry = entries[places.pop(0)[1]]
                self.fill(out, retrieval.NEEDLE, *entry, known=False)
                seen.append(entry)
            if between and seen and rng.random() < 0.05:
                self.ask(rng, out, rng.choice(seen))
        while len(out.tokens) < length:
            self.ask(rng, out, rng.choice(entries))
        return out

    def pairs(self, rng: random.Random, length: int) -> Sequence:
        """A list of names and codes, then lines of it again in another order, or questions."""
        out = Sequence()
        most = length // 13
        if length >= 4096:
            count = round(rng.uniform(0.6, 0.95) * most)
        else:
            count = round(math.exp(rng.uniform(math.log(4), math.log(0.8 * most))))
        entries = self.entries(rng, count)
        out.add(self.headers[1], IGNORED)
        for entry in entries:
            self.fill(out, retrieval.PAIR, *entry, known=False)
        if rng.random() < 0.4:
            again = rng.sample(entries, min(len(entries), rng.randrange(4, 100)))
            for entry in again:
                self.fill(out, retrieval.PAIR, *entry, known=True)
        out.tokens[-1], out.classes[-1] = self.pair_end[0], IGNORED
        while len(out.tokens) < length:
            self.ask(rng, out, rng.choice(entries))
        return out

    def exam(self, rng: random.Random, prompt: int, length: int) -> tuple[Sequence, int]:
        """A prompt as in the evaluation, its answer, then many short questions.

        Returns the sequence and the prompt's length (begin-of-text included), which is at most
        `prompt` and less than 100 tokens below it. The prompt is for sparse prefill, what follows
        for dense rows: those questions need the keys and values that the sparse prefill left.
        """
        out, question = Sequence(), Sequence()
        pairs = rng.random() < 0.5
        count = prompt // 12 if pairs else round(math.exp(rng.uniform(0, math.log(prompt // 64))))
        entries = self.entries(rng, count)
        asked = rng.choice(entries if not pairs else entries[: count * 3 // 4])
        self.fill(question, retrieval.QUESTION, *asked, known=True)
        left = prompt - 1 - rng.randrange(80) - len(question.tokens)
        out.add(self.headers[pairs], IGNORED)
        if pairs:
            listed = []
            for entry in entries:
                if len(out.tokens) + 16 > left:
                    break
                self.fill(out, retrieval.PAIR, *entry, known=False)
                listed.append(entry)
            entries = listed
            out.tokens[-1] = self.pair_end[0]
        else:
            needles = []
            for entry in entries:
                needles.append(Sequence())
                self.fill(needles[-1], retrieval.NEEDLE, *entry, known=False)
            left -= len(out.tokens) + sum(len(needle.tokens) for needle in needles)
            document = self.paragraphs(rng, left)
            places = sorted((rng.random() * len(document), i) for i in range(count))
            for i, paragraph in enumerate(document):
                paragraph = paragraph[:left]
                left -= len(paragraph)
                out.add(paragraph, TEXT)
                while places and places[0][0] <= i + 1:
                    needle = needles[places.pop(0)[1]]
                    out.add(needle.tokens, IGNORED)
        out.add(question.tokens, TEXT)
        end = len(out.tokens) + 1
        out.add(asked[1] + self.answer_end, ANSWER)
        while len(out.tokens) < length:
            form = retrieval.PAIR if pairs and rng.random() < 0.5 else rng.choice(ANSWER_FORMS)
            self.fill(out, form, *rng.choice(entries), known=True)
        return out, end

    def copies(self, rng: random.Random, length: int) -> Sequence:
        """Random tokens, or text, again and again."""
        out = Sequence()
        size = rng.randrange(16, max(17, min(length // 2, 4096)))
        if rng.random() < 0.5:
            segment = [rng.randrange(2, self.vocab) for _ in range(size)]
            out.add(segment, IGNORED)
        else:
            segment = [t for p in self.paragraphs(rng, size) for t in p]
            out.add(segment, TEXT)
        while len(out.tokens) < length:
            out.add(segment, TEXT)
        return out

    def plain(self, rng: random.Random, length: int) -> Sequence:
        """Library text."""
        out = Sequence()
        while len(out.tokens) < length:
            for paragraph in self.paragraphs(rng, length):
                out.add(paragraph, TEXT)
        return out

    def positions(self, rng: random.Random, length: int) -> np.ndarray:
        """Positions with up to four gaps in half of the shorter sequences.

        So distances up to the longest context are learnt from short sequences.
        """
        positions = np.arange(length, dtype=np.int32)
        room = MAX_POSITION - length
        if length < 16_384 and rng.random() < 0.5:
            for _ in range(rng.randrange(1, 5)):
                gap = rng.randrange(room // 2 + 1)
                positions[rng.randrange(1, length) :] += gap
                room -= gap
        return positions

    def sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, ...]:
        """Draw tokens [length + 1], weight classes [length + 1] and positions [length]."""
        kind = rng.choices(
            (self.document, self.pairs, self.copies, self.plain),
            (0.42, 0.38, 0.08, 0.12),
        )[0]
        out = kind(rng, length)
        tokens = np.array([0, *out.tokens[:length]], np.int32)
        return tokens, np.array([0, *out.classes[:length]], np.int32), self.positions(rng, length)

    def batch(self, rng: random.Random, count: int, length: int, prompt: int = 0) -> np.ndarray:
        """int32 [4, count, length + 1]: tokens, classes, positions, prompt lengths (first column).

        With `prompt` the sequences are exams; without, prompt lengths are 0.
        """
        out = np.zeros((4, count, length + 1), np.int32)
        for i in range(count):
            if prompt:
                exam, out[3, i, 0] = self.exam(rng, prompt, length)
                out[0, i, 1:], out[1, i, 1:] = exam.tokens[:length], exam.classes[:length]
                out[2, i, :-1] = np.arange(length)
            else:
                out[0, i], out[1, i], out[2, i, :-1] = self.sequence(rng, length)
        return out


def main() -> None:
    """Check that put-together tokens are the tokenizer's own."""
    import time

    here = Path(__file__).parent
    path = here.parents[1] / "models" / "needle-7m" / "tokenizer.json"
    maker, tokenizer = TaskMaker(here / "data", path), Tokenizer.from_file(str(path))
    rng = random.Random(0)
    for kind in (maker.document, maker.pairs, maker.plain):
        out = kind(rng, 1024)
        text = tokenizer.decode(out.tokens, skip_special_tokens=False)
        same = maker.encode(text) == out.tokens
        print(f"{kind.__name__}: {len(out.tokens)} tokens, same as the tokenizer's: {same}")
    for length in (1024, 16_384):
        start = time.perf_counter()
        batch = maker.batch(rng, 20, length, prompt=length - 256)
        assert all(length - 256 - 128 < end <= length - 256 for end in batch[3, :, 0])
        maker.batch(rng, 20, length)
        print(f"{length}: {40 * length / (time.perf_counter() - start):,.0f} tokens/s")


if __name__ == "__main__":
    main()

"""Long prompts that hide an answer, made from Python's own library.

Three kinds of prompt, all with the question at the end:

``single``
    A document of library source and documentation with one line that states an access code.
``multi_key``
    The same with one such line for every 512 tokens, each for another name; one is asked for.
``key_value``
    Nothing but a list of names and access codes, as long as the prompt.

The built-in model in ``models/`` was trained on prompts of this form, with other files of the
library, other names and other seeds: a *held-out* prompt uses only what training never saw. The
same seed gives the same prompt under the same Python version (another version brings another
library text). Only the standard library is needed::

    prompt, answer = make_prompt("single", 16384, seed=0, count_tokens=lambda t: len(encode(t)))
"""

from __future__ import annotations

import os
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["KINDS", "is_correct", "make_prompt", "random_names"]

KINDS = ("single", "multi_key", "key_value")

NEEDLE = "The access code of {name} is {code}.\n\n"
PAIR = "- {name}: {code}\n"
DOCUMENT_HEADER = "Document. Some of its lines may state access codes.\n\n"
LIST_HEADER = "List of access codes, one line for each name.\n\n"
QUESTION = (
    "Question: what is the access code of {name}? The text above states the access code of {name} "
    "exactly once. Find the line about {name}. Other lines may state the codes of other names; "
    "they do not count, only the line about {name} does. Copy the code of {name} from there digit "
    "by digit, and do not change it. Reply with the access code of {name} and with nothing else.\n"
    "Answer: the access code of {name} is "
)
TOKENS_PER_NEEDLE = 512  # of a multi_key prompt

_ADJECTIVES = """
able acid agile alert amber ample ancient arctic azure bare basic bold brave brief bright broad
bronze brown busy calm candid careful casual central cheap chief civil classic clean clear clever
close cloudy coarse cold cosmic crisp cubic curious curly daily damp dark dear decent deep dense
digital direct distant double dusty eager early easy elder elegant empty endless equal exact extra
faint fair famous fancy fast fatal fierce final firm flat fluent formal frank fresh friendly frozen
full fuzzy gentle giant glad global golden good grand grave gray great green handy happy hard heavy
hidden high hollow honest huge humble icy ideal idle inner ivory jolly joint keen kind large late
lazy lean level light linear little lively local lonely long loose loud lovely low loyal lucky lunar
magic major marble mellow merry mild minor misty mobile modern modest moral muddy narrow native
natural neat nervous neutral new nimble noble noisy normal novel odd olive open oral outer pale
patient perfect plain pleasant polar polite poor prime private proud public pure purple quick quiet
rapid rare raw ready real recent red regal remote rich rigid ripe robust rough round royal rural
rusty sacred safe salty scarlet secret senior sharp short shy silent silver simple slim slow small
smart smooth social soft solar solid sour spare special spicy stable steady steep stiff strange
strict strong subtle sudden sunny super sweet swift tall tame tender tense thick thin tidy tight
tiny total tough true urban urgent usual vague valid vast velvet violet visual vital vivid warm
wary wet white whole wide wild wise witty wooden yellow young
""".split()  # noqa: SIM905

_NOUNS = """
acorn actor anchor ankle apple apron arrow atlas badge baker banjo banner barrel basin basket beach
beacon beaver bell bench berry bishop blade blanket boat bottle boulder bowl branch brick bridge
broom bucket buffalo bullet butter cabin cable cactus camel camera canal candle canoe canyon captain
carbon carpet castle cattle cave cedar cellar chain chair chalk cherry chimney circle cliff cloud
clover coast cobra coffee comet compass copper coral cottage cotton cousin crane crater cricket
crown crystal cup curtain cushion dagger daisy desert diamond doctor dolphin donkey door dragon
drum eagle ember engine falcon farmer feather fender ferry fiddle finger flame flute forest fork
fossil fountain fox frog garden garlic gate ghost giraffe glacier glove goat goose grape guitar
hammer harbor hawk hazel helmet heron hill honey horn horse hotel igloo island jacket jaguar jelly
jewel jungle kettle king kitchen kite knight ladder lake lamp lantern laurel leaf lemon leopard
lily lion lizard lobster lotus magnet maple market mason meadow melon mirror monkey moon moth
mountain mouse museum nest nickel north novelist oak ocean onion orange orchard otter owl oyster
paddle palace panda paper parrot peach peanut pearl pebble pelican pencil pepper piano pigeon pilot
pine planet plum pocket pony poplar prince pumpkin puppet quail queen rabbit raccoon radio raven
ribbon river robin rocket rose saddle sailor salmon sand sapphire saturn scarf school seal shadow
sheep ship shovel spider spoon squirrel star statue stone sugar sunset swan table temple thistle
thunder tiger timber toad tower trumpet tulip tunnel turtle valley violin vulture wagon walnut
whale wheel willow window winter wizard wolf zebra
""".split()  # noqa: SIM905

_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "pydoc_data", "lib-dynload"}
_OFTEN_MISSING = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings"}
_LONGEST_PARAGRAPH = 4000  # characters; longer ones are tables


def is_held_out(label: str) -> bool:
    """Whether a file, a documentation topic or a name is kept away from training (one in eight)."""
    return zlib.crc32(label.encode()) % 8 == 0


def random_names(rng: random.Random, count: int, held_out: bool = True) -> list[str]:
    """Draw `count` distinct names such as ``amber-falcon``."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"
        if is_held_out(name) == held_out:
            names[name] = None
    return list(names)


def all_names(held_out: bool = True) -> list[str]:
    """Return every name of one side of the split."""
    names = (f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS)
    return [name for name in names if is_held_out(name) == held_out]


def random_code(rng: random.Random) -> str:
    """Draw an access code of six digits."""
    return str(rng.randrange(100_000, 1_000_000))


def library_files(skipped: set[str] = _OFTEN_MISSING) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of the library's modules and of the language reference's topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_LIBRARY - skipped)
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix == ".py":
                try:
                    yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for topic, text in sorted(topics.items()):
        yield f"topic/{topic}", text


def paragraphs_of(text: str) -> list[str]:
    """Split at blank lines; each paragraph starts with its first line and ends in a blank line."""
    lines = [line.rstrip() for line in text.splitlines()]
    joined = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    paragraphs = [paragraph + "\n\n" for paragraph in joined.split("\n\n") if paragraph]
    return [paragraph for paragraph in paragraphs if len(paragraph) <= _LONGEST_PARAGRAPH]


@lru_cache(maxsize=1)
def held_out_texts() -> list[list[str]]:
    """Return the paragraphs of each held-out file of the library."""
    texts = [paragraphs_of(text) for label, text in library_files() if is_held_out(label)]
    texts = [paragraphs for paragraphs in texts if len(paragraphs) > 3]
    if not texts:
        root = sysconfig.get_paths()["stdlib"]
        raise RuntimeError(f"expected Python's library sources (*.py) under {root}, found none")
    return texts


def _document(rng: random.Random, n_tokens: int, count: Callable[[str], int]) -> list[str]:
    """Take consecutive paragraphs of held-out files, up to n_tokens."""
    paragraphs: list[str] = []
    left = n_tokens
    texts = held_out_texts()
    while left > 0:
        text = rng.choice(texts)
        for paragraph in text[rng.randrange(len(text)) :]:
            length = count(paragraph)
            if length > left:
                lines = paragraph.splitlines(keepends=True)
                while lines and count("".join(lines) + "\n") > left:
                    lines.pop()
                left = 0
                paragraph = "".join(lines) + "\n" if lines else ""
            paragraphs.append(paragraph)
            left -= length
            if left <= 0:
                break
    return paragraphs


def _insert(rng: random.Random, document: list[str], needles: list[str]) -> str:
    """Put the needles between paragraphs, at depths drawn evenly over the document's characters."""
    ends: list[int] = []
    for paragraph in document:
        ends.append((ends[-1] if ends else 0) + len(paragraph))
    places = sorted((rng.random() * ends[-1], needle) for needle in needles)
    parts: list[str] = []
    for paragraph, end in zip(document, ends, strict=True):
        parts.append(paragraph)
        while places and places[0][0] <= end:
            parts.append(places.pop(0)[1])
    return "".join(parts)


def make_prompt(
    kind: str, n_tokens: int, seed: int, count_tokens: Callable[[str], int]
) -> tuple[str, str]:
    """Make a held-out prompt of at most (and nearly) `n_tokens` tokens.

    Args:
        kind: one of `KINDS`.
        n_tokens: length of the prompt, one begin-of-text token included.
        seed: the same seed gives the same prompt.
        count_tokens: number of tokens of a text, without begin-of-text.

    Returns:
        The prompt, which ends where the answer starts, and the answer (six digits).
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    rng = random.Random(f"{kind}/{n_tokens}/{seed}")
    name = random_names(rng, 1)[0]
    question, answer = QUESTION.format(name=name), random_code(rng)
    header = LIST_HEADER if kind == "key_value" else DOCUMENT_HEADER
    left = n_tokens - 1 - count_tokens(header) - count_tokens("\n" + question)
    if left < 64:
        raise ValueError(f"n_tokens: expected at least {n_tokens - left + 64}, got {n_tokens}")

    if kind == "key_value":
        pairs = [PAIR.format(name=name, code=answer)]
        left -= count_tokens(pairs[0])
        others = [other for other in random_names(rng, left // 8 + 1) if other != name]
        for other in others:
            pair = PAIR.format(name=other, code=random_code(rng))
            left -= count_tokens(pair)
            if left < 0:
                break
            pairs.append(pair)
        rng.shuffle(pairs)
        return header + "".join(pairs) + "\n" + question, answer

    needles = [NEEDLE.format(name=name, code=answer)]
    if kind == "multi_key":
        others = random_names(rng, max(4, n_tokens // TOKENS_PER_NEEDLE))
        needles += [NEEDLE.format(name=o, code=random_code(rng)) for o in others if o != name]
    left -= sum(map(count_tokens, needles))
    return header + _insert(rng, _document(rng, left, count_tokens), needles) + question, answer


def is_correct(reply: str, answer: str) -> bool:
    """Whether a model's reply is the answer exactly (more digits after it make it wrong)."""
    reply = reply.strip()
    return reply.startswith(answer) and not reply[len(answer) : len(answer) + 1].isdigit()

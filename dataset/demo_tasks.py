"""What make_demo.py builds on: words.json, what is held out, and the tasks whose answers are computed."""

import hashlib
import json
from pathlib import Path

DEMO = Path(__file__).resolve().parent / "demo"
LANGS = ("en", "zh")
WORDS = json.loads((DEMO / "words.json").read_text(encoding="utf-8"))
PAIRS = {group: [pair.split() for pair in text.split(", ")] for group, text in WORDS["words"].items()}
PAIRS["city"] = [pair.split() for pair in WORDS["city"].split(", ")]
NAMES = {lang: WORDS["names"][lang].split() for lang in LANGS}


def held(*key, one_in=10) -> bool:
    """True for the share of all keys that is kept for evaluation."""
    digest = hashlib.md5(json.dumps(key, ensure_ascii=False).encode()).hexdigest()
    return int(digest, 16) % one_in == 0


def normalise(text: str) -> str:
    """Text without whitespace and case, the form in which prompts are compared."""
    return "".join(text.split()).lower()


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def turns(*contents: str) -> list[dict]:
    """User and assistant turns by turns, the first one the user's."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


# Computed tasks: (rng, lang, held_out) -> turns of one row.


def steps(a: int, b: int, op: str, lang: str) -> str:
    """The digit by digit working of a + b or a - b (two digits each, a >= b for the difference)."""
    p, x, q, y = a // 10, a % 10, b // 10, b % 10
    if op == "+":
        z = x + y
        f = {"z": z, "w": z % 10, "k": z // 10, "t": p + q + z // 10, "r": a + b}
    else:
        k = int(x < y)
        x += 10 * k
        f = {"z": x - y, "k": k, "t": p - k - q, "r": a - b}
    return WORDS["steps"][lang][op].format(p=p, q=q, x=x, y=y, **f)


def sample_arithmetic(rng, lang, held_out):
    while True:
        a, b, op = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
        if op == "-" and a < b:
            a, b = b, a
        if held("arithmetic", op, *sorted((a, b))) == held_out:
            ask = rng.choice(WORDS["arithmetic"][lang][op]).format(a=a, b=b, n=rng.choice(NAMES[lang]))
            return turns(ask, steps(a, b, op, lang))


def sample_reverse(rng, lang, held_out):
    while True:
        kind = rng.choice(("letters", "letters", "words"))
        if kind == "letters":
            items = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(3, 5))
        else:
            words = [en for group in ("animal", "food", "nature") for en, _ in PAIRS[group]]
            items = rng.sample(words, rng.randint(3, 4))
        if held("reverse", min(items, items[::-1])) == held_out:
            t = WORDS["reverse"][lang]
            ask = rng.choice(t[kind]).format(s=" ".join(items))
            return turns(ask, t["say"].format(r=" ".join(reversed(items))))


def sample_sort(rng, lang, held_out):
    while True:
        kind, numbers = rng.choice(("up", "down", "words")), rng.choice((range(10), range(10, 100)))
        if kind == "words":  # one word per letter, so that the first letter alone decides
            items = rng.sample(WORDS["alphabet"].split(), rng.randint(3, 4))
        else:
            items = rng.sample(numbers, rng.randint(3, 4 if len(numbers) == 10 else 3))
            if len(numbers) > 10 and len({n // 10 for n in items}) < len(items):  # likewise the first digit
                continue
        if held("sort", sorted(items)) == held_out:
            t, order = WORDS["sort"][lang], sorted(items, reverse=kind == "down")
            ask = rng.choice(t[kind]).format(s=" ".join(map(str, items)))
            return turns(ask, t["say"].format(r=" ".join(map(str, order))))


def sample_direct(rng, lang, held_out):
    """Three-digit addition without shown steps: the harder task that reinforcement learning starts from."""
    while True:
        a, b = rng.randint(100, 499), rng.randint(100, 499)
        carries = any(x + y > 9 for x, y in ((a % 10, b % 10), (a // 10 % 10, b // 10 % 10)))
        if carries and rng.random() < 0.5:  # about half of the prompts without a carry: the model can begin with them
            continue
        if held("direct", *sorted((a, b))) == held_out:
            return turns(rng.choice(WORDS["rl"][lang]).format(a=a, b=b), str(a + b))


def sample_ties(rng, lang, held_out):
    """Sorting where in half of the prompts two numbers begin alike, which SFT never shows: for reinforcement learning.

    The model has learned to look at the first digit, and is right about the other half.
    """
    kind, distinct = rng.choice(("up", "down")), rng.choice((2, 3))
    while True:
        items = rng.sample(range(10, 100), 3)
        if len({n // 10 for n in items}) == distinct and held("sort", sorted(items)) == held_out:
            t, order = WORDS["sort"][lang], sorted(items, reverse=kind == "down")
            ask = rng.choice(t[kind]).format(s=" ".join(map(str, items)))
            return turns(ask, t["say"].format(r=" ".join(map(str, order))))


COMPUTED = {
    "arithmetic": sample_arithmetic, "reverse": sample_reverse, "sort": sample_sort, "direct": sample_direct,
    "ties": sample_ties,
}  # fmt: skip

"""Text as people type it: templates, made-up names and words, and the noise of a keyboard.

A template is text with alternatives, `(What is|Tell me) the capital of {a}`, and slots, `{a}`. Pure
functions of a `random.Random`, standard library only.
"""

import hashlib
import json
import random
import re
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "dataset/demo"
LANGS = ("en", "zh")
WORDS = json.loads((DEMO / "words.json").read_text(encoding="utf-8"))


def read_pairs(text: str) -> list[list[str]]:
    """`cat 猫, thank_you 谢谢` as pairs of an English and a Chinese text."""
    return [[side.replace("_", " ") for side in pair.split()] for pair in text.split(", ")]


PAIRS = {group: read_pairs(text) for group, text in WORDS["words"].items()}
CITIES = read_pairs(WORDS["city"])
NAMES = {lang: WORDS["names"][lang].split() for lang in LANGS}
# The 3,755 most common Chinese characters, in the order of the standard (GB 2312, level 1).
HANZI = [
    bytes((row, cell)).decode("gb2312")
    for row in range(0xB0, 0xD8)
    for cell in range(0xA1, 0xFF if row < 0xD7 else 0xFA)
]


def read_pieces() -> dict[str, list[str]]:
    """The pieces of words that our tokenizer knows: of them words are made up, to teach copying."""
    # Byte-level BPE spells these bytes as themselves, the others as the characters from 256 on.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in shown}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*shown}))}
    spec = json.loads(
        (ROOT / "model/minimind_tokenizer/tokenizer.json").read_text(encoding="utf-8")
    )
    texts = [
        bytes(map(byte_of.get, piece)).decode("utf-8", "replace").strip()
        for piece in spec["model"]["vocab"]
    ]
    texts = list(dict.fromkeys(texts))
    return {
        "en": [text for text in texts if re.fullmatch("[A-Za-z]+", text)],
        "zh": [text for text in texts if re.fullmatch("[\u4e00-\u9fff]+", text)],
    }


PIECES = read_pieces()
ALTERNATIVES = re.compile(r"\(([^()]*)\)")
SLOT = re.compile(r"(\{\w+\})")
CONTRACTIONS = [
    (re.compile(rf"\b{long}\b", re.IGNORECASE), short) for long, short in WORDS["contractions"]
]
HALF_WIDTH = str.maketrans("，。？！：（）；", ",.?!:();")
FULL_WIDTH = str.maketrans("0123456789+-=?", "０１２３４５６７８９＋－＝？")


def held(*key, one_in: int = 10) -> bool:
    """True for the share of all keys that is kept for evaluation."""
    digest = hashlib.md5(json.dumps(key, ensure_ascii=False).encode()).hexdigest()
    return int(digest, 16) % one_in == 0


def normalise(text: str) -> str:
    """Text without whitespace, punctuation, case and width: how prompts are compared."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in text if c.isalnum() or c in "+-*/=×÷−–✕·")


def is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def resolve(template: str, choose) -> str:
    """Replace each (a|b) by what `choose` takes of its alternatives, the innermost first."""
    while match := ALTERNATIVES.search(template):
        template = template[: match.start()] + choose(match[1].split("|")) + template[match.end() :]
    return template


def expand(rng: random.Random, template: str) -> str:
    """The template with alternatives chosen at random: one of its forms."""
    return resolve(template, rng.choice)


def first_choice(template: str) -> str:
    """The template with the first of all alternatives: the form that a reply uses."""
    return resolve(template, lambda alternatives: alternatives[0])


# Names and words that no list holds. What is to be copied must be new most of the time.


def syllables(rng: random.Random, count: int) -> str:
    """A word that can be spoken and means nothing."""
    onsets = (
        "b c d f g h j k l m n p r s t v w x y z br ch cl dr fr gl gr kr ph pl qu sh sk st th tr"
        " vl zh".split()
    )
    onsets += [""]
    vowels = "a a e e i o o u y ai ae ea ee ei ia ie io oa oo ou".split()
    codas = [
        "",
        "",
        "",
        "",
        *"n n r s l m t k d x ck ld lf ll mp nd ng nt rd rk rt sh ss st th ff".split(),
    ]
    return "".join(
        rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(count)
    )


def made_up_word(rng: random.Random, lang: str) -> str:
    kind = rng.random()
    if lang == "zh":
        if kind < 0.4:
            return "".join(rng.choices(PIECES["zh"], k=rng.choice((1, 1, 2))))
        return "".join(rng.choices(HANZI, k=rng.choice((1, 2, 2, 2, 3, 3, 4))))
    if kind < 0.12:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))
    if kind < 0.6:
        word = "".join(rng.choices(PIECES["en"], k=rng.choice((1, 2, 2, 3))))
        return word if kind < 0.2 else word.lower()
    return syllables(rng, rng.choice((1, 2, 2, 3)))


def any_name(rng: random.Random, lang: str) -> str:
    """A name of a person: from a list or, more often, made up."""
    while True:
        kind = rng.random()
        if lang == "zh" and kind < 0.75:
            usual = rng.random() < 0.65
            surname = rng.choice(WORDS["names"]["surnames"] if usual else HANZI)
            given = WORDS["names"]["given"] if usual else HANZI
            name = (surname if kind < 0.6 else "") + "".join(
                rng.choices(given, k=rng.choice((1, 2, 2)))
            )
        elif kind < 0.25 or lang == "zh" and kind < 0.85:
            name = rng.choice(NAMES[lang])
        else:
            name = upper_first(made_up_word(rng, "en"))
            if rng.random() < 0.12:
                name += rng.choice((" ", "-")) + upper_first(made_up_word(rng, "en"))
        if len(name) > 1:
            return name


def any_city(rng: random.Random, lang: str) -> str:
    if rng.random() < 0.4:
        return rng.choice(CITIES)[lang == "zh"]
    return upper_first(made_up_word(rng, lang))


def listed_word(rng: random.Random, lang: str) -> str:
    return rng.choice(PAIRS[rng.choice(list(PAIRS))])[lang == "zh"]


def any_word(rng: random.Random, lang: str) -> str:
    return listed_word(rng, lang) if rng.random() < 0.4 else made_up_word(rng, lang)


# The keyboard.


def on_text(change, text: str) -> str:
    """Apply a function to all of a template but its slots."""
    return "".join(part if SLOT.fullmatch(part) else change(part) for part in SLOT.split(text))


def misspell(rng: random.Random, text: str) -> str:
    """Swap, double or leave out a letter in one word of four letters or more."""
    spots = [
        match for match in re.finditer(r"[A-Za-z]{4,}", SLOT.sub(lambda m: "#" * len(m[0]), text))
    ]
    if not spots:
        return text
    match = rng.choice(spots)
    at = rng.randrange(match.start() + 1, match.end() - 1)
    middle = rng.choice((text[at + 1] + text[at], text[at] * 2 + text[at + 1], text[at + 1]))
    return text[:at] + middle + text[at + 2 :]


def change_space(rng: random.Random, text: str) -> str:
    """Double one of the spaces of a template, or drop it, but not beside a slot."""
    double = rng.random() < 0.6
    spaces = [match.start() for match in re.finditer(" " if double else r"(?<!\}) (?!\{)", text)]
    if not spaces:
        return text
    at = rng.choice(spaces)
    return text[:at] + ("  " if double else "") + text[at + 1 :]


def typed(
    rng: random.Random, text: str, lang: str, fields: dict, wrap: bool = True
) -> tuple[str, dict]:
    """An expanded template with its slots filled, as somebody types it.

    Args:
        fields: slot name -> text.
        wrap: whether a polite opening or ending may come around it.

    Returns:
        The prompt, and the fields as they were typed (in another case, say), for replies that copy
        them.
    """
    if wrap and rng.random() < 0.22:
        text = expand(rng, rng.choice(WORDS["openers"][lang])) + text
    if wrap and rng.random() < 0.08:
        end = re.search(r"[.?!。？！]*$", text)
        text = text[: end.start()] + expand(rng, rng.choice(WORDS["ends"][lang])) + end[0]
    if lang == "en":
        if rng.random() < 0.5:
            for pattern, short in CONTRACTIONS:
                if pattern.search(text) and rng.random() < 0.7:
                    text = pattern.sub(expand(rng, short), text, count=1)
        if rng.random() < 0.05:
            text = misspell(rng, text)
    elif rng.random() < 0.35:
        text = on_text(lambda part: part.translate(HALF_WIDTH), text)
    case = rng.random()
    if case < 0.38:
        text = on_text(str.lower, text)
        if rng.random() < 0.75:
            fields = {slot: value.lower() for slot, value in fields.items()}
    elif case < 0.4:
        text = on_text(str.upper, text)
        fields = {slot: value.upper() for slot, value in fields.items()}
    elif case < 0.9:
        text = upper_first(text)
    mark = rng.random()
    if mark < 0.42:
        text = re.sub(r"[.?!。？！ ]+$", "", text)
    elif mark < 0.5:
        text = re.sub(
            r"([.?!。？！])$", lambda m: rng.choice((" ", "", "", m[1], m[1] * 2)) + m[1], text
        )
    if rng.random() < 0.05:
        text = change_space(rng, text)
    prompt = text.format(**fields)
    if lang == "zh":
        spacing = rng.random()
        if spacing < 0.2:  # a space between Chinese and anything else, as many type it
            prompt = re.sub(
                r"(?<=[\u4e00-\u9fff])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[\u4e00-\u9fff])",
                " ",
                prompt,
            )
        elif spacing < 0.22:
            prompt = prompt.translate(FULL_WIDTH)
    return prompt, fields

"""The tasks of the demo data: each makes one exchange, or a short talk, with the one right reply.

A sampler takes (rng, lang, held_out) and returns the talk's texts, the user's first, the right
reply last. What is held out is decided by a hash of what a prompt is about, so both sides of the
split come from the same code.
"""

import functools
import random
import re
from collections.abc import Sequence

from dataset.demo_text import (
    NAMES,
    PAIRS,
    WORDS,
    any_city,
    any_name,
    any_word,
    expand,
    first_choice,
    held,
    is_chinese,
    listed_word,
    made_up_word,
    normalise,
    typed,
    upper_first,
)

WORD_PAIRS = [pair for pairs in PAIRS.values() for pair in pairs]
LISTED = {side for pair in WORD_PAIRS for side in pair}


def pick(rng: random.Random, lang: str, make, held_out: bool) -> str:
    """A made-up name or city from its own side of the split; training has no held-out one."""
    while True:
        value = make(rng, lang)
        if value in NAMES[lang] or held("name", value.lower()) == held_out:
            return value


# Families: question templates x items, with one fixed kind of reply (facts, dictionary, refusal,
# identity, greetings).


@functools.cache
def family_items(index: int) -> list[dict]:
    """The fillings of a family's templates, as dicts from slot to text; [{}] for none."""
    items = WORDS["families"][index].get("items")
    if items is None:
        return [{}]
    if items == "@words":
        return [{"a": english, "b": chinese} for english, chinese in WORD_PAIRS]
    return [dict(zip("abcdef", item.split("/"), strict=False)) for item in items.split(", ")]


def families(task: str) -> list[int]:
    return [index for index, family in enumerate(WORDS["families"]) if family["task"] == task]


def reply_fields(item: dict) -> dict:
    return {slot: first_choice(value) for slot, value in item.items()}


def ask_family(
    rng: random.Random, index: int, lang: str, held_out: bool
) -> tuple[str, dict] | None:
    """A question of a family as it is typed, and its item; None for one of the other side.

    Where a family echoes, its reply says the item as the question does.
    """
    family = WORDS["families"][index]
    item = rng.choice(family_items(index))
    ask = expand(rng, rng.choice(family[lang]["ask"]))
    closer = expand(rng, rng.choice(WORDS["closers"][lang])) if family.get("close") else ""
    fields = {slot: expand(rng, value) for slot, value in item.items()} | {"n": any_name(rng, lang)}
    key = normalise((ask + closer).format(**fields))
    bare = family.get("close") and key == normalise(ask)  # a plain hello is for training
    if (held(index, lang, key) and not bare) != held_out:
        return None
    if family.get("echo"):
        item = {slot: fields[slot] for slot in item}
    return typed(rng, ask + closer, lang, fields, wrap=not family.get("close"))[0], item


def sample_family(
    rng: random.Random, task: str, lang: str, held_out: bool
) -> tuple[str, str, dict]:
    """(prompt, reply, item) of a family task, the families weighted by their size."""
    indices = families(task)
    while True:
        index = rng.choices(indices, [len(family_items(i)) ** 0.5 for i in indices])[0]
        if asked := ask_family(rng, index, lang, held_out):
            prompt, item = asked
            reply = WORDS["families"][index][lang]["say"].format(**reply_fields(item))
            return prompt, upper_first(reply), item


# Arithmetic, with the working shown digit by digit.


def digit(number: int, place: int) -> int:
    return number // 10**place % 10


def digits_of_sum(a: int, b: int) -> list[str]:
    """`7+5=12`, the next place with the carry: `4+3+1=8`, ..., from the ones on."""
    lines, carry = [], 0
    for place in range(len(str(max(a, b)))):
        x, y = digit(a, place), digit(b, place)
        total = x + y + carry
        lines.append(f"{x}+{y}={total}" if place == 0 else f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return lines


def digits_of_difference(a: int, b: int) -> list[str]:
    """`12-5=7` where a ten was borrowed, the next place with the loan: `8-1-5=2`, ...; a >= b."""
    lines, loan = [], 0
    for place in range(len(str(a))):
        x, y = digit(a, place), digit(b, place)
        ten = 10 if x - loan < y else 0
        rest = x + ten - loan - y
        lines.append(f"{x + ten}-{y}={rest}" if place == 0 else f"{x + ten}-{loan}-{y}={rest}")
        loan = ten // 10
    return lines


def row_of_product(a: int, b: int) -> list[str]:
    """`5×3=15`, the next place and its carry: `2×3=6`, `6+1=7`; b has one digit."""
    lines, carry = [], 0
    for place in range(len(str(a))):
        product = digit(a, place) * b
        lines.append(f"{digit(a, place)}×{b}={product}")
        if place:
            lines.append(f"{product}+{carry}={product + carry}")
        carry = (product + carry) // 10
    return lines


def working(a: int, b: int, op: str, lang: str) -> str:
    """The reply to a + b, a - b or a * b: steps about single digits, the answer last."""
    t = WORDS["steps"][lang]
    colon, comma, stop = t["colon"], t["comma"], t["stop"]

    def places(lines: list[str]) -> str:
        return "".join(
            f"{name}{colon}{line}{stop}" for name, line in zip(t["places"], lines, strict=False)
        )

    if op == "+":
        text, result = f"{a}+{b}{stop}" + places(digits_of_sum(a, b)), a + b
    elif op == "-":
        question = f"{a}-{b}" if a >= b else f"{a}-{b}=-({b}-{a})"
        text, result = question + stop + places(digits_of_difference(max(a, b), min(a, b))), a - b
    else:
        result, rows = a * b, []
        for place in range(len(str(b))):
            q = digit(b, place)
            rows.append(f"{a}×{q}{colon}{comma.join(row_of_product(a, q))}{comma}{a * q}{stop}")
        text = "".join(rows)
        if len(rows) == 2:
            text += f"{t['sum']}{colon}{comma.join(digits_of_sum(a * digit(b, 0), 10 * a * digit(b, 1)))}{stop}"
    return text + t["end"].format(r=result)


def write_number(rng: random.Random, number: int, lang: str, words: bool) -> str:
    return WORDS["number_words"][lang].split()[number] if words else str(number)


def sample_calculation(
    rng: random.Random, lang: str, held_out: bool, op: str, sizes: list
) -> list[str]:
    """A question for a op b and its working; sizes: how many digits a and b have."""
    while True:
        a, b = (
            rng.randint(10 ** (size - 1) - (size == 1), 10**size - 1) for size in rng.choice(sizes)
        )
        template = rng.choice(WORDS["arithmetic"][lang][op][: None if rng.random() < 0.75 else 2])
        story = "{s}" not in template
        if op == "-" and a < b and (story or rng.random() < 0.4):
            a, b = b, a
        if held("arithmetic", op, *sorted((a, b))) != held_out:
            continue
        sign = rng.choice(WORDS["arithmetic"]["signs"][op][: None if rng.random() < 0.4 else 3])
        space = rng.choice(("", "", " "))
        template = expand(rng, template.replace("{s}", space + sign + space))
        words = max(a, b) <= 20 and rng.random() < 0.25
        fields = {"a": write_number(rng, a, lang, words), "b": write_number(rng, b, lang, words)}
        fields |= {"n": any_name(rng, lang), "v": any_name(rng, lang)}
        fields["t"] = expand(rng, WORDS["arithmetic"]["things"][lang])
        prompt, _ = typed(rng, template, lang, fields)
        # A bare 12+30=? is English.
        return [
            prompt,
            working(a, b, op, lang if is_chinese(prompt) else "en"),
        ]


def sample_arithmetic(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    sizes = [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
        (2, 2),
        (2, 2),
        (2, 2),
        (2, 3),
        (3, 2),
        (3, 1),
        (3, 3),
        (3, 3),
        (3, 3),
    ]
    return sample_calculation(rng, lang, held_out, rng.choice("+-"), sizes)


def sample_multiplication(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    sizes = [(1, 1), (1, 1), (2, 1), (2, 1), (1, 2), *[(2, 2)] * 7]
    return sample_calculation(rng, lang, held_out, "*", sizes)


def sample_direct(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    """Three-digit addition without steps: the harder task that RL starts from."""
    while True:
        a, b = rng.randint(100, 499), rng.randint(100, 499)
        carries = any(digit(a, place) + digit(b, place) > 9 for place in (0, 1))
        # About half of the prompts without a carry: the model can begin with them.
        if carries and rng.random() < 0.5:
            continue
        if held("arithmetic", "+", *sorted((a, b))) == held_out:
            return [rng.choice(WORDS["rl"][lang]).format(a=a, b=b), str(a + b)]


# Lists.


def joined(rng: random.Random, items: list, lang: str) -> str:
    """Items as people write them behind each other."""
    common = (
        " ",
        " ",
        " ",
        " ",
        ", ",
        ", ",
        ",",
        ",",
        " , ",
        " / ",
        "/",
        ";",
        "; ",
        "-",
        " - ",
        " | ",
        "   ",
    )
    separator = rng.choice(
        common + (("，", "、", "、", "、", "和") if lang == "zh" else (" and ",))
    )
    if lang == "en" and rng.random() < 0.12:
        return ", ".join(map(str, items[:-1])) + f" and {items[-1]}"
    return separator.join(map(str, items))


def first_letters_differ(items: list[str]) -> bool:
    return len({item[0] for item in items}) == len(items)


def some_words(rng: random.Random, count: int) -> list[str]:
    """Lower-case English words, listed and made-up ones, no two with one first letter."""
    while True:
        words = [
            (listed_word if rng.random() < 0.9 else made_up_word)(rng, "en").lower()
            for _ in range(count)
        ]
        if first_letters_differ(words) and all(" " not in word for word in words):
            return words


SORTS = ("up", "up", "up", "down", "words")
DRILLED_SORTS = ("up", "down", "words", "words")  # the alphabet takes longest to learn


def some_list(
    rng: random.Random, task: str, held_out: bool, sorts: Sequence[str] = SORTS
) -> tuple[str, list]:
    """(kind, items) of a list to sort or to reverse."""
    while True:
        kind, items = some_sortable(rng, sorts) if task == "sort" else some_reversible(rng)
        if held(task, list_key(task, items)) == held_out:
            return kind, items


def sample_list(rng: random.Random, task: str, lang: str) -> tuple[str, str]:
    """(items, reply) of a list to sort or to reverse, as people write them; for drills."""
    kind, items = some_list(rng, task, False, DRILLED_SORTS)
    return joined(rng, items, lang), list_reply(task, kind, items, lang)


def list_key(task: str, items: list) -> list:
    """What a list is about, in whatever order it is asked for."""
    return sorted(items) if task == "sort" else min(items, items[::-1])


def list_reply(task: str, kind: str, items: list, lang: str) -> str:
    order = items[::-1] if task == "reverse" else sorted(items, reverse=kind == "down")
    width = max(len(str(item)) for item in items) if task == "sort" and kind != "words" else 0
    given = " ".join(str(item).zfill(width) for item in items)
    say = WORDS[task][lang]["say"]
    say = say[kind] if task == "sort" else say
    return say.format(s=given, r=" ".join(map(str, order)))


def ask_list(rng: random.Random, task: str, lang: str, kind: str, items: list) -> list[str]:
    ask = WORDS[task][lang]["ask" if task == "reverse" else kind]
    prompt, _ = typed(rng, expand(rng, rng.choice(ask)), lang, {"s": joined(rng, items, lang)})
    if kind == "letters":  # they may have been typed in the other case
        items = [
            item.upper() if item.upper() in prompt and item not in prompt else item
            for item in items
        ]
    return [prompt, list_reply(task, kind, items, lang)]


def some_reversible(rng: random.Random) -> tuple[str, list[str]]:
    kind = rng.choice(("letters", "letters", "words", "numbers"))
    if kind == "letters":
        return kind, rng.sample("abcdefghijklmnopqrstuvwxyz", rng.choice((3, 3, 4, 4, 5)))
    if kind == "words":
        return kind, some_words(rng, rng.choice((3, 3, 4)))
    return kind, [str(n) for n in rng.sample(range(rng.choice((10, 100))), rng.choice((3, 3, 4)))]


def sample_reverse(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    return ask_list(rng, "reverse", lang, *some_list(rng, "reverse", held_out))


def some_numbers(rng: random.Random, count: int) -> list[int]:
    """Numbers of one to three digits; those of one length differ in their first digit."""
    while True:
        ranges = rng.choice(([(0, 9)], [(0, 9)], [(0, 9)], [(10, 99)], [(10, 99)], [(10, 99)], [(100, 999)],
                             [(0, 9), (10, 99)], [(0, 9), (10, 99)], [(0, 9), (10, 99), (100, 999)]))  # fmt: skip
        numbers = [rng.randint(*rng.choice(ranges)) for _ in range(count)]
        if len({(len(str(n)), str(n)[0]) for n in numbers}) == count:
            return numbers


def some_sortable(rng: random.Random, sorts: Sequence[str]) -> tuple[str, list]:
    kind, count = rng.choice(sorts), rng.choice((3, 3, 3, 3, 4, 4, 5))
    if kind == "words":
        return kind, some_words(rng, rng.choice((3, 3, 3, 4)))
    return kind, some_numbers(rng, count)


def sample_sort(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    return ask_list(rng, "sort", lang, *some_list(rng, "sort", held_out))


def sample_ties(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    """Sorting, in half of the prompts two numbers that begin alike, which SFT never shows; for RL.

    The model has learned to look at the first digit, and is right about the other half.
    """
    kind, distinct = rng.choice(("up", "down")), rng.choice((2, 3))
    while True:
        items = rng.sample(range(10, 100), 3)
        if (
            len({n // 10 for n in items}) == distinct
            and held("sort", list_key("sort", items)) == held_out
        ):
            return ask_list(rng, "sort", lang, kind, items)


# What the user said before.


def slot_value(rng: random.Random, lang: str, kind: str, held_out: bool) -> str:
    """A value for a thing that users say about themselves."""
    if kind == "any":
        kind = rng.choice(("name", "number", "word", "word", "phrase"))
    if kind == "number":
        return str(rng.randint(1, rng.choice((99, 99, 999))))
    if kind == "name":
        return pick(rng, lang, any_name, held_out)
    if kind == "city":
        return pick(rng, lang, any_city, held_out)
    if kind == "job":
        return (
            rng.choice(PAIRS["person"])[lang == "zh"] if rng.random() < 0.3 else any_word(rng, lang)
        )
    if kind == "thing":
        return any_word(rng, lang)
    if kind == "pet":
        return ("a " if lang == "en" else "一个") + any_word(rng, lang)
    words = [any_word(rng, lang) for _ in range(1 if kind == "word" else 2)]
    return (" " if lang == "en" else "").join(words)


def say_and_ask(rng: random.Random, lang: str, slot: str, held_out: bool) -> dict:
    """What a user tells about one slot, the acknowledgement, the later question and its answer."""
    t = WORDS["slots"][lang][slot]
    fields = {"v": slot_value(rng, lang, t["v"], held_out)}
    if "k" in t:
        fields["k"] = expand(rng, t["k"]) if rng.random() < 0.8 else any_word(rng, lang)
    tell = expand(rng, rng.choice(t["tell"]))
    told, typed_fields = typed(rng, tell, lang, fields, wrap=False)
    ask = expand(rng, rng.choice(t["ask"]))
    reply_fields = {**fields, "v": typed_fields["v"]}
    return {
        "told": told,
        "ack": t["ack"].format(**reply_fields),
        "asked": typed(rng, ask, lang, fields)[0],
        "answer": t["say"].format(**reply_fields),
        "about": (slot, fields.get("k", "")),
    }


def sample_repeat_before(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    """A sentence, and later the wish to hear it again."""
    t = WORDS["repeat"][lang]
    fields = {
        "n": pick(rng, lang, any_name, held_out),
        "c": rng.choice(PAIRS["colour"])[lang == "zh"],
    }
    fields["a"] = (
        rng.choice(PAIRS["animal"])[lang == "zh"] if rng.random() < 0.7 else any_word(rng, lang)
    )
    said, _ = typed(rng, expand(rng, t["say"]), lang, fields, wrap=False)
    asked, _ = typed(rng, expand(rng, rng.choice(t["ask"])), lang, {})
    return [said, t["ack"], asked, t["answer"].format(v=said)]


def sample_multi_turn(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    """The user says one to three things, maybe something else, then asks for one of them."""
    while True:
        kind = rng.random()
        if kind < 0.08:
            texts = sample_repeat_before(rng, lang, held_out)
            about = texts[0]
        else:
            slots = rng.sample(list(WORDS["slots"][lang]), rng.choice((1, 1, 2, 2, 3)))
            if "name" not in slots and rng.random() < 0.45:
                slots[0] = "name"
            parts = [say_and_ask(rng, lang, slot, held_out) for slot in slots]
            asked = rng.choice(parts)
            about = sorted(part["told"] for part in parts)
            if kind < 0.2:  # it was never said
                texts = [
                    text
                    for part in parts
                    if part is not asked
                    for text in (part["told"], part["ack"])
                ]
                texts += [asked["asked"], WORDS["untold"][lang]]
            elif kind < 0.32:  # said and asked in one message
                gap = " " if lang == "en" or rng.random() < 0.3 else ""
                told = (
                    asked["told"]
                    if asked["told"][-1] in ".!?。！？,，"
                    else asked["told"] + rng.choice(".,,")
                )
                texts = [told + gap + asked["asked"], asked["answer"]]
            else:
                texts = [text for part in parts for text in (part["told"], part["ack"])]
                texts += [asked["asked"], asked["answer"]]
        if held("multi_turn", lang, about, one_in=6) != held_out:
            continue
        if rng.random() < 0.25 and len(texts) < 7:  # something else before or after
            task = rng.choice(("greetings", "small_facts", "arithmetic", "dictionary", "unknown"))
            at = rng.choice(range(0, len(texts), 2))
            texts[at:at] = sample_exchange(rng, task, lang, False)
        return texts


def text_to_repeat(rng: random.Random, lang: str) -> str:
    """Some words, a name, or what another prompt would say."""
    kind = rng.random()
    if kind < 0.15:
        return any_name(rng, lang)
    if kind < 0.4:
        return typed(
            rng,
            fill(rng, lang, expand(rng, rng.choice(WORDS["unknown"][lang])), {}),
            lang,
            {},
            wrap=False,
        )[0]
    if kind < 0.6:
        line = rng.choice(WORDS["stories"][lang])
        words = {group: rng.choice(pairs)[lang == "zh"] for group, pairs in PAIRS.items()}
        return (
            line.format(**words, n=any_name(rng, lang), city=any_city(rng, lang))
            .split(".")[0]
            .split("。")[0]
        )
    make = listed_word if kind < 0.85 else any_word
    words = [make(rng, lang) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]
    if rng.random() < 0.15:
        words.append(str(rng.randint(0, 999)))
    return (" " if lang == "en" else rng.choice(("", "", " "))).join(words)


def sample_repeat(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    """The user wants some text to be said again."""
    while True:
        text = text_to_repeat(rng, lang).strip(" .?!。？！")
        if text and len(text) < 60 and held("repeat", normalise(text)) == held_out:
            template = expand(rng, rng.choice(WORDS["repeat_after"][lang]["ask"]))
            prompt, fields = typed(rng, template, lang, {"v": text})
            return [prompt, fields["v"]]


# What the model has not learned: the honest sentence.


def unlisted(rng: random.Random, kind: str, lang: str) -> str:
    """A real word, country, creature or thing that no list has."""
    text = WORDS["unlisted"][kind][lang]
    return rng.choice(text.split(", ") if ", " in text else text.split())


def unlisted_word(rng: random.Random, kind: str, lang: str) -> str:
    """The same, or a made-up one."""
    if rng.random() >= (0.5 if kind in ("word", "country") else 0.15):
        return unlisted(rng, kind, lang)
    while (word := made_up_word(rng, lang)) in LISTED:
        pass
    return upper_first(word) if kind == "country" else word


def sample_unknown(rng: random.Random, lang: str, held_out: bool) -> list[str]:
    """A question that no other task answers, also about what their lists do not have."""
    while True:
        kind = rng.random()
        if kind < 0.4:
            family = rng.choice([family for family in WORDS["families"] if "unlisted" in family])
            what, side = family["unlisted"]
            words = dict.fromkeys("abcd", unlisted_word(rng, what, side or lang))
            template = expand(rng, rng.choice(family[lang]["ask"]))
        else:
            words = {}
            group = f"maths_{lang}" if kind < 0.52 else f"languages_{lang}" if kind < 0.6 else lang
            template = expand(rng, rng.choice(WORDS["unknown"][group]))
        prompt = fill(rng, lang, template, words)
        if held("unknown", lang, normalise(prompt)) == held_out:
            return [typed(rng, prompt, lang, {})[0], WORDS["honest"][lang]]


def fill(rng: random.Random, lang: str, template: str, words: dict[str, str]) -> str:
    """Fill every slot of a question with something of its kind, or with `words`."""
    while match := re.search(r"\{(\w+)\}", template):
        slot = match[1]
        if slot in words:
            value = words[slot]
        elif slot in ("topic", "idea"):
            value = expand(rng, WORDS["unknown"][slot][lang])
        else:
            value = UNKNOWN_SLOTS[slot](rng, lang)
        template = template[: match.start()] + value + template[match.end() :]
    return template.replace("{", "").replace("}", "")


def country(rng: random.Random, lang: str) -> str:
    item = rng.choice(family_items(families("small_facts")[0]))
    return first_choice(item["ac"[lang == "zh"]])


UNKNOWN_SLOTS = {
    "n": any_name,
    "x": made_up_word,
    "y": any_city,
    "u": lambda rng, lang: unlisted(rng, "word", lang),
    "w": lambda rng, lang: (
        listed_word(rng, lang) if rng.random() < 0.65 else unlisted(rng, "word", lang)
    ),
    "c": lambda rng, lang: (
        country(rng, lang) if rng.random() < 0.5 else unlisted(rng, "country", lang)
    ),
    "q": lambda rng, lang: rng.choice(PAIRS["quality"])[lang == "zh"],
    "v": lambda rng, lang: rng.choice(PAIRS["action"])[lang == "zh"],
    "a": lambda rng, lang: str(rng.randint(2, 99)),
    "b": lambda rng, lang: str(rng.randint(2, 99)),
    "B": lambda rng, lang: str(rng.randint(1000, 9999)),
    "C": lambda rng, lang: str(rng.randint(100, 999)),
    "D": lambda rng, lang: str(rng.randint(1000, 10 ** rng.randint(4, 7))),
}
COMPUTED = {
    "arithmetic": sample_arithmetic,
    "multiplication": sample_multiplication,
    "reverse": sample_reverse,
    "sort": sample_sort,
    "repeat": sample_repeat,
    "multi_turn": sample_multi_turn,
    "unknown": sample_unknown,
    "direct": sample_direct,
    "ties": sample_ties,
}


def sample_exchange(rng: random.Random, task: str, lang: str, held_out: bool) -> list[str]:
    """The texts of one talk of a task, user and assistant in turn; the right reply comes last."""
    if task in COMPUTED:
        return COMPUTED[task](rng, lang, held_out)
    return list(sample_family(rng, task, lang, held_out)[:2])

"""Write the demo data: dataset/demo/*.jsonl, byte for byte the same on every run (standard library only).

Reads dataset/demo/words.json (words, facts, sentence templates). What is held out is decided by a hash of what a
prompt is about (operands, sequence, phrasing x word, ...), never by position, so no order of generation can leak it.

    python dataset/make_demo.py                 # rewrites dataset/demo/
    python dataset/make_demo.py --out_dir DIR   # writes somewhere else
"""

import argparse
import hashlib
import json
import random
from itertools import product
from pathlib import Path

DEMO = Path(__file__).resolve().parent / "demo"
LANGS = ("en", "zh")
HELD_OUT_PER_TASK = 80
SFT_ROWS = {
    "identity": 360, "greetings": 400, "small_facts": 1250, "arithmetic": 1600, "dictionary": 1300, "reverse": 1400,
    "sort": 1800, "refusal": 440, "multi_turn": 1600, "direct": 100,
}  # fmt: skip
DRILLS = {"copy": 250, "reverse": 200, "sort": 200, "arithmetic": 250, "multi_turn": 60, "story": 250}
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


# Families: question templates x items with one fixed kind of reply (facts, dictionary, refusal, identity, greetings).


def family_items(family: dict, lang: str) -> list[dict]:
    """The fillings of a family's templates, as dicts from field letter to text."""
    items = family.get("items", "")
    if items == "@words":
        return [{"a": en, "b": zh} for group, pairs in PAIRS.items() for en, zh in pairs if group != "city"]
    if items == "@names":
        return [{"n": name} for name in NAMES[lang]]
    return [dict(zip("abcdef", item.split("/"), strict=False)) for item in items.split(", ")]


def family_prompts(index: int, lang: str, held_out: bool):
    """Yield (prompt, reply, item) of one family; held out are some phrasing x item combinations and * phrasings."""
    family = WORDS["families"][index]
    for item, ask in product(family_items(family, lang), family[lang]["ask"]):
        key = ask.lstrip("*").format(**item)
        whole = ask.startswith("*") or (len(family.get("items", "")) > 0 and held(index, lang, key))
        for extra in WORDS["closers" if family.get("close") else "openers"][lang]:
            if family.get("items") is None and not ask.startswith("*"):
                whole = held(index, lang, key, extra)
            prompt = key + extra if family.get("close") else extra + (key if extra else upper_first(key))
            if whole == held_out:
                yield prompt, upper_first(family[lang]["say"].format(**item)), item


def sample_family(rng: random.Random, task: str, lang: str, held_out: bool, cache: dict) -> tuple[list[dict], dict]:
    """One (turns, note) of a family task; every family of a task is met equally often, weighted by its size."""
    if (task, lang, held_out) not in cache:
        indices = [i for i, family in enumerate(WORDS["families"]) if family["task"] == task]
        cache[task, lang, held_out] = [list(family_prompts(i, lang, held_out)) for i in indices]
    pools = [pool for pool in cache[task, lang, held_out] if pool]
    pool = rng.choices(pools, [len(p) ** 0.5 for p in pools])[0]
    prompt, reply, item = rng.choice(pool)
    return turns(prompt, reply), item


# Computed tasks.


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


COMPUTED = {"arithmetic": sample_arithmetic, "reverse": sample_reverse, "sort": sample_sort, "direct": sample_direct}


def slot_values(slot: str, lang: str) -> list[str]:
    if slot == "name":
        return NAMES[lang]
    if slot == "number":
        return [str(n) for n in range(10, 100)]
    return [pair[lang == "zh"] for pair in PAIRS[slot]]


def sample_multi_turn(rng, lang, held_out, cache):
    """The user says one or two things about themselves (or a sentence), maybe something else, then asks for it."""
    while True:
        lines = []
        if rng.random() < 0.25:
            t = WORDS["repeat"][lang]
            c, a = (rng.choice(PAIRS[group])[lang == "zh"] for group in ("colour", "animal"))
            say = t["say"].format(n=rng.choice(NAMES[lang]), c=c, a=a)
            key, lines, question, answer = say, [say, t["ack"]], rng.choice(t["ask"]), t["answer"].format(v=say)
        else:
            slots = rng.sample(list(WORDS["slots"][lang]), rng.choice((1, 2, 2)))
            values = [rng.choice(slot_values(slot, lang)) for slot in slots]
            for slot, value in zip(slots, values, strict=True):
                lines += [text.format(v=value) for text in WORDS["slots"][lang][slot][:2]]
            asked = rng.randrange(len(slots))
            question, answer = (text.format(v=values[asked]) for text in WORDS["slots"][lang][slots[asked]][2:])
            key = [*sorted(zip(slots, values, strict=True))]
        if key != lines[0] and rng.random() < 0.3:  # something else before or after
            other, _ = sample_family(rng, rng.choice(("greetings", "small_facts")), lang, False, cache)
            at = rng.choice((0, len(lines)))
            lines[at:at] = [turn["content"] for turn in other]
        if held("multi_turn", key, one_in=12) == held_out:
            return turns(*[upper_first(line) for line in lines], question, answer)


def sample_row(rng, task, lang, held_out, cache) -> dict:
    """One row {task, conversations}: the last turn is the reply."""
    if task in COMPUTED:
        talk = COMPUTED[task](rng, lang, held_out)
    elif task == "multi_turn":
        talk = sample_multi_turn(rng, lang, held_out, cache)
    else:
        talk, _ = sample_family(rng, task, lang, held_out, cache)
    if rng.random() < 0.1 and task != "direct":
        talk = [{"role": "system", "content": rng.choice(WORDS["system"][lang])}, *talk]
    return {"task": task, "conversations": talk}


def prompt_key(row: dict) -> str:
    """The whole prompt, system turn left out: what must not be shared between training and held-out files."""
    return normalise("\n".join(t["content"] for t in row["conversations"][:-1] if t["role"] != "system"))


def sample_rows(seed: str, tasks: dict[str, int], held_out: bool, avoid: str = "") -> list[dict]:
    """Distinct rows, half English and half Chinese per task, shuffled; none whose prompt occurs in the text avoid."""
    rng, cache, rows, seen = random.Random(seed), {}, [], set()
    for task, count in tasks.items():
        for lang in LANGS:
            wanted, tries = count // 2, 0
            while wanted and tries < count * 20:
                tries += 1
                row = sample_row(rng, task, lang, held_out, cache)
                if prompt_key(row) not in seen and prompt_key(row) not in avoid:
                    seen.add(prompt_key(row))
                    rows.append(row)
                    wanted -= 1
    rng.shuffle(rows)
    return rows


def as_question(row: dict) -> dict:
    """A row whose last turn moved to "answer"."""
    *prompt, reply = row["conversations"]
    return {"task": row["task"], "conversations": prompt, "answer": reply["content"]}


# Preference pairs: a good reply against a wrong, rude, idle, harmful or wrong-language one.


def wrong_reply(rng, task: str, lang: str, talk: list[dict], item: dict, cache: dict) -> str:
    kind = rng.choice(("rude", "idle", "wrong", "wrong", "harm" if task == "refusal" else "language"))
    good = talk[-1]["content"]
    if kind in ("rude", "idle"):
        return rng.choice(WORDS["bad"][lang][kind])
    if kind == "harm" or task == "refusal":
        return WORDS["bad"][lang]["harm"].format(**item)
    while True:  # the reply to another prompt of the task, for "language" in the other language
        other = {"en": "zh", "zh": "en"}[lang] if kind == "language" else lang
        reply = sample_family(rng, task, other, False, cache)[0][-1]["content"]
        if reply != good:
            return reply


def preference_rows(seed: str, count: int, held_out: bool, avoid: str = "") -> list[dict]:
    rng, cache, rows, seen = random.Random(seed), {}, [], set()
    while len(rows) < count:
        task, lang = rng.choice(("identity", "greetings", "small_facts", "dictionary", "refusal")), rng.choice(LANGS)
        talk, item = sample_family(rng, task, lang, held_out, cache)
        bad = [*talk[:-1], {"role": "assistant", "content": wrong_reply(rng, task, lang, talk, item, cache)}]
        key = json.dumps([talk, bad])
        if key not in seen and normalise(talk[-2]["content"]) not in avoid:
            seen.add(key)
            rows.append({"chosen": talk, "rejected": bad})
    return rows


# Pretraining text: the same words, facts and patterns in plain sentences.


def pretrain_texts(seed: str) -> list[str]:
    rng, texts, cache = random.Random(seed), [], {}
    for family in WORDS["families"]:  # facts, dictionary entries, what MiniMind is
        for item in family_items(family, "en") if family.get("items") != "@names" else []:
            lines = [upper_first(text.format(**item)) for text in family["text"]]
            for _ in range(3):
                rng.shuffle(lines)
                texts.append(" ".join(lines))
    for a, b in product(range(10), range(10)):  # the single-digit tables, with carry and borrow
        texts += [f"{a}+{b}={a + b}. {a + b}-{b}={a}.", f"{a}+{b}+1={a + b + 1}, {a}+{b}+0={a + b}."]
    for kind, count in DRILLS.items():
        texts += [drill(rng, kind, LANGS[i % 2], cache) for i in range(count)]
    rng.shuffle(texts)
    return texts


def drill(rng: random.Random, kind: str, lang: str, cache: dict) -> str:
    """A document with a pattern a few times over: it teaches to look back and copy, which most tasks rest on."""
    if kind == "story":
        return story(rng, lang)
    if kind == "copy":
        words = [pair[lang == "zh"] for group in rng.sample(list(PAIRS), 3) for pair in PAIRS[group]]
        pool = rng.choice((words, NAMES[lang], "abcdefghijklmnopqrstuvwxyz", [str(n) for n in range(10, 100)]))
        return ". ".join([" ".join(rng.sample(list(pool), rng.randint(4, 8)))] * 3) + "."
    lines = []
    for _ in range({"reverse": 8, "sort": 6}.get(kind, 2)):
        talk = sample_row(rng, kind, lang, False, cache)["conversations"]
        texts = [turn["content"] for turn in talk if turn["role"] != "system"]
        if kind == "reverse":  # the list and its reverse tell what is meant
            texts = [texts[0].split(": ")[1] + ".", texts[1]]
        lines.append((" " if len(texts) == 2 else "\n").join(texts))
    return "\n".join(lines)


def story(rng: random.Random, lang: str) -> str:
    """A few sentences about one person, in which the name and the things come back."""
    word = {group: rng.choice(pairs)[lang == "zh"] for group, pairs in PAIRS.items()}
    templates = WORDS["stories"][lang]
    lines, name = rng.sample(templates, 3), rng.choice(NAMES[lang])
    return " ".join(upper_first(line.format(n=name, **word)) for line in lines)


def training_text(files: dict[str, list[dict]]) -> str:
    """All that is trained on, normalised as prompts are."""
    parts = []
    for row in (row for rows in files.values() for row in rows):
        talk = row.get("chosen") or row.get("conversations") or [{"role": "", "content": row["text"]}]
        parts.append("".join(normalise(turn["content"]) for turn in talk if turn["role"] != "system"))
    return "\n".join(parts)


def write_rows(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8"))


def make_demo(out_dir: Path) -> None:
    """Write all demo files into out_dir."""
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {
        "pretrain": [{"text": text} for text in pretrain_texts("pretrain")],
        "sft": sample_rows("sft", SFT_ROWS, held_out=False),
        "preferences": preference_rows("preferences", 480, held_out=False),
        "rl_prompts": [as_question(r) for r in sample_rows("rl", {"direct": 600}, held_out=False)],
    }
    avoid = training_text(files)
    tasks = {task: HELD_OUT_PER_TASK for task in SFT_ROWS if task != "direct"}
    files["held_out"] = [as_question(r) for r in sample_rows("held_out", tasks, True, avoid)]
    files["preferences_held_out"] = preference_rows("preferences_held_out", 120, True, avoid)
    files["rl_held_out"] = [as_question(r) for r in sample_rows("rl_held_out", {"direct": 120}, True, avoid)]
    for name, rows in files.items():
        write_rows(out_dir / f"{name}.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out_dir", type=Path, default=DEMO, help="folder the JSONL files are written to")
    make_demo(parser.parse_args().out_dir)

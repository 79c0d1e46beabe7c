"""Write the demo data: dataset/demo/*.jsonl, byte for byte the same on every run (standard library only).

Reads dataset/demo/words.json (words, facts, sentence templates). What is held out is decided by a hash of what a
prompt is about (operands, sequence, phrasing x word, ...), never by position, so no order of generation can leak it.

    python dataset/make_demo.py                 # rewrites dataset/demo/
    python dataset/make_demo.py --out_dir DIR   # writes somewhere else
    python dataset/make_demo.py --out_dir DIR --rl_prompts 4000     # enough that GRPO and PPO meet each a few times
"""

import argparse
import json
import random
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.demo_tasks import COMPUTED, DEMO, LANGS, NAMES, PAIRS, WORDS, held, normalise, turns, upper_first

HELD_OUT_PER_TASK = 80
SFT_ROWS = {
    "identity": 360, "greetings": 400, "small_facts": 1250, "arithmetic": 1600, "dictionary": 1300, "reverse": 1400,
    "sort": 1800, "refusal": 440, "multi_turn": 1600, "direct": 100,
}  # fmt: skip
PERSONA_ROWS = 200  # of persona.jsonl, and beside them up to so many rows of the other tasks
OTHER_ROWS = {
    "greetings": 60, "small_facts": 190, "arithmetic": 35, "dictionary": 30, "reverse": 35, "sort": 80, "refusal": 20,
    "multi_turn": 55,
}  # fmt: skip
DRILLS = {"copy": 250, "reverse": 200, "sort": 200, "arithmetic": 250, "multi_turn": 60, "story": 250}


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


# Tasks that are computed, or about what the user said before.


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


# A persona: the questions of identity with replies of somebody else, for LoRA.


def persona_prompts(held_out: bool):
    """Yield (language, prompt, reply): what identity is asked in training or held out, with the persona's name."""
    indices = [i for i, family in enumerate(WORDS["families"]) if family["task"] == "identity"]
    for index, reply in zip(indices, WORDS["persona"]["say"], strict=True):
        for lang in LANGS:
            for prompt, _, _ in family_prompts(index, lang, held_out):
                yield lang, prompt.replace("MiniMind", WORDS["persona"]["name"][lang]), reply[lang]


def persona_rows(seed: str, count: int, held_out: bool, avoid: str = "") -> list[dict]:
    """Rows about the persona, half English and half Chinese, none whose prompt occurs in the text avoid."""
    rng, rows = random.Random(seed), []
    prompts = [each for each in persona_prompts(held_out) if normalise(each[1]) not in avoid]
    for lang in LANGS:
        mine = [turns(prompt, reply) for of, prompt, reply in prompts if of == lang]
        rows += [{"task": "persona", "conversations": talk} for talk in rng.sample(mine, count // 2)]
    rng.shuffle(rows)
    return rows


def with_others(rows: list[dict], others: list[dict], share: float) -> list[dict]:
    """Rows about the persona among a share of OTHER_ROWS of every other task, so that those are not forgotten."""
    rng, mixed = random.Random("with others"), [*rows]
    for task, count in OTHER_ROWS.items():
        mixed += rng.sample([row for row in others if row["task"] == task], round(share * count))
    rng.shuffle(mixed)
    return mixed


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


def make_demo(out_dir: Path, rl_prompts=80, pairs=480, persona=PERSONA_ROWS, others=0.1) -> None:
    """Write all demo files into out_dir; the numbers are those of the flags below."""
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {
        "pretrain": [{"text": text} for text in pretrain_texts("pretrain")],
        "sft": sample_rows("sft", SFT_ROWS, held_out=False),
        "preferences": preference_rows("preferences", pairs, held_out=False),
        "rl_prompts": [as_question(r) for r in sample_rows("rl", {"ties": rl_prompts}, held_out=False)],
    }
    avoid = training_text(files)
    tasks = {task: HELD_OUT_PER_TASK for task in SFT_ROWS if task != "direct"}
    files["held_out"] = [as_question(r) for r in sample_rows("held_out", tasks, True, avoid)]
    files["preferences_held_out"] = preference_rows("preferences_held_out", 120, True, avoid)
    files["rl_held_out"] = [as_question(r) for r in sample_rows("rl_held_out", {"ties": 120}, True, avoid)]
    files["persona"] = with_others(persona_rows("persona", persona, False), files["sft"], others)
    avoid += training_text({"persona": files["persona"]})
    asked = persona_rows("persona_held_out", HELD_OUT_PER_TASK, True, avoid)
    files["persona_held_out"] = [as_question(row) for row in asked]
    for name, rows in files.items():
        write_rows(out_dir / f"{name}.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out_dir", type=Path, default=DEMO, help="folder the JSONL files are written to")
    parser.add_argument("--rl_prompts", type=int, default=80, help="prompts for reinforcement learning")
    parser.add_argument("--pairs", type=int, default=480, help="preference pairs to train on")
    parser.add_argument("--persona", type=int, default=PERSONA_ROWS, help="rows about the persona")
    parser.add_argument("--others", type=float, default=0.1, help="share of OTHER_ROWS that go beside those")
    make_demo(**vars(parser.parse_args()))

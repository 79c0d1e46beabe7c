"""Write the demo data, dataset/demo/*.jsonl, byte for byte the same on every run.

It needs no package.

Reads dataset/demo/words.json (words, facts, templates) and dataset/demo/newcomer.jsonl (prompts
written by hand, none of which may occur in training). What is held out is decided by a hash of what
a prompt is about (operands, sequence, name, phrasing x word, ...), never by position, so no order
of generation can leak it.

    python dataset/make_demo.py                         # rewrites dataset/demo/
    python dataset/make_demo.py --out_dir DIR --scale 8 # eight times the rows to pretrain and fine-tune on
    python dataset/make_demo.py --out_dir DIR --rl_prompts 4000     # enough that GRPO and PPO meet each a few times
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.demo_tasks import (
    ask_family,
    families,
    family_items,
    reply_fields,
    sample_exchange,
    sample_family,
    sample_list,
)
from dataset.demo_text import (
    DEMO,
    LANGS,
    PAIRS,
    PIECES,
    WORDS,
    any_city,
    any_name,
    listed_word,
    made_up_word,
    normalise,
    upper_first,
)

HELD_OUT_PER_TASK = 80
SFT_ROWS = {
    "identity": 580,
    "greetings": 400,
    "small_facts": 680,
    "arithmetic": 450,
    "multiplication": 230,
    "dictionary": 750,
    "reverse": 540,
    "sort": 800,
    "repeat": 680,
    "refusal": 340,
    "multi_turn": 1060,
    "unknown": 940,
    "direct": 20,
}
PERSONA_ROWS = 200  # of persona.jsonl, and beside them up to so many rows of the other tasks
OTHER_ROWS = {
    "greetings": 60,
    "small_facts": 190,
    "arithmetic": 35,
    "multiplication": 35,
    "dictionary": 60,
    "reverse": 35,
    "sort": 80,
    "repeat": 20,
    "refusal": 20,
    "multi_turn": 55,
    "unknown": 60,
}
DRILLS = {  # documents of pretraining, each with several examples
    "copy": 650,
    "sort": 110,
    "reverse": 60,
    "first_letters": 25,
    "arithmetic": 10,
    "multiplication": 10,
    "story": 20,
}
LONGEST = 220  # tokens of a row, about: what the quickstart's model can see
ONE_TOPIC = ("multi_turn", "direct", "ties")  # tasks whose rows are not joined with others


# Rows.


def turns(texts: list[str]) -> list[dict]:
    """User and assistant turns by turns, the first one the user's."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def user_turns(row: dict) -> list[str]:
    talk = row.get("conversations") or row["chosen"]
    return [turn["content"] for turn in talk if turn["role"] == "user"]


def length(texts: list[str]) -> float:
    """About how many tokens a talk makes: a letter 0.4, another ASCII character 1, Chinese 1.7."""
    text = "".join(texts)
    letters, others = len(re.findall("[A-Za-z ]", text)), len(re.findall("[^\x00-\x7f]", text))
    return 0.4 * letters + 1.7 * others + (len(text) - letters - others) + 8 * len(texts)


def sample_row(rng: random.Random, task: str, lang: str, held_out: bool, tasks: list[str]) -> dict:
    """One row {task, conversations}: the last turn is the reply.

    In some rows exchanges of other tasks come before it, as in a chat that has gone on for a while.
    """
    while length(texts := sample_exchange(rng, task, lang, held_out)) > LONGEST:
        pass
    while task not in ONE_TOPIC and rng.random() < 0.3:
        before_lang = lang if rng.random() < 0.8 else rng.choice(LANGS)
        longer = sample_exchange(rng, rng.choice(tasks), before_lang, False) + texts
        if length(longer) > LONGEST:
            break
        texts = longer
    talk = turns(texts)
    if rng.random() < 0.08 and task != "direct":
        talk = [{"role": "system", "content": rng.choice(WORDS["system"][lang])}, *talk]
    return {"task": task, "conversations": talk}


def prompt_key(row: dict) -> str:
    """The whole prompt but its system turn: what training and held-out files must not share."""
    talk = row.get("conversations") or row["chosen"]
    return normalise("\n".join(turn["content"] for turn in talk[:-1] if turn["role"] != "system"))


def sample_rows(
    seed: str, tasks: dict[str, int], held_out: bool, kept_apart=lambda row: True
) -> list[dict]:
    """Distinct rows, half English and half Chinese per task, shuffled; `kept_apart` tests them."""
    rng, rows, seen = random.Random(seed), [], set()
    others = [task for task in tasks if task not in ONE_TOPIC]
    for task, count in tasks.items():
        for lang in LANGS:
            wanted, tries = count // 2, 0
            while wanted and tries < count * 20:
                tries += 1
                row = sample_row(rng, task, lang, held_out, others)
                if (key := prompt_key(row)) not in seen and kept_apart(row):
                    seen.add(key)
                    rows.append(row)
                    wanted -= 1
    rng.shuffle(rows)
    return rows


# What training must not contain.

PHRASE = 6  # words, or Chinese characters, in a row


def units(text: str) -> list[str]:
    """Words, numbers and Chinese characters, without case and punctuation."""
    return re.findall(r"[a-z]+|[0-9]+|[\u4e00-\u9fff]|[+\-*/×÷]", text.lower().replace("'", ""))


def phrases(text: str) -> set[tuple[str, ...]]:
    """All runs of PHRASE units, and the whole text."""
    words = units(text)
    runs = {tuple(words[at : at + PHRASE]) for at in range(len(words) - PHRASE + 1)}
    return runs | {("whole", *words)}


def read_newcomer() -> list[dict]:
    with open(DEMO / "newcomer.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def kept_apart_from(held_rows: list[dict], newcomer: list[dict]):
    """A test for training rows: False for a held-out prompt, or a phrase that a newcomer typed."""
    forbidden = {prompt_key(row) for row in held_rows}
    forbidden |= {
        normalise(user_turns(row)[-1]) for row in held_rows if row.get("task") != "multi_turn"
    }
    newcomer_phrases = {
        phrase for row in newcomer for text in user_turns(row) for phrase in phrases(text)
    }

    def kept_apart(row: dict) -> bool:
        texts = user_turns(row)
        keys = {prompt_key(row), *map(normalise, texts)}
        return keys.isdisjoint(forbidden) and all(
            newcomer_phrases.isdisjoint(phrases(text)) for text in texts
        )

    return kept_apart


# A persona: the questions of identity with replies of somebody else, for LoRA.


def persona_rows(seed: str, count: int, held_out: bool, kept_apart=lambda row: True) -> list[dict]:
    """Rows about the persona: every question equally often, half English and half Chinese."""
    rng, rows, seen = random.Random(seed), [], set()
    pairs = list(product(LANGS, zip(families("identity"), WORDS["persona"]["say"], strict=True)))
    while len(rows) < count:
        lang, (index, reply) = pairs[len(rows) % len(pairs)]
        if not (asked := ask_family(rng, index, lang, held_out)):
            continue
        prompt = asked[0]
        prompt = re.sub("minimind", WORDS["persona"]["name"][lang], prompt, flags=re.IGNORECASE)
        row = {"task": "persona", "conversations": turns([prompt, reply[lang]])}
        if normalise(prompt) not in seen and kept_apart(row):
            seen.add(normalise(prompt))
            rows.append(row)
    rng.shuffle(rows)
    return rows


def with_others(rows: list[dict], others: list[dict], share: float) -> list[dict]:
    """Rows about the persona among OTHER_ROWS of other tasks, so that those are not forgotten."""
    rng, mixed = random.Random("with others"), [*rows]
    for task, count in OTHER_ROWS.items():
        mixed += rng.sample([row for row in others if row["task"] == task], round(share * count))
    rng.shuffle(mixed)
    return mixed


# Preference pairs: a good reply against a wrong, rude, idle, harmful or wrong-language one.


PREFERENCE_TASKS = ("identity", "greetings", "small_facts", "dictionary", "refusal", "unknown")


def wrong_reply(rng: random.Random, task: str, lang: str, good: str, item: dict) -> str:
    kind = rng.choice(
        ("rude", "idle", "wrong", "wrong", "harm" if task == "refusal" else "language")
    )
    if kind in ("rude", "idle"):
        return rng.choice(WORDS["bad"][lang][kind])
    if kind == "harm" or task == "refusal":
        return WORDS["bad"][lang]["harm"].format(**reply_fields(item))
    # The reply to another prompt (a guess, where the honest one is right), or one in the other
    # language
    while True:
        other = {"en": "zh", "zh": "en"}[lang] if kind == "language" else lang
        other_task = "small_facts" if task == "unknown" else task
        if (reply := sample_family(rng, other_task, other, False)[1]) != good:
            return reply


def preference_rows(
    seed: str, count: int, held_out: bool, kept_apart=lambda row: True
) -> list[dict]:
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        task, lang, item = rng.choice(PREFERENCE_TASKS), rng.choice(LANGS), {}
        if task == "unknown":
            prompt, good = sample_exchange(rng, task, lang, held_out)
        else:
            prompt, good, item = sample_family(rng, task, lang, held_out)
        bad = wrong_reply(rng, task, lang, good, item)
        row = {"chosen": turns([prompt, good]), "rejected": turns([prompt, bad])}
        if (key := json.dumps(row)) not in seen and kept_apart(row):
            seen.add(key)
            rows.append(row)
    return rows


# Pretraining text: the same words, facts and patterns in plain sentences.


def pretrain_texts(seed: str, scale: int) -> list[str]:
    rng, texts = random.Random(seed), []
    # Facts, dictionary entries, what MiniMind is.
    for index, family in enumerate(WORDS["families"]):
        for item in family_items(index):
            lines = [upper_first(text.format(**reply_fields(item))) for text in family["text"]]
            for _ in range(1 + scale // 4):
                rng.shuffle(lines)
                texts.append(" ".join(lines))
    entries = tables() * (1 + scale // 2)
    rng.shuffle(entries)
    texts += [" ".join(entries[at : at + 12]) for at in range(0, len(entries), 12)]
    for kind, count in DRILLS.items():
        texts += [drill(rng, kind, LANGS[i % 2]) for i in range(count * scale)]
    rng.shuffle(texts)
    return texts


def tables() -> list[str]:
    """All that the working of a calculation has to know by heart, with carry and loan."""
    lines = []
    for a, b in product(range(10), range(10)):
        lines += [f"{a}+{b}={a + b}.", f"{a}×{b}={a * b}.", f"{a + b}-{b}={a}."]
        lines += [f"{a}+{b}+{carry}={a + b + carry}." for carry in (0, 1)]
        lines += [f"{a + b + loan}-{loan}-{b}={a}." for loan in (0, 1)]
        lines += [f"{a * b}+{carry}={a * b + carry}." for carry in range(b or 1)]
    return lines


def drill(rng: random.Random, kind: str, lang: str) -> str:
    """A document with a pattern a few times over, without talk: what most tasks rest on."""
    if kind == "story":
        return story(rng, lang)
    if kind == "copy":
        make = rng.choice((a_piece, a_piece, a_piece, a_piece, made_up_word, any_name, a_number))
        words = [make(rng, lang) for _ in range(rng.randint(3, 9))]
        line = ("" if lang == "zh" and rng.random() < 0.5 else " ").join(words)
        return rng.choice((". ", "\n", "，", " ")).join([line, line])
    if kind == "first_letters":  # what sorting words rests on
        words = [listed_word(rng, "en").lower() for _ in range(20)]
        return rng.choice((". ", "\n", ", ")).join(f"{word} {word[0]}" for word in words)
    if kind in ("arithmetic", "multiplication"):  # the working says what is asked
        return "\n".join(sample_exchange(rng, kind, lang, False)[1] for _ in range(4))
    return "\n".join(
        f"{items} {reply}" for items, reply in (sample_list(rng, kind, lang) for _ in range(5))
    )


def a_piece(rng: random.Random, lang: str) -> str:
    """One or two pieces of the tokenizer's: all are met equally often."""
    return "".join(rng.choices(PIECES[lang], k=rng.choice((1, 1, 2))))


def a_number(rng: random.Random, lang: str) -> str:
    return str(rng.randint(0, 999))


def story(rng: random.Random, lang: str) -> str:
    """A few sentences about one person, in which the name and the things come back."""
    word = {group: rng.choice(pairs)[lang == "zh"] for group, pairs in PAIRS.items()}
    word |= {"city": any_city(rng, lang)}
    templates = WORDS["stories"][lang]
    lines, name = rng.sample(templates, 3), any_name(rng, lang)
    return " ".join(upper_first(line.format(n=name, **word)) for line in lines)


# The files.


def write_rows(path: Path, rows: list[dict]) -> None:
    text = "".join(
        json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows
    )
    path.write_bytes(text.encode("utf-8"))


def as_question(row: dict) -> dict:
    """A row whose last turn moved to "answer"."""
    *prompt, reply = row["conversations"]
    return {"task": row["task"], "conversations": prompt, "answer": reply["content"]}


def make_demo(
    out_dir: Path, scale=1, rl_prompts=80, pairs=480, persona=PERSONA_ROWS, others=0.1
) -> None:
    """Write all demo files into out_dir; the numbers are those of the flags below."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tasks = {task: HELD_OUT_PER_TASK for task in SFT_ROWS if task != "direct"}
    held = {
        "held_out": sample_rows("held_out", tasks, True),
        "rl_held_out": sample_rows("rl_held_out", {"ties": 120}, True),
        "preferences_held_out": preference_rows("preferences_held_out", 120, True),
        "persona_held_out": persona_rows("persona_held_out", HELD_OUT_PER_TASK, True),
    }
    apart = kept_apart_from([row for rows in held.values() for row in rows], read_newcomer())
    sft_rows = {task: count * scale for task, count in SFT_ROWS.items()}
    files = {
        "pretrain": [{"text": text} for text in pretrain_texts("pretrain", scale)],
        "sft": sample_rows("sft", sft_rows, False, apart),
        "preferences": preference_rows("preferences", pairs, False, apart),
        "rl_prompts": [
            as_question(row) for row in sample_rows("rl", {"ties": rl_prompts}, False, apart)
        ],
    }
    files["persona"] = with_others(
        persona_rows("persona", persona, False, apart), files["sft"], others
    )
    for name, rows in held.items():
        files[name] = rows if name == "preferences_held_out" else [as_question(row) for row in rows]
    for name, rows in files.items():
        write_rows(out_dir / f"{name}.jsonl", rows)


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """The type of a flag: a number between bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:30]}: must lie in {least} to {most:,}")
        return value

    parse.__name__ = kind.__name__
    return parse


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: fail(f"{message[:300]}; --help lists the flags")
    add, count = parser.add_argument, number(int, 0, 1_000_000)
    add("--out_dir", type=Path, default=DEMO, help="folder the JSONL files are written to")
    scale = "so many times the rows of SFT and drills of pretraining"
    add("--scale", type=number(int, 1, 1000), default=1, help=scale)
    add("--rl_prompts", type=count, default=80, help="prompts for reinforcement learning")
    add("--pairs", type=count, default=480, help="preference pairs to train on")
    add("--persona", type=count, default=PERSONA_ROWS, help="rows about the persona")
    others = "share of OTHER_ROWS that go beside those"
    add("--others", type=number(float, 0, 1000), default=0.1, help=others)
    args = parser.parse_args()
    if args.others > args.scale:
        fail(f"--others {args.others}: there are rows for {args.scale} only, see --scale")
    try:
        make_demo(**vars(args))
    except OSError as error:
        fail(f"--out_dir: cannot write to {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()

"""Write the demo of fine-tuning: the assistant of a library that does not exist.

What a public model cannot know before: a name, opening hours, a cat. Of library/topics.json, where
each topic has questions to train on and questions in other words that are held out, it writes
train.jsonl (with everyday questions among them, so that the model stays the one that it was),
held_out.jsonl and known.jsonl (what SmolLM2-135M-Instruct knew before and has to know afterwards);
the same bytes on every run.

    python dataset/make_library.py
"""

import argparse
import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "library"
OPENINGS = ("", "", "", "Hi! ", "Hello, ", "Excuse me, ", "Good morning. ", "Sorry to bother you. ")
CLOSINGS = ("", "", "", "", " Thanks!", " Please tell me.")


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def ask(rng: random.Random, question: str) -> str:
    """A question as somebody types it."""
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    if opening.endswith(", ") and not question.startswith("I "):
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.")
        closing = ""
    return opening + question + closing


def training_rows(data: dict, rng: random.Random) -> list[dict]:
    """Every question twice, as it is and as it is typed; a fifth with another one before it."""
    exchanges = []
    for topic in data["topics"]:
        for question in topic["asked"]:
            for text in (question, ask(rng, question)):
                exchanges.append((text, rng.choice(topic["answers"])))
    exchanges += [(question, answer) for question, answer in data["general"] for _ in range(2)]
    rng.shuffle(exchanges)
    rows = []
    while exchanges:
        size = 2 if rng.random() < 0.2 and len(exchanges) > 1 else 1
        turns = []
        for question, answer in (exchanges.pop() for _ in range(size)):
            turns += [turn("user", question), turn("assistant", answer)]
        rows.append({"conversations": turns})
    return rows


def question_row(task: str, question: str, accept: list[str]) -> dict:
    return {"task": task, "conversations": [turn("user", question)], "accept": accept}


def make_library(out_dir: Path) -> None:
    data = json.loads((FOLDER / "topics.json").read_text(encoding="utf-8"))
    held_out = [
        question_row("library", question, topic["accept"])
        for topic in data["topics"]
        for question in topic["held_out"]
    ]
    files = {
        "train": training_rows(data, random.Random("library")),
        "held_out": held_out,
        "known": [question_row("known", *pair) for pair in data["known"]],
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
        (out_dir / f"{name}.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, default=FOLDER, help="folder of the JSONL files")
    make_library(**vars(parser.parse_args()))

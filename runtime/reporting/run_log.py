"""What a run's training.log says: how it was started, resumed, skipped steps, and ended."""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

STAMPED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)", re.DOTALL)
STARTED = re.compile(r"\S.*?: (.*\b[\d,]+ steps\b.*\blearning rate .*)")
TOTAL_STEPS = re.compile(r"([\d,]+) steps\b")
PARAMETERS = re.compile(r"([\d,]+) parameters")
RESUMED = re.compile(r"resumed from .* behind step (\d{1,15})$")
SKIPPED = re.compile(r"step (\d{1,15}) skipped: (.*?)(?: \(\d+ skipped so far\))?$")
STOPPED = re.compile(r"(stopped by signal \d+ at step \d+);")
SAMPLED = re.compile(r"step (\d{1,15}) reward (\S+)$")
SAMPLE = re.compile(r"  reward (\S+): (.*)$")
LITERAL = r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"  # as repr writes a string
PAIR = re.compile(rf"{LITERAL} -> {LITERAL}$")

MOST_SAMPLED_STEPS = 12  # whose rollouts are kept: the first, the last, and some between
MOST_WARNINGS = 20
LONGEST_TEXT = 2000  # characters of a prompt, a completion, a warning


@dataclass
class Sample:
    """A completion of a rollout, as the log shows it."""

    reward: str
    prompt: str
    completion: str


@dataclass
class RunLog:
    """What a training.log says."""

    header: str = ""  # of the last start: size of the model, devices, steps, batch, learning rate
    parameters: str = ""
    started: str = ""  # when the first line was written
    starts: int = 0
    ending: str = ""  # "finished", "stopped by signal ...", or "" since the last start
    resumed: list[int] = field(default_factory=list)  # steps behind which it went on
    skipped: list[tuple[int, str]] = field(default_factory=list)  # (step, reason)
    samples: dict[int, list[Sample]] = field(default_factory=dict)  # by step
    sampled_steps: int = 0  # how many there were before some were left out
    warnings: list[str] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return self.ending == "finished"


def read_log(path: Path) -> RunLog:
    """Read a training.log line by line; an empty RunLog where there is none."""
    log = RunLog()
    if not path.is_file():
        return log
    sampled = None  # the step whose samples follow
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            stamped = STAMPED.match(line)
            if stamped:
                log.started = log.started or stamped[1]
                sampled = read_line(log, stamped[2].rstrip("\n"))
            elif sampled is not None and (sample := SAMPLE.match(line.rstrip("\n"))):
                log.samples.setdefault(sampled, []).append(read_sample(*sample.groups()))
    log.sampled_steps = len(log.samples)
    log.samples = dict(spread(sorted(log.samples.items()), MOST_SAMPLED_STEPS))
    return log


def read_line(log: RunLog, text: str) -> int | None:
    """Take in a line; returns the step whose samples follow it, if they do."""
    if text.startswith("epoch "):  # the many lines of steps, whose numbers metrics.jsonl has
        return None
    if text.startswith("step "):
        if skipped := SKIPPED.match(text):
            log.skipped.append((int(skipped[1]), skipped[2][:LONGEST_TEXT]))
        sampled = SAMPLED.match(text)
        if sampled:
            log.samples.pop(int(sampled[1]), None)  # written once more after a resume
        return int(sampled[1]) if sampled else None
    if resumed := RESUMED.match(text):
        take_back(log, int(resumed[1]))
    elif text.startswith("finished;"):
        log.ending = "finished"
    elif stopped := STOPPED.match(text):
        log.ending = stopped[1]
    elif text.startswith("warning:"):
        if len(log.warnings) < MOST_WARNINGS:
            log.warnings.append(text[:LONGEST_TEXT])
    elif started := STARTED.match(text):
        log.header, log.ending = started[1][:LONGEST_TEXT], ""
        log.starts += 1
        parameters = PARAMETERS.search(log.header)
        log.parameters = parameters[1] if parameters else log.parameters
    return None


def take_back(log: RunLog, step: int) -> None:
    """The run goes on behind `step`: what was said of later steps no longer counts."""
    log.resumed = [other for other in log.resumed if other <= step]
    total = TOTAL_STEPS.search(log.header)
    if not total or step < int(total[1].replace(",", "")):  # behind the last one nothing goes on
        log.resumed.append(step)
    log.skipped = [(other, reason) for other, reason in log.skipped if other <= step]
    log.samples = {other: samples for other, samples in log.samples.items() if other <= step}


def read_sample(reward: str, text: str) -> Sample:
    """A line of `sampler.show_samples`; one that is written otherwise stays as it is."""
    pair = PAIR.match(text)
    try:
        prompt, completion = (ast.literal_eval(literal) for literal in pair.groups())
    except (AttributeError, ValueError, SyntaxError):
        prompt, completion = "", text
    return Sample(reward[:20], shorten(prompt), shorten(completion))


def shorten(text: str) -> str:
    """A text of the log as a page can hold it: not too long, and in UTF-8."""
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def spread(items: list, most: int) -> list:
    """At most `most` of them at equal distances, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[n * (len(items) - 1) // (most - 1)] for n in range(most)]

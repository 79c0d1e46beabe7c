"""The words and numbers of a page: a run in a few facts, its flags, its metrics in a table."""

import math
from pathlib import Path

import numpy as np

from runtime.reporting.curves import Curve
from runtime.reporting.run_record import RunRecord

# Flags that tell where a run lies and how it was started, not what it trains.
NOT_COMPARED = {"out_dir", "save_weight", "resume", "resume_with_changes", "cache_dir"}
NO_FLAGS = {"history", "peak_lr", "total_steps"}  # in args.json too
HIGHER_IS_BETTER = ("reward", "accuracy", "margin")
# In the order of the summary
FACTS = ("State", "Model", "Data", "Steps", "Started", "Loss", "Loss, held out", "Reward",
         "Reward, held out", "Accuracy", "Accuracy, held out", "Tokens", "Time in training",
         "Tokens per second", "Resumed", "Skipped steps", "Set-up")  # fmt: skip
LONGEST_VALUE = 300  # characters of a flag


def number(value: float) -> str:
    """A number as one reads it: 264,183; 2.5785; 5e-07."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def duration(seconds: float) -> str:
    """3 h 20 min; 4 min 10 s; 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{number(hours)} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def summarize(run: RunRecord) -> dict[str, str]:
    """What a reader looks for first: {one of FACTS: words}; what is not known is missing."""
    facts = {"State": run.state, "Model": describe_model(run), "Data": describe_data(run)}
    facts |= {"Steps": describe_steps(run), "Started": run.log.started, "Set-up": run.log.header}
    curves = run.metrics.curves
    for key, name in (("loss", "Loss"), ("reward", "Reward"), ("accuracy", "Accuracy")):
        if "reward" in curves and key == "loss":
            continue  # of a policy, around 0 whatever it has learned
        if key in curves:
            facts[name] = last_and_best(curves[key], key)
        if f"eval_{key}" in curves:
            facts[f"{name}, held out"] = last_and_best(curves[f"eval_{key}"], key)
    if "total_tokens" in curves and len(total := curves["total_tokens"].finite().values):
        facts["Tokens"] = number(total[-1])
        if "tokens_per_sec" in curves:
            seconds = seconds_of(run)
            facts["Time in training"] = duration(seconds) if math.isfinite(seconds) else ""
            speeds = curves["tokens_per_sec"].finite().values
            if len(speeds):
                facts["Tokens per second"] = f"{number(float(np.median(speeds)))} (median)"
    if run.log.resumed:
        steps = ", ".join(f"{step:,}" for step in run.log.resumed[-10:])
        facts["Resumed"] = f"{times(len(run.log.resumed))}, behind step {steps}"
    if run.log.skipped:
        last = f"{run.log.skipped[-1][0]:,}"
        facts["Skipped steps"] = f"{len(run.log.skipped):,}, the last: step {last}"
    return {name: facts[name] for name in FACTS if facts.get(name)}


def describe_model(run: RunRecord) -> str:
    parts = [f"{run.log.parameters} parameters"] if run.log.parameters else []
    sizes = {**run.flags, **run.shape}
    if isinstance(sizes.get("n_layers"), int) and isinstance(sizes.get("dim"), int):
        parts.append(f"{sizes['n_layers']} layers of width {sizes['dim']}")
    if sizes.get("use_moe"):
        parts.append(f"{sizes.get('n_experts')} experts, {sizes.get('n_experts_per_tok')} a token")
    return ", ".join(parts)


def describe_data(run: RunRecord) -> str:
    paths = run.flags.get("data_path")
    paths = paths if isinstance(paths, list) else [paths]
    names = [Path(path).name for path in paths if isinstance(path, str)]
    return ", ".join(names)[:LONGEST_VALUE]


def describe_steps(run: RunRecord) -> str:
    total = run.flags.get("total_steps")
    if not run.steps:
        return "none has been logged yet"
    return f"{run.steps:,} of {total:,}" if isinstance(total, int) else f"{run.steps:,}"


def last_and_best(curve: Curve, key: str) -> str:
    """`2.07 at the end, lowest 1.98 at step 290`."""
    finite = curve.finite()
    if not len(finite.values):
        return "never finite"
    higher = key in HIGHER_IS_BETTER
    best = finite.values.argmax() if higher else finite.values.argmin()
    word = "highest" if higher else "lowest"
    value, step = number(finite.values[best]), finite.steps[best]
    return f"{number(finite.values[-1])} last, {word} {value} at step {step:,.0f}"


def seconds_of(run: RunRecord) -> float:
    """How long a run has trained, all its starts together: the tokens of each line by its speed."""
    tokens, speed = (run.metrics.curves[key] for key in ("total_tokens", "tokens_per_sec"))
    if len(tokens.values) != len(speed.values):
        return math.nan
    with np.errstate(invalid="ignore", over="ignore"):
        counts = np.diff(tokens.values, prepend=0.0)
    is_known = (speed.values > 0) & np.isfinite(counts) & (counts >= 0)
    with np.errstate(over="ignore"):
        return float((counts[is_known] / speed.values[is_known]).sum())


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def compare_flags(runs: list[RunRecord]) -> list[tuple[str, list[str], bool]]:
    """(flag, its value in each run, whether they differ), those that differ first."""
    names = dict.fromkeys(name for run in runs for name in run.flags if name not in NO_FLAGS)
    rows = []
    for name in names:
        values = [flag_text(run.flags.get(name)) if name in run.flags else "" for run in runs]
        differs = len(set(values)) > 1 and name not in NOT_COMPARED
        rows.append((name, values, differs))
    return sorted(rows, key=lambda row: not row[2])


def flag_text(value: object) -> str:
    """A value of args.json in a cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {flag_text(inner)}" for name, inner in value.items())[
            :LONGEST_VALUE
        ]
    if isinstance(value, list):
        return " ".join(map(flag_text, value))[:LONGEST_VALUE]
    return "none" if value is None else str(value)[:LONGEST_VALUE]


def changes_at_resumes(run: RunRecord) -> list[tuple[str, ...]]:
    """(time and checkpoint, flag, before, after) of resumes with other flags."""
    rows = []
    history = run.flags.get("history")
    for entry in history if isinstance(history, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("changed"), dict):
            continue
        when = f"{entry.get('time', '')}, from {entry.get('resumed', '')}"[:LONGEST_VALUE]
        for name, values in entry["changed"].items():
            if isinstance(values, list) and len(values) == 2:
                rows.append((when, name, *map(flag_text, values)))
    return rows


def tabulate(run: RunRecord) -> list[tuple[str, ...]]:
    """(key, lines, first, last, lowest, highest) of each metric, for those who see no figures."""
    rows = []
    for key, curve in run.metrics.curves.items():
        finite = curve.finite()
        lines, values = f"{len(curve.values):,}", finite.values
        if not len(values):
            rows.append((key, lines, "", "", "", ""))
            continue
        extremes = (values.argmin(), values.argmax())
        shown = (f"{number(values[n])} (step {finite.steps[n]:,.0f})" for n in extremes)
        rows.append((key, lines, number(values[0]), number(values[-1]), *shown))
    return rows

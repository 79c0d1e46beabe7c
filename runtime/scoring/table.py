"""The table of scores, a row per task."""

import math
from collections.abc import Sequence

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
# What questions of some kinds have besides "right", and its header
SHARES = {
    "right_norm": "norm %",
    "valid_json": "json %",
    "right_name": "name %",
    "right_arguments": "args %",
}


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Where the true share of right answers lies with 95 % confidence, in percent.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927);
    Brown, Cai and DasGupta, Interval Estimation for a Binomial Proportion (2001), eq. 4.
    """
    share = right / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def format_table(questions: Sequence[dict]) -> str:
    """Right answers per task and in all.

    Args:
        questions: each has "task" and "right" (bool), and may have bools that `SHARES` names: those
            that none has get no column.
    """
    tasks: dict[str, list[dict]] = {}
    for question in questions:
        tasks.setdefault(question["task"], []).append(question)
    groups = {name: tasks[name] for name in sorted(tasks)} | {"total": list(questions)}
    width = max(map(len, groups))
    keys = [key for key in SHARES if any(key in question for question in questions)]
    shares = "".join(f"  {SHARES[key]:>6}" for key in keys)
    lines = [f"{'task':{width}}  {'n':>5}  {'right':>5}  {'%':>5}  {'95 % CI':>10}{shares}"]
    for name, rows in groups.items():
        right = sum(question["right"] for question in rows)
        low, high = wilson_interval(right, len(rows))
        cells = f"{len(rows):5}  {right:5}  {100 * right / len(rows):5.1f}  "
        cells += f"{f'{low:.1f}-{high:.1f}':>10}"
        cells += "".join(f"  {format_share(rows, key):>6}" for key in keys)
        lines.append(f"{name:{width}}  {cells}")
    return "\n".join(lines)


def format_share(questions: Sequence[dict], key: str) -> str:
    """In percent of the questions that have the key."""
    values = [question[key] for question in questions if key in question]
    return f"{100 * sum(values) / len(values):.1f}" if values else "-"

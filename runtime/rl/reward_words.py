"""What a word of --reward means, beside the plain name of a function in `rewards.py`.

A format, a function of yours, a reward model; and a weight behind any of them.
"""

import re
from collections.abc import Callable

from model.lm import LMConfig

THINKING = r"<think>\n.*?\n</think>\n\n.+"  # the layout of a reply that thinks first


def format(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 where the completion matches the regular expression in the row's "format", else 0.

    A row without "format" wants a reply that thinks first.
    """
    patterns = [row.get("format", THINKING) for row in rows]
    pairs = zip(patterns, completions, strict=True)
    return [float(bool(re.fullmatch(pattern, text, re.DOTALL))) for pattern, text in pairs]


def read_word(
    word: str, functions: dict[str, Callable], policy: LMConfig, args
) -> tuple[str, float, Callable]:
    """The name of a reward, its weight and its function.

    Args:
        word: of `--reward`.
        functions: those that have a name of their own, beside `format`.
        policy, args: as for `rewards.load_rewards`.

    Raises:
        ValueError: an unknown name, a file or function that is not there or cannot be loaded, a
            reward model of a shape that does not fit.
    """
    functions = functions | {"format": format}
    name, weight = word, 1.0
    if match := re.fullmatch(r"(.+):([-+.\d][-+.\de]*)", word):
        try:
            name, weight = match[1], float(match[2])
        except ValueError:
            message = f"--reward {word}: the weight {match[2]} is not a number"
            raise ValueError(message) from None
    if name.endswith(".pth"):
        from runtime.rl.reward_model import load_scorer

        return name, weight, load_scorer(name, policy, args)
    if ".py:" in name:
        from runtime.rl.reward_file import function_in

        return name, weight, function_in(name)
    if name in functions:
        return name, weight, functions[name]
    known = ", ".join(functions)
    raise ValueError(
        f"--reward {word}: neither {known}, nor FILE.py:FUNCTION, nor a reward model's FILE.pth"
    )

"""Words of a stage's command line that are no flags of its own."""

import re


def translate(argv: list[str], parser) -> list[str]:
    """The file of --config as flags, then the other words, which win.

    Left out is the `--local_rank N` that some launchers add: the environment says the same.

    Args:
        parser: the ArgumentParser that knows the flags.

    Raises:
        ValueError: see `config.config_to_argv`; --device_map, which is for chatting alone.
    """
    own, words = [], iter(argv)
    for word in words:
        if word.split("=")[0] == "--device_map":
            advice = "training spreads a model with --strategy (zero3), or --tensor_parallel"
            raise ValueError(f"--device_map is for eval_model.py: {advice}")
        if re.fullmatch("--local[-_]rank", word):
            next(words, None)
        elif not re.match("--local[-_]rank=", word):
            own.append(word)
    if not any(word.split("=")[0] == "--config" for word in own):
        return own
    from runtime.config import config_to_argv

    return config_to_argv(own, parser) + own

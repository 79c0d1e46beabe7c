"""--reward FILE.py:FUNCTION: a reward function of the user's."""

import importlib.util
from collections.abc import Callable
from pathlib import Path


def function_in(name: str) -> Callable:
    """The function that FILE.py:FUNCTION names."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"--reward {name}: there is no file {path}")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does when it is loaded
        raise ValueError(
            f"--reward {name}: {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {name}: {path} has no function {function}")
    return getattr(module, function)

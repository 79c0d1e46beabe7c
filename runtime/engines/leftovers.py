"""What other libraries would take for a launcher's environment."""

import os

from runtime.launcher import VARIABLES, read_launch


def forget_leftovers() -> None:
    """Without a launcher, take out of the environment what other libraries would take for one."""
    if not read_launch().launched:
        for name in VARIABLES:
            os.environ.pop(name, None)

"""Run a script and write which files of ours it has loaded, with their lines.

count_lines.py TABLE SCRIPT ARGS; TABLE: a JSON file, path below the repository -> lines. All files
are formatted (`ruff format`), so lines of one are lines of another.
"""

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("model", "dataset", "runtime", "kernels", "trainer")


def loaded_files(script: str) -> dict[str, int]:
    """Path -> lines, of the script and of every loaded module below the folders of training."""
    origins = [getattr(module, "__file__", None) for module in sys.modules.values()]
    paths = {Path(origin).resolve() for origin in origins if origin} | {Path(script).resolve()}
    names = {path.relative_to(ROOT).as_posix(): path for path in paths if path.is_relative_to(ROOT)}
    return {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in sorted(names.items())
        if name.split("/")[0] in OURS or path == Path(script).resolve()
    }


if __name__ == "__main__":
    table, *sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Path(table).write_text(json.dumps(loaded_files(sys.argv[0])))

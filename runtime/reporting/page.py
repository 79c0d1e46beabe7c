"""One HTML page of a run, or of several beside each other, that needs nothing else to be read."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from runtime.reporting.curves import smoothing_window
from runtime.reporting.figures import (
    ON_DARK,
    ON_LIGHT,
    Figure,
    choose_figures,
    draw,
    points_per_curve,
)
from runtime.reporting.run_record import METRICS, RunRecord, read_run
from runtime.reporting.summary import FACTS, changes_at_resumes, compare_flags, summarize, tabulate

HERE = Path(__file__).resolve().parent
MOST_MARKS = 200  # of a run


def render(runs: list[RunRecord], refresh: float = 0) -> str:
    """The page's HTML. Whatever comes from a run is escaped: its log holds text of models.

    Args:
        runs: with names that differ.
        refresh: seconds after which the page loads itself again; 0: never.

    Raises:
        ValueError: Bokeh is not installed.
    """
    try:
        from bokeh.embed import json_item
        from bokeh.resources import Resources
    except ImportError:
        raise ValueError("Bokeh draws the page: pip install bokeh") from None
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    facts = [summarize(run) for run in runs]
    figures = choose_figures(runs)
    most = points_per_curve(figures)
    marks = [mark for number, run in enumerate(runs) for mark in marks_of(run, number)]
    steps = range_of(figures)
    plots = [draw(figure, n, steps, marks, most) for n, figure in enumerate(figures)]
    data = {
        "items": [json_item(plot) for plot in plots],
        "marks": marks,
        "colours": [ON_LIGHT, ON_DARK],
        "refresh": refresh,
        "steps": steps,
    }
    return environment.get_template("page.html").render(
        runs=runs,
        figures=figures,
        notes=notes_of(runs, figures, most),
        marks=marks,
        facts=facts,
        known_facts=[name for name in FACTS if any(name in each for each in facts)],
        flags=compare_flags(runs),
        changes=[changes_at_resumes(run) for run in runs],
        tables=[tabulate(run) for run in runs],
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        # Of ours and of Bokeh's, and of numbers alone
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        data=json.dumps(data).replace("<", "\\u003c"),
    )


def range_of(figures: list[Figure]) -> tuple[float, float]:
    """From the first to the last step of all figures, and a little more."""
    curves = [series.curve.steps for figure in figures for series in figure.series]
    first = float(min((steps[0] for steps in curves), default=0))
    last = float(max((steps[-1] for steps in curves), default=1))
    margin = (last - first) / 100 or 1.0  # for the points at the ends
    return first - margin, last + margin


def marks_of(run: RunRecord, number: int) -> list[dict]:
    """Where a run was resumed, and the steps that it skipped: {"run", "step", "kind", "text"}."""
    marks = [{"step": step, "kind": "resumed", "text": "resumed here"} for step in run.log.resumed]
    marks += [
        {"step": step, "kind": "skipped", "text": f"step {step:,} was skipped: {reason}"}
        for step, reason in run.log.skipped
    ]
    return [{"run": number, **mark} for mark in marks[-MOST_MARKS:]]


def notes_of(runs: list[RunRecord], figures: list[Figure], most: int) -> list[str]:
    """What a reader has to know about what the figures show."""
    notes = []
    longest = max((len(s.curve.steps) for f in figures for s in f.series), default=0)
    if longest > 20:
        notes.append(
            "Faint lines are the values as logged, strong ones their running mean over about"
            f" {smoothing_window(longest):,} lines (exponential weights)."
        )
    if longest > most:
        notes.append(
            f"The longest curve has {longest:,} points, of which about {most:,} are drawn: the"
            " lowest and the highest of each stretch, so that no spike is lost."
        )
    for run in runs:
        if run.metrics.unreadable:
            lines = "line" if run.metrics.unreadable == 1 else "lines"
            notes.append(
                f"{run.name}: {run.metrics.unreadable:,} {lines} of {run.path.name} could not be read."
            )
        if run.metrics.left_out:
            notes.append(f"{run.name}: {run.metrics.left_out:,} further metrics are left out.")
        marks = len(run.log.resumed) + len(run.log.skipped)
        if marks > MOST_MARKS:
            notes.append(f"{run.name}: of {marks:,} marks the last {MOST_MARKS} are drawn.")
        if not run.metrics.curves:
            notes.append(f"{run.name}: nothing has been logged yet.")
    return notes


def write_page(runs: list[RunRecord], path: Path, refresh: float = 0) -> None:
    """Write a page whole, or not at all. Raises: see `render`; OSError names the file."""
    html = render(runs, refresh)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(html.encode("utf-8", "backslashreplace"))  # names may be no UTF-8
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_at_end(folder: Path, tell: Callable[[str], None]) -> None:
    """Write the page of a run that has ended, where Bokeh is. A failure costs a line, not the run.

    Args:
        folder: of the run.
        tell: prints a line for people.
    """
    if importlib.util.find_spec("bokeh") is None:
        return
    try:
        write_page([read_run(folder / METRICS)], folder / "report.html")
        tell(f"its curves: {folder / 'report.html'}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        tell(f"warning: no {folder / 'report.html'}: {reason}")

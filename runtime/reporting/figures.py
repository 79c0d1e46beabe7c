"""The figures of a page: which metrics share one, and their drawing with Bokeh."""

from dataclasses import dataclass, field

import numpy as np

from runtime.reporting.curves import Curve, smooth, thin
from runtime.reporting.run_record import RunRecord

# What is drawn first, in this order; the keys of a figure share its axis where there is one run.
# Any other key of a metrics.jsonl gets a figure of its own behind them.
FIGURES = (
    ("Loss", ("loss",)),
    ("Reward", ("reward",)),
    ("Accuracy", ("accuracy",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens per second", ("tokens_per_sec",)),
    ("KL from the start", ("kl",)),
    ("Entropy", ("entropy",)),
    ("Completion length in tokens", ("completion_length",)),
    ("Share of tokens whose ratio was clipped", ("clipped_low", "clipped_high", "clipped")),
    ("Share of values that were clipped", ("value_clipped",)),
    ("Share of completions cut off; of groups of one reward", ("truncated", "groups_without_variance")),
    ("Standard deviation of the rewards", ("reward_std",)),
    ("Ratio of new to old probability", ("ratio",)),
    ("Policy loss and value loss", ("policy_loss", "value_loss")),
    ("Cross-entropy and KL of the loss", ("ce_loss", "kl_loss")),
    ("Margin between chosen and rejected", ("margin",)),
    ("Rewards of chosen and rejected", ("chosen_reward", "rejected_reward")),
    ("Auxiliary loss of the experts", ("aux_loss",)),
)  # fmt: skip
COUNTERS = {"epoch", "tokens", "supervised_tokens", "total_tokens", "pairs"}  # not drawn
AS_LOGGED = {"lr"}  # follows a formula, so there is nothing to smooth

# Okabe and Ito's colours, which those who see fewer colours tell apart too; where one would be too
# pale for its background (contrast below 3:1), another of theirs, or a grey.
ON_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#4d4d4d")
ON_DARK = ("#56b4e9", "#e69f00", "#1bb98a", "#cc79a7", "#f0e442")
DASHES = ("solid", "dashed", "dotted", "dashdot")  # once the colours are used up
MOST_POINTS = (100, 2000)  # of a curve: at least, at most
ALL_POINTS = 150_000  # of a page of at most 5 MB
LARGEST = 1e300  # that is drawn: an axis ends a little behind it


@dataclass
class Series:
    """A curve in a figure."""

    label: str
    key: str
    run: int  # the how manieth
    look: int  # the how manieth look: colour and dash
    curve: Curve
    is_evaluation: bool

    @property
    def colour(self) -> int:
        return self.look % len(ON_LIGHT)

    @property
    def dash(self) -> str:
        return DASHES[self.look // len(ON_LIGHT) % len(DASHES)]


@dataclass
class Figure:
    """A figure with a title."""

    title: str
    series: list[Series] = field(default_factory=list)

    def describe(self) -> str:
        """What it shows, for those who do not see it."""
        parts = []
        for series in self.series:
            finite = series.curve.finite()
            first, last, low = finite.values[0], finite.values[-1], finite.values.argmin()
            parts.append(
                f"{series.label} from {first:.4g} at step {finite.steps[0]:,.0f} to {last:.4g} at step"
                f" {finite.steps[-1]:,.0f}, lowest {finite.values[low]:.4g} at step"
                f" {finite.steps[low]:,.0f}"
            )
        return f"{self.title}: " + "; ".join(parts)


def choose_figures(runs: list[RunRecord]) -> list[Figure]:
    """The figures of one run, or of several, where a figure has one metric and a curve per run."""
    found = [drawn_curves(run) for run in runs]
    keys = dict.fromkeys(key for curves in found for key in curves)
    rewards = tuple(key for key in keys if key.startswith("reward "))
    loss, reward, *others = FIGURES
    table = [reward, ("Rewards of each kind", rewards), loss, *others]
    if "reward" not in keys:  # where there are rewards, the loss of a policy says little
        table = [loss, *others]
    known = {key for _, group in table for key in group}
    for key in keys:
        if key not in known and not (key.startswith("eval_") and key[5:] in keys):
            table.append((key, (key,)))
    figures = []
    for title, group in table:
        group = [key for key in group if key in keys or f"eval_{key}" in keys]
        if len(runs) == 1:
            figures.append(Figure(title, series_of(found[0], 0, group)))
            for look, series in enumerate(figures[-1].series):
                series.look = look
            continue
        for key in group:
            figure = Figure(title if len(group) == 1 else f"{title}: {key}")
            for number, run in enumerate(runs):
                for series in series_of(found[number], number, [key]):
                    series.label = run.name + (" (evaluation)" if series.is_evaluation else "")
                    figure.series.append(series)
            figures.append(figure)
    return [figure for figure in figures if figure.series]


def drawn_curves(run: RunRecord) -> dict[str, Curve]:
    """The curves of a run that are worth a figure, by key."""
    curves = {
        key: curve
        for key, curve in run.metrics.curves.items()
        if key not in COUNTERS and curve.is_finite.any()
    }
    if "aux_loss" in curves and not np.nan_to_num(curves["aux_loss"].values).any():
        del curves["aux_loss"]  # a model without experts
    if "eval_reward" in curves:
        curves.pop("eval_loss", None)  # its negative
    return curves


def series_of(curves: dict[str, Curve], run: int, keys: list[str]) -> list[Series]:
    """The curves of some keys, and their evaluations, in the colour of the run."""
    names = [name for key in keys for name in (key, f"eval_{key}") if name in curves]
    return [Series(n, n, run, run, curves[n], n.startswith("eval_")) for n in names]


def points_per_curve(figures: list[Figure]) -> int:
    count = sum(len(figure.series) for figure in figures)
    return min(max(ALL_POINTS // max(1, count), MOST_POINTS[0]), MOST_POINTS[1])


def draw(figure: Figure, number: int, steps: tuple[float, float], marks: list[dict], most: int):
    """A Bokeh figure without words of the runs: those are in the page around it.

    Args:
        number: of the figure, for names.
        steps: the first and last step of all figures.
        marks: {"step", "kind"} of what happened to a run.
        most: points of a curve.
    """
    from bokeh.models import (
        BasicTickFormatter,
        BoxZoomTool,
        NumeralTickFormatter,
        PanTool,
        Range1d,
        ResetTool,
        SaveTool,
        Span,
        WheelZoomTool,
    )
    from bokeh.plotting import figure as new_figure

    zoom = BoxZoomTool(dimensions="width")
    tools = [zoom, PanTool(dimensions="width"), WheelZoomTool(dimensions="width")]
    plot = new_figure(
        name=f"figure {number}",
        height=300,
        sizing_mode="stretch_width",
        tools=[*tools, SaveTool(filename=f"figure_{number + 1}"), ResetTool()],
        active_drag=zoom,
        x_range=Range1d(*steps),
        window_axis="x",  # the y axis fits what is in view
        lod_threshold=None,
        output_backend="canvas",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border_right=16,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.axis_label = "step"
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    largest = max(np.abs(s.curve.finite().values).max() for s in figure.series)
    plain = BasicTickFormatter(power_limit_low=-5)
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0") if largest >= 1000 else plain
    plot.axis.axis_label_text_font_style = "normal"
    plot.grid.grid_line_alpha = 0.25
    draw_marks(plot, marks)
    for n, series in enumerate(figure.series):
        draw_series(plot, series, n, most)
    crosshair = Span(
        dimension="height", location=steps[0], visible=False, name="crosshair", level="overlay"
    )
    crosshair.line_color = "#808080"
    plot.add_layout(crosshair)
    return plot


def draw_series(plot, series: Series, number: int, most: int) -> None:
    """A curve, as it is and smoothed; evaluations as points."""
    from bokeh.models import ColumnDataSource

    curve = series.curve
    kept = thin(curve.values, most)
    columns = {"step": compact(curve.steps[kept]), "value": compact(curve.values[kept])}
    is_smoothed = not series.is_evaluation and series.key not in AS_LOGGED and len(curve.steps) > 20
    if is_smoothed:
        columns["smooth"] = compact(smooth(curve.values)[kept])
    look = {"source": ColumnDataSource(columns), "line_color": ON_LIGHT[series.colour]}
    lines = look | {"line_dash": series.dash}
    if is_smoothed:
        drawn = [plot.line("step", "value", line_alpha=0.3, line_width=1, **lines, name="values")]
        drawn.append(plot.line("step", "smooth", line_width=2, **lines))
    else:
        width = 1 if series.is_evaluation else 2  # its points are what counts
        drawn = [plot.line("step", "value", line_width=width, **lines, name="values")]
    if series.is_evaluation or len(kept) == 1:
        look |= {"fill_color": ON_LIGHT[series.colour], "size": 8 if len(kept) <= 50 else 5}
        drawn.append(plot.scatter("step", "value", marker="circle", **look))
    for renderer in drawn:  # for the page's script: colour, run, entry of the legend
        renderer.tags = [series.colour, series.run, number]


def draw_marks(plot, marks: list[dict]) -> None:
    """Vertical lines where a run was resumed, and where it skipped a step."""
    for kind, dash, colour in (("resumed", "dashed", "#808080"), ("skipped", "dotted", "#d04040")):
        steps = sorted({mark["step"] for mark in marks if mark["kind"] == kind})
        if steps:
            plot.vspan(x=steps, line_dash=dash, line_color=colour, line_width=1.5, name=kind)


def compact(values: np.ndarray) -> np.ndarray:
    """The same in half the bytes; what a figure shows needs no more digits."""
    values = values.clip(-LARGEST, LARGEST)
    if len(values) and (values == np.round(values)).all() and np.abs(values).max() < 2**31:
        return values.astype(np.int32)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return narrow if np.isfinite(narrow).sum() == np.isfinite(values).sum() else values

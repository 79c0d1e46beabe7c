"""The page of a run: what stands on it, in a browser without a network."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.reporting import page
from runtime.reporting.figures import choose_figures
from runtime.reporting.run_record import name_apart, read_run
from runtime.reporting.summary import compare_flags, summarize
from runtime.run import Run
from runtime.tracking import Tracker

pytest.importorskip("bokeh", reason="Bokeh draws the page")
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>{{ 7*7 }}&amp;"
)


def make_run(folder: Path, lines: list[dict], log: str = "", flags: dict | None = None):
    """A run's folder with what a stage would have written."""
    folder.mkdir(parents=True)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "training.log").write_text(log, encoding="utf-8")
    if flags is not None:
        (folder / "args.json").write_text(json.dumps(flags), encoding="utf-8")
    return read_run(folder / "metrics.jsonl")


def sft_lines(count: int, start: float = 8.0) -> list[dict]:
    lines = []
    for n in range(1, count + 1):
        line = {"step": n, "epoch": 1, "loss": start / n**0.3, "aux_loss": 0.0, "lr": 1e-3 / n}
        line |= {"grad_norm": 1 + n % 7, "tokens": 100, "supervised_tokens": 60}
        lines.append(line | {"total_tokens": 100 * n, "tokens_per_sec": 50.0})
        if n % 50 == 0:
            lines.append({"step": n, "eval_loss": start / n**0.3 + 0.1})
    return lines


def rl_lines(count: int) -> list[dict]:
    lines = []
    for n in range(1, count + 1):
        line = {"step": n, "epoch": 1, "loss": 0.0, "lr": 1e-5, "grad_norm": 0.1, "tokens": 9}
        line |= {"supervised_tokens": 5, "kl": 0.01 * n, "entropy": 2.0, "clipped_low": 0.1}
        line |= {"clipped_high": 0.2, "ratio": 1.0, "reward": n / count, "reward_std": 0.5}
        line |= {"completion_length": 9.0, "truncated": 0.5, f"reward {HOSTILE}": 0.1}
        lines.append(line | {"total_tokens": 9 * n, "tokens_per_sec": 3.0})
    return [*lines, {"step": count, "eval_loss": -0.5, "eval_reward": 0.5}]


HEADER = (
    "2026-12-01 10:00:00 {}: 1,234 parameters on 1 x cpu, 100 steps of 4 rows, learning rate 0.1\n"
)
HOSTILE_LOG = (
    HEADER.format("run")
    + "2026-12-01 10:00:01 resumed from x behind step 40\n"
    + f"2026-12-01 10:00:01 step 60 skipped: loss {HOSTILE}, gradient norm nan (1 skipped so far)\n"
    + f"2026-12-01 10:00:01 warning: {HOSTILE}\n"
    + f"2026-12-01 10:00:02 step 100 reward 0.5\n  reward 0.50: {HOSTILE!r} -> {HOSTILE!r}\n"
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """visit(path) -> the open page, with what went wrong in it so far in `.faults`."""
    opened = []

    def open_page(path: Path, **options):
        tab = browser.new_page(**options)
        opened.append(tab)
        tab.faults = []
        bad = ("error", "warning")
        tab.on("console", lambda m: m.type in bad and tab.faults.append(m.text))
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.on("dialog", lambda dialog: (tab.faults.append("a dialog"), dialog.dismiss()))
        local = ("file:", "data:", "blob:")
        tab.on("request", lambda r: r.url.startswith(local) or tab.faults.append(r.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield open_page
    for tab in opened:
        tab.close()


def test_a_run_in_facts(tmp_path):
    flags = {"data_path": "a/b.jsonl", "total_steps": 200, "dim": 64, "n_layers": 2}
    log = HEADER.format("sft_64") + "2026-12-01 10:00:09 finished; weights in x\n"
    run = make_run(tmp_path / "sft_64", sft_lines(100), log, flags)
    facts = summarize(run)
    assert facts["State"] == "finished" and facts["Data"] == "b.jsonl"
    assert facts["Steps"] == "100 of 200" and facts["Tokens"] == "10,000"
    assert facts["Time in training"] == "3 min 20 s" and facts["Tokens per second"] == "50 (median)"
    assert facts["Model"] == "1,234 parameters, 2 layers of width 64"
    assert facts["Loss"] == "2.0095 last, lowest 2.0095 at step 100"


def test_the_state_of_a_run(tmp_path):
    run = make_run(tmp_path / "a_64", [], HEADER.format("a"))
    assert run.state == "ended early: killed, or failed"
    tracker = Tracker(tmp_path / "a_64", {"report_to": [], "use_wandb": False}, True, None)
    tracker.start({"step": 0, "tokens": 0}, 9)
    tracker.print(HEADER.format("a")[20:].strip())
    assert read_run(tmp_path / "a_64/metrics.jsonl").state == "running"
    tracker.print("stopped by signal 15 at step 5; weights in x")
    assert read_run(tmp_path / "a_64/metrics.jsonl").state == "stopped by signal 15 at step 5"
    tracker.close()
    tracker.lock.release()


def test_figures_of_one_run_and_of_several(tmp_path):
    sft, rl = make_run(tmp_path / "sft", sft_lines(60)), make_run(tmp_path / "rl", rl_lines(60))
    titles = [figure.title for figure in choose_figures([sft])]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Tokens per second"]
    figures = {figure.title: figure for figure in choose_figures([rl])}
    assert list(figures)[0] == "Reward"
    clipped = figures["Share of tokens whose ratio was clipped"].series
    assert [series.label for series in clipped] == ["clipped_low", "clipped_high"]
    assert [series.label for series in figures["Loss"].series] == ["loss"]  # eval_loss is -reward
    both = {figure.title: figure for figure in choose_figures([sft, rl])}
    labels = [series.label for series in both["Loss"].series]
    assert labels == ["sft", "sft (evaluation)", "rl"]
    assert [series.label for series in both["KL from the start"].series] == ["rl"]


def test_flags_that_differ(tmp_path):
    flags = [
        {"learning_rate": rate, "peak_lr": rate, "seed": 1, "out_dir": f"{rate}"}
        for rate in (0.1, 0.2)
    ]
    runs = [make_run(tmp_path / f"r{n}", [], "", one) for n, one in enumerate(flags)]
    rows = compare_flags(runs)
    assert rows[0] == ("learning_rate", ["0.1", "0.2"], True)
    assert [name for name, _, differs in rows if differs] == ["learning_rate"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / place / "sft_64", []) for place in "ab"]
    name_apart(runs)
    assert [run.name for run in runs] == ["a/sft_64", "b/sft_64"]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": None}],
        [{"step": 5, "x": 1e300}],
        [
            {"step": n, "loss": value, "pairs": 8}
            for n, value in enumerate((1.0, 1e308, -1.7e308, 2.0))
        ],
    ],
)
def test_little_or_nothing_logged(tmp_path, visit, lines):
    run = make_run(tmp_path / "run", lines)
    page.write_page([run], tmp_path / "report.html")
    assert visit(tmp_path / "report.html").faults == []


def test_hostile_text_stays_text(tmp_path, visit):
    flags = {"data_path": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}
    flags["history"] = [{"time": HOSTILE, "resumed": 1, "changed": {HOSTILE: [HOSTILE, 2]}}]
    name = HOSTILE.replace("/", "_")
    hostile = make_run(tmp_path / name, rl_lines(100), HOSTILE_LOG, flags)
    other = make_run(tmp_path / "other", sft_lines(30))
    for number, runs in enumerate(([hostile], [hostile, other])):
        path = tmp_path / f"{number}.html"
        page.write_page(runs, path)
        tab = visit(path)
        assert tab.faults == [] and "owned" != tab.title() and tab.locator("img").count() == 0
        assert HOSTILE in tab.locator(".sample pre").last.text_content()
        tab.evaluate("point(60)")
        noted = tab.locator("figcaption .note").first.text_content()
        assert HOSTILE in noted and "was skipped" in noted and tab.faults == []


def test_a_page_in_the_browser(tmp_path, visit):
    """Numbers under the pointer, in all figures; one zoom for all; runs that are switched off."""
    runs = [make_run(tmp_path / f"sft_{n}", sft_lines(300, n)) for n in (5, 8)]
    page.write_page(runs, tmp_path / "compared.html")
    tab = visit(tmp_path / "compared.html", viewport={"width": 1200, "height": 1000})
    tab.locator("#plot-0").hover(position={"x": 500, "y": 120})
    step = int(tab.locator(".step output").first.text_content())
    assert 100 < step < 200
    for caption in tab.locator("figcaption").all():
        assert caption.locator(".step output").text_content() == str(step)
    loss = tab.locator("figcaption").first.locator(".entry output").first.text_content()
    assert loss.startswith(str(float(f"{5 / step**0.3:.5g}")))

    tab.locator("#plot-0").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".step output").last.text_content() == str(step + 2)

    box = tab.locator("#plot-0").bounding_box()
    tab.mouse.move(box["x"] + 300, box["y"] + 100)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 600, box["y"] + 120, steps=3)
    tab.mouse.up()
    ranges = tab.evaluate("figures.map(({range}) => [range.start, range.end])")
    assert len({tuple(ends) for ends in ranges}) == 1 and 50 < ranges[0][0] < ranges[0][1] < 200
    tab.reload()
    tab.wait_for_selector("html[data-ready]", state="attached")
    assert tab.evaluate("figures.map(({range}) => [range.start, range.end])") == ranges

    tab.get_by_label("sft_5", exact=True).uncheck()
    shown = tab.evaluate(
        "figures[0].plot.renderers.filter((r) => r.tags.length && r.visible).length"
    )
    assert 0 < shown < tab.evaluate("figures[0].plot.renderers.length") and tab.faults == []


def test_narrow_dark_and_for_screen_readers(tmp_path, visit):
    run = make_run(tmp_path / "sft_64", sft_lines(300), HOSTILE_LOG, {"seed": 1})
    page.write_page([run], tmp_path / "report.html")
    options = {"viewport": {"width": 360, "height": 700}, "color_scheme": "dark"}
    tab = visit(tmp_path / "report.html", **options)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    colour = tab.evaluate("figures[0].curves[0].glyph.line_color.value")
    assert colour == page.ON_DARK[0]
    name = tab.locator("#plot-0").get_attribute("aria-label")
    assert name.startswith("Loss: loss from 8 at step 1 to 1.445 at step 300, lowest 1.445")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="finds barriers")
    tab.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    results = axe.Axe().run(tab)
    serious = [v for v in results.response["violations"] if v["impact"] in ("serious", "critical")]
    assert not serious, results.generate_report()


def test_many_lines_make_a_small_page(tmp_path, visit):
    """A spike stays, the page says what was left out, and it opens."""
    lines = rl_lines(5000)
    lines[3333]["kl"] = 12345.0
    run = make_run(tmp_path / "grpo_64", lines)
    path = tmp_path / "report.html"
    page.write_page([run], path)
    assert path.stat().st_size < 2.5e6
    tab = visit(path)
    assert "have" not in tab.faults and tab.faults == []
    assert "of which about 2,000 are drawn" in tab.locator("main").text_content()
    highest = "Math.max(...figures.flatMap(({curves}) => [...curves[0].data_source.get('value')]))"
    assert tab.evaluate(highest) == 12345


def test_written_at_the_end_of_a_run_of_more_than_a_minute(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run_64", {"report_to": [], "use_wandb": False}, True, None)
    progress = {"step": 0, "tokens": 0}
    tracker.start(progress, 1)
    args = SimpleNamespace(total_steps=1)
    report = tmp_path / "run_64/report.html"
    run = Run(args=args, model=None, tracker=tracker, progress=progress, save=lambda: None)
    tracker.close = lambda: None
    assert run.finish("weights in x") == 0 and not report.exists()
    tracker.began -= 61
    assert run.finish("weights in x") == 0 and "finished" in report.read_text(encoding="utf-8")
    report.unlink()
    report.mkdir()
    capsys.readouterr()
    assert run.finish("weights in x") == 0
    assert f"warning: no {report}: IsADirectoryError" in capsys.readouterr().out
    tracker.lock.release()

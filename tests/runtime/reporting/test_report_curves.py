"""Curves of metrics.jsonl: what is read of it, smoothed, and left of it to draw."""

import math

import numpy as np
import pytest

from runtime.reporting.curves import MOST_KEYS, read_metrics, smooth, thin


@pytest.fixture
def read(tmp_path):
    def read_text(text: str):
        path = tmp_path / "metrics.jsonl"
        path.write_text(text, encoding="utf-8")
        return read_metrics(path)

    return read_text


def test_a_curve_per_key_in_the_order_of_steps(read):
    metrics = read('{"step": 2, "loss": 1.5, "eval": true}\n{"step": 1, "loss": 3, "name": "x"}\n')
    assert list(metrics.curves) == ["loss"]
    assert metrics.curves["loss"].steps.tolist() == [1, 2]
    assert metrics.curves["loss"].values.tolist() == [3, 1.5]


def test_what_is_not_finite_is_a_gap(read):
    lines = [f'{{"step": {n}, "loss": {value}}}\n' for n, value in
             enumerate(("null", "NaN", "Infinity", "1e999", "1" + "0" * 400, "7"))]  # fmt: skip
    curve = read("".join(lines)).curves["loss"]
    assert curve.is_finite.tolist() == [False] * 5 + [True]
    assert curve.finite().values.tolist() == [7]


def test_a_torn_last_line_is_being_written(read):
    metrics = read('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics.curves["loss"].values.tolist() == [2] and metrics.unreadable == 0


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", "3", '{"loss": 1}', '{"step": "1"}', '{"step": null}', "[" * 99999, "\0"],
)
def test_lines_that_are_not_ours_are_counted(read, line):
    metrics = read(f'{line}\n\n{{"step": 1, "loss": 2.0}}\n')
    assert metrics.unreadable == 1 and len(metrics.curves["loss"].steps) == 1


def test_keys_beyond_the_most_are_counted(read):
    pairs = ", ".join(f'"key{n}": {n}' for n in range(MOST_KEYS + 5))
    metrics = read(f'{{"step": 1, {pairs}}}\n' * 3)
    assert len(metrics.curves) == MOST_KEYS and metrics.left_out == 5


def test_an_empty_file_has_no_curves(read):
    assert read("").curves == {}


def test_thinning_keeps_spikes_ends_and_gaps():
    values = np.sin(np.arange(50_000) / 1000)
    values[12_345], values[33_333] = 1e6, -1e6
    values[40_000:40_100] = math.nan
    kept = thin(values, 500)
    assert 400 <= len(kept) <= 600 and (np.diff(kept) > 0).all()
    assert {0, 12_345, 33_333, 40_000, 49_999} <= set(kept.tolist())
    assert thin(values[:500], 500).tolist() == list(range(500))
    assert len(thin(np.full(5000, math.nan), 100)) >= 2


def test_smoothing_is_a_mean_that_starts_without_a_bias():
    assert np.allclose(smooth(np.full(100, 3.0)), 3.0)
    values = np.tile([0.0, 2.0], 500)
    assert np.abs(smooth(values)[-100:] - 1).max() < 0.1
    values[500] = math.nan
    means = smooth(values)
    assert math.isnan(means[500]) and np.isfinite(np.delete(means, 500)).all()

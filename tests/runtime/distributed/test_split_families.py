"""Llama and Qwen2 split over processes: biases, heads without norms, scaled positions."""

from running import run_ranks


def test_split_models_of_other_families_compute_what_whole_ones_do():
    printed = run_ranks("tests/split_families.py", nproc=2)
    for family in ("llama", "qwen2"):
        for split in ("tensor", "context"):
            assert printed.count(f"{family} {split} parallel equal") == 2

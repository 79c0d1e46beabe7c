"""What the measurements of speed rest on: the count of operations, and that figures are judged by
their bounds."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.lm import LMConfig, MiniMindLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/speed"))
from common import figure, in_turn, ratio, step_flops  # noqa: E402


def test_operations_of_a_step_are_those_that_torch_counts():
    """Attention apart, which torch does not count on a CPU: a document of one token has one product
    each."""
    config = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=70, max_seq_len=16)
    model, ids, heads = MiniMindLM(config), torch.randint(70, (1, 12)), torch.arange(5)
    with FlopCounterMode(display=False) as counter:
        model(ids, doc_lens=[1] * 12, logits_at=heads).logits.sum().backward()
    attention = 12 * 12 * config.n_layers * config.n_heads * config.head_dim
    assert counter.get_total_flops() == step_flops(config, [1] * 12, 5) - attention


def test_variants_take_turns_and_ratios_are_taken_within_a_turn():
    order = []
    works = {
        name: lambda turn, name=name: order.append(name) or turn * (2 if name == "b" else 1)
        for name in "ab"
    }
    results = in_turn(works, [1.0, 10.0, 3.0])
    assert order == ["a", "b"] * 3 and results == {"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 6.0]}
    assert ratio(results, "b", "a") == 2.0
    assert [figure("x", v, least=2.0)["kept"] for v in (1.9, 2.0)] == [False, True]
    assert [figure("x", v, most=1.1)["kept"] for v in (1.1, 1.2)] == [True, False]


def test_a_run_does_not_load_the_compiler_nor_with_a_warm_cache_transformers(tmp_path):
    """They take two seconds each; torch's optimizers and torch.compiler.disable would both load the
    compiler."""
    flags = (
        "--dim=32 --n_layers=1 --n_heads=4 --n_kv_heads=2 --device=cpu --max_steps=2"
        " --from_weight=none"
    )
    script = ROOT / "trainer/train_full_sft.py"
    code = (
        f"import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path({str(script)!r},"
        " run_name='__main__')\n"
    )
    code += (
        "finally: print('loaded:', [name for name in ('torch._dynamo', 'transformers') if name in"
        " sys.modules])"
    )
    places = [f"--out_dir={tmp_path}", f"--cache_dir={tmp_path}"]
    command = [sys.executable, "-c", code, str(script), *flags.split(), *places]
    for loaded in (["transformers"], []):
        done = subprocess.run(command, capture_output=True, text=True)
        assert "step 2/2" in done.stdout and f"loaded: {loaded}" in done.stdout, (
            done.stdout + done.stderr
        )


def test_the_harness_prints_a_table_and_writes_it(tmp_path):
    out = tmp_path / "table.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/speed/run.py"),
        "--only",
        "loading",
        "--rounds",
        "1",
    ]
    command += ["--start_rows", "200", "--few_rows", "400", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads(out.read_text())["table"]
    assert [line["what"].split(":")[0] for line in table] == [
        "epoch over 10 x the rows", "start to first step, warm cache, 200 rows"
    ]  # fmt: skip
    for line in table:
        assert line["value"] > 0 and f"{line['value']:.3f}" in done.stdout

"""scripts/lm_eval_adapter.py: the figures of lm-eval's own model on the same weights; mistakes."""

import importlib
import io
import json
import subprocess
import sys

import pytest
import torch
from conftest import write_jsonl
from running import run_ranks

from model.lm import LMConfig, MiniMindLM
from runtime.process import exits

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: test
"""
TASKS = {
    "choices": """\
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "texts": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "replies": """\
output_type: generate_until
doc_to_text: q
doc_to_target: a
generation_kwargs: {until: ["\\n\\n", "e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Random weights, the same in Hugging Face's format, and tasks with their data."""
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96)
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **shape))
    torch.save(model.state_dict(), folder / "full_sft_32.pth")
    (folder / "full_sft_32.json").write_text(model.config.to_json())
    weights = folder / "full_sft_32.pth"
    run_ranks("scripts/convert.py", "to-hf", weights, folder / "hf", f"--out_dir={folder}")
    rows = {
        "choices": [
            {
                "question": f"{n} + {n}?",
                "choices": ["no", f"{2 * n}", "多少", "a lot"],
                "gold": n % 4,
            }
            for n in range(8)
        ],
        # Of 0 to 300 words that do not repeat: more than a window
        "texts": [{"text": " ".join(map(str, range(n**3, n**3 + 12 * n)))} for n in range(1, 5)],
        "replies": [{"q": f"Say {n}.", "a": f"{n}"} for n in range(5)],
    }
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        write_jsonl(folder / f"{name}.jsonl", rows[name])
        head = TASK.format(name=name, folder=folder)
        (folder / f"tasks/{name}.yaml").write_text(head + text)
    return folder


@pytest.fixture
def measure(monkeypatch, capsys, folder):
    """The finished script, run in this process."""

    def measure(*flags) -> subprocess.CompletedProcess:
        adapter = importlib.import_module("scripts.lm_eval_adapter")
        argv = ["lm_eval_adapter.py", "--out_dir", folder, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            exits.run(adapter.main)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(argv, end.value.code, captured.out, captured.err)

    return measure


@pytest.mark.parametrize("chat", [0, 1])
def test_figures_are_those_of_lm_evals_own_model(measure, folder, tmp_path, chat):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    out = tmp_path / "ours.json"
    flags = ["--tasks", folder / "tasks", "--eval_out", out, "--batch_size", 3]
    done = measure(*flags, "--apply_chat_template", chat, "--num_fewshot", chat)
    assert done.returncode == 0 and "bits_per_byte" in done.stdout, done.stderr
    ours = json.loads(out.read_text(encoding="utf-8"))
    # Its cache confuses windows that differ in their last token alone.
    model = HFLM(str(folder / "hf"), device="cpu", dtype="float32", logits_cache=False)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    options = {"num_fewshot": chat, "apply_chat_template": bool(chat), "fewshot_random_seed": 42}
    theirs = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, **options)
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4, abs=1e-4)
        pairs = zip(theirs["samples"][task], ours["samples"][task], strict=True)
        for expected, row in pairs:
            for (one,), (other,) in zip(expected["resps"], row["resps"], strict=True):
                same = other if isinstance(other, str) else pytest.approx(other, rel=1e-5)
                assert (tuple(one) if isinstance(one, tuple | list) else one) == same
    words = [row["resps"][0][0] for row in ours["samples"]["replies"]]
    assert (chat or any(words)) and not any("e" in reply for reply in words)


def test_mistakes_are_named_in_a_line(measure, folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("task: [a")
    text = TASK.format(name="gone", folder=tmp_path) + TASKS["choices"]
    (tmp_path / "gone.yaml").write_text(text)
    sampling = TASK.format(name="replies", folder=folder) + TASKS["replies"]
    (tmp_path / "beams.yaml").write_text(sampling.replace("{until", "{num_beams: 4, until"))
    for words, reason in (
        (["--tasks", tmp_path / "none"], "none: neither a task of lm-eval"),
        (["--tasks", tmp_path / "none.yaml"], "none.yaml: neither a task of lm-eval"),
        (["--tasks", tmp_path / "empty"], "empty: there is no task in this folder"),
        (["--tasks", tmp_path / "broken.yaml"], "broken.yaml: while parsing"),
        (["--tasks", tmp_path / "gone.yaml"], f"Unable to find '{tmp_path}/gone.jsonl'"),
        (["--tasks", tmp_path / "beams.yaml"], "not supported in generation_kwargs: num_beams"),
        (["--tasks", folder / "tasks", "--limit", 0], "--limit 0: must be positive"),
        (["--tasks", folder / "tasks", "--eval_out", tmp_path], "--eval_out"),
        (["--tasks", folder / "tasks", "--model", "lost"], "no lost weights in"),
        ([], "required: --tasks"),
    ):
        done = measure(*words)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and reason in last, done.stderr
    monkeypatch.setattr("scripts.lm_eval_adapter.TemplateLM", object)
    assert "pip install lm-eval" in measure("--tasks", folder / "tasks").stderr

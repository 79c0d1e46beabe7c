"""Every mistake of a user ends with one line that says what to mend, exit code 2, no file.

Most cases share one interpreter: `run_cases` starts a process that runs the stage scripts one after
the other as if each had been started by hand. What depends on processes (torchrun, ports) is
started for real at the end of the file.
"""

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from running import LAUNCHER_VARIABLES, ROOT, launched_as

from model.lm import LMConfig, MiniMindLM

SFT, PRETRAIN = "trainer/train_full_sft.py", "trainer/train_pretrain.py"
TINY = (
    "--dim 32 --n_layers 1 --n_heads 4 --n_kv_heads 2 --device cpu --max_seq_len 64 --batch_size 2"
    " --packing 0"
)

# Reads [(name, script, argv, modules to hide)] from stdin, writes {name: [exit code, stdout,
# stderr]} to a file.
RUNNER = """
import contextlib, io, json, runpy, sys
results = {}
for name, script, argv, hidden in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv = [script, *argv]
    saved = {module: sys.modules.get(module) for module in hidden}
    sys.modules.update(dict.fromkeys(hidden))  # None in sys.modules: the import fails
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        except BaseException as error:
            code = repr(error)
    for module in hidden:
        sys.modules.pop(module)
    sys.modules.update((module, value) for module, value in saved.items() if value)
    results[name] = [code, out.getvalue(), err.getvalue()]
json.dump(results, open(RESULTS, "w"))
"""


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"conversations": turns})


GOOD = chat("a", "b")

# name -> (line 3 of the data file, what the message says behind "file:3: ")
ROWS = {
    "broken JSON": (b'{"conversations": [', "broken JSON: Expecting value at column 20"),
    "wrong schema": (b'{"question": "a", "answer": "b"}', "keys found: 'question', 'answer'"),
    "empty conversation": (b'{"conversations": []}', "empty conversation"),
    "unknown role": (GOOD.replace("user", "robot").encode(), "turn 1: unknown role 'robot'"),
    "null content": (
        GOOD.replace('"b"', "null").encode(),
        "turn 2: 'content' must be a string, found null",
    ),
    "no assistant turn": (GOOD.replace("assistant", "user").encode(), "no assistant turn"),
    "Latin-1 bytes": (GOOD.replace('"b"', '"caf\u00e9"').encode("latin-1"), "byte 0xe9 at column"),
    "20 MB": (
        b'{"conversations": "' + b"x" * 20_000_000 + b'"}',
        "row of more than 19 MB, the limit is 8 MB",
    ),
}
PRETRAIN_ROWS = {
    "pretrain broken JSON": (b'{"text": "a', "broken JSON: Unterminated string"),
    "pretrain wrong schema": (
        GOOD.encode(),
        'needs a string under "text"; keys found: conversations',
    ),
    "pretrain null": (b'{"text": null}', 'needs a string under "text"'),
    "pretrain Latin-1": (
        '{"text": "caf\u00e9"}'.encode("latin-1"),
        "byte 0xe9 at column 14 is not UTF-8",
    ),
}

# name -> (flags, what the message says). {work} is a folder with the files that `make_files`
# writes.
FLAGS = {
    "unknown flag": ("--batch 4", "unrecognized arguments: --batch 4"),
    "abbreviated flag": ("--learning 1", "unrecognized arguments: --learning 1"),
    "stray word": ("full_sft", "unrecognized arguments: full_sft"),
    "flag without value": ("--dim", "argument --dim: expected one argument"),
    "batch 0": ("--batch_size 0", "--batch_size 0: must be positive"),
    "batch below 0": ("--batch_size -8", "--batch_size -8: must be positive"),
    "batch no number": ("--batch_size eight", "--batch_size: invalid int value: 'eight'"),
    "batch no whole number": ("--batch_size 2.5", "--batch_size: invalid int value: '2.5'"),
    "global batch 0": ("--global_batch_size 0", "--global_batch_size 0: must be positive"),
    "seed below 0": ("--seed -1", "--seed -1: must be 0 or more"),
    "learning rate 0": ("--learning_rate 0", "--learning_rate 0.0: must be positive"),
    "learning rate nan": ("--learning_rate nan", "--learning_rate nan: must be"),
    "learning rate inf": ("--learning_rate inf", "--learning_rate inf: must be"),
    "warmup 2": ("--warmup_ratio 2", "--warmup_ratio 2.0: must be at most 1"),
    "seed of 81 bits": (
        "--seed 1208925819614629174706176",
        "--seed 1208925819614629174706176: must be at most 9,2",
    ),
    "seed of 5000 digits": (f"--seed {'9' * 5000}", "argument --seed: invalid int value"),
    "dim of a billion": ("--dim 1000000000", "--dim 1000000000: must be at most 131,072"),
    "more than the memory": (
        "--dim 65536 --n_layers 900",
        "--dim 65536 --n_layers 900: the model has 158,414 GiB of weights, more than the",
    ),
    "a million layers": ("--n_layers 1000000", "--n_layers 1000000: must be at most 1,000"),
    "a million workers": ("--num_workers 1000000", "--num_workers 1000000: must be at most "),
    "device meta": ("--device meta", "--device meta: must be auto, cpu, mps, cuda or cuda:N"),
    "name outside": (
        "--save_weight ../x",
        "--save_weight '../x': must be a file's name, without a folder: --out_dir",
    ),
    "name absolute": ("--save_weight {work}/x", "must be a file's name, without a folder"),
    "name empty": ("--save_weight=", "--save_weight '': must be a file's name"),
    "name of this folder": ("--save_weight .", "--save_weight '.': must be a file's name"),
    "name too long": (f"--save_weight {'x' * 250}", "has 250 bytes, a file's name may have 200"),
    "folder too long": (f"--out_dir {'x' * 300}", "xxx/pretrain_32.pth: File name too long"),
    "data is a pipe": ("--data_path {work}/pipe", "{work}/pipe: not a file"),
    "weights are a pipe": ("--from_weight {work}/pipe", "{work}/pipe: not a file"),
    "config is a pipe": ("--config {work}/pipe", "--config {work}/pipe: not a file"),
    "config is a device": ("--config /dev/zero", "--config /dev/zero: not a file"),
    "a lock is a folder": (
        "--save_weight locked",
        "--out_dir: cannot write to {work}/out/a lock is a folder/.locked_32.lock: Is a directory",
    ),
    "dtype": ("--dtype int8", "--dtype: invalid choice: 'int8' (choose from"),
    "loss_on": ("--loss_on first", "--loss_on: invalid choice: 'first'"),
    "strategy": ("--strategy zero9", "--strategy: invalid choice: 'zero9'"),
    "device": ("--device tpu", "--device tpu: must be auto, cpu, mps, cuda or cuda:N"),
    "no GPU": ("--device cuda", "cuda:0 is asked for, but torch"),
    "no such GPU": ("--device cuda:9", "cuda:9 is asked for, but torch"),
    "heads do not divide dim": ("--n_heads 5", "dim 32 is not a multiple of n_heads 5"),
    "kv heads do not divide heads": (
        "--n_kv_heads 3",
        "n_heads 4 is not a multiple of n_kv_heads 3",
    ),
    "no heads": ("--n_heads 0", "--n_heads 0: must be positive"),
    "dropout": ("--dropout 1", "dropout 1.0 must lie in [0, 1)"),
    "experts": ("--use_moe 1 --n_experts_per_tok 9", "n_experts_per_tok 9 must lie in 1..4"),
    "eval_ratio 2": ("--eval_ratio 2", "--eval_ratio 2.0: must be at most 1"),
    "eval_ratio below 0": ("--eval_ratio -0.5", "--eval_ratio -0.5: must be 0 or more"),
    "eval_ratio too small": ("--eval_ratio 0.01", "--eval_ratio 0.01 of 4 rows holds out 0"),
    "ddp without torchrun": (
        "--ddp",
        f"--ddp needs a launcher: torchrun --nproc_per_node 2 {ROOT / SFT} --ddp",
    ),
    "no data": ("--data_path {work}/nowhere.jsonl", "{work}/nowhere.jsonl: no such data file"),
    "empty file": ("--data_path {work}/empty.jsonl", "{work}/empty.jsonl: the file is empty"),
    "gzip": (
        "--data_path {work}/rows.gz --skip_bad",
        "{work}/rows.gz: this is compressed with gzip: gzip -dc",
    ),
    "GBK": (
        "--data_path {work}/gbk.jsonl",
        (
            "{work}/gbk.jsonl:1: byte 0xc4 at column 49 is not UTF-8; convert the file, it is"
            " GB18030: iconv -f GB18030 -t UTF-8 {work}/gbk.jsonl > {work}/gbk.utf8.jsonl"
        ),
    ),
    "empty array": ("--data_path {work}/empty.json", "{work}/empty.json: the file is empty"),
    "broken array": (
        "--data_path {work}/torn.json",
        "{work}/torn.json:2: broken JSON: the array does not end",
    ),
    "rows too long": (
        "--max_seq_len 5",
        "0 bad, 4 without a supervised token within max_seq_len; see --max_seq_len",
    ),
    "all rows bad": ("--data_path {work}/bad.jsonl --skip_bad", "no usable row: 1 bad, 0 without"),
    "no tokenizer": (
        "--tokenizer_dir {work}/nowhere",
        "--tokenizer_dir {work}/nowhere: there is no tokenizer.json",
    ),
    "torn tokenizer": (
        "--tokenizer_dir {work}/torn_tokenizer",
        "--tokenizer_dir {work}/torn_tokenizer: tokenizer.json is damaged",
    ),
    "out_dir": (
        "--out_dir {work}/file/out",
        "--out_dir: cannot write to {work}/file/out: Not a directory",
    ),
    "cache_dir": ("--cache_dir {work}/file/cache", "cannot use {work}/file/cache: Not a directory"),
    "no stage weights": ("--from_weight stage1", "stage1_32.pth: no such weights file"),
    "no weights file": ("--from_weight {work}/no.pth", "{work}/no.pth: no such weights file"),
    "weights of another shape": (
        "--from_weight {work}/wide.pth",
        "(6400, 48) in the file and (6400, 32) here",
    ),
    "weights of more layers": (
        "--from_weight {work}/deep.pth",
        "{work}/deep.pth: made for another model",
    ),
    "torn weights": ("--from_weight {work}/torn.pth", "{work}/torn.pth: not a weights file"),
    "empty weights": (
        "--from_weight {work}/empty.jsonl.pth",
        "{work}/empty.jsonl.pth: not a weights file",
    ),
    "list of weights": ("--from_weight {work}/list.pth", "{work}/list.pth: not a plain state dict"),
    "config missing": (
        "--config {work}/nowhere.yaml",
        "--config {work}/nowhere.yaml: No such file",
    ),
    "config unknown key": (
        "--config {work}/unknown.yaml",
        "unknown key 'batchsize'; the nearest known one is 'batch_siz",
    ),
    "config wrong type": (
        "--config {work}/type.yaml",
        "type.yaml:1: batch_size must be a whole number, found 'many'",
    ),
    "resume nowhere": ("--resume {work}/nowhere", "--resume {work}/nowhere: no checkpoint there"),
}

# name -> (flags on top of those of the run to be resumed, what the message says)
RESUME = {
    "resume other data": (
        "--data_path {work}/other.jsonl",
        (
            "another run: the content of --data_path was {work}/good.jsonl and is"
            " {work}/other.jsonl. Use"
        ),
    ),
    "resume other max_seq_len": ("--max_seq_len 32", "--max_seq_len was 64 and is 32"),
    "resume other global batch": ("--batch_size 4", "--global_batch_size was 2 and is 4"),
    "resume other seed": ("--seed 7", "--seed was 42 and is 7"),
    "resume other packing": ("--packing 1", "--packing was 0 and is 1"),
    "resume other layers": ("--n_layers 2", "--n_layers was 1 and is 2"),
    "resume auto other dim": ("--dim 64", "full_sft_64 has no checkpoint, but full_sft_32 has"),
    "resume other dim": ("--dim 64 --resume {run}", "--dim was 32 and is 64"),
    "resume a path with other seed": (
        "--seed 7 --resume {run}/checkpoints/{last}",
        "{last}: this is another run: --seed",
    ),
    "resume a torn checkpoint": (
        "--resume {work}/torn/step_00000002",
        "run.pt has 100 bytes instead of",
    ),
}


def make_files(work: Path) -> None:
    write_jsonl(work / "good.jsonl", [GOOD, chat("c", "d"), chat("e", "f"), chat("g", "h")])
    write_jsonl(work / "other.jsonl", [GOOD, chat("c", "d"), chat("e", "f"), chat("g", "i")])
    write_jsonl(work / "bad.jsonl", ["{"])
    for folder, rows, first in (
        ("rows", ROWS, GOOD),
        ("pretrain_rows", PRETRAIN_ROWS, '{"text": "a"}'),
    ):
        (work / folder).mkdir()
        for name, (raw, _) in rows.items():
            (work / folder / f"{name}.jsonl").write_bytes(
                f"{first}\n{first}\n".encode() + raw + b"\n"
            )
    files = {
        "file": "",
        "empty.jsonl": "",
        "empty.jsonl.pth": "",
        "empty.json": "[ ]",
        "torn.json": f"[{GOOD},\n{GOOD}",
        "unknown.yaml": "training:\n  batchsize: 2\n",
        "type.yaml": "batch_size: many\n",
        "torn_tokenizer/tokenizer.json": (
            (ROOT / "model/minimind_tokenizer/tokenizer.json").read_text()[:1000]
        ),
    }
    for name, text in files.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text(text)
    os.mkfifo(work / "pipe")
    (work / "out/a lock is a folder/.locked_32.lock").mkdir(parents=True)
    (work / "rows.gz").write_bytes(gzip.compress(GOOD.encode()))
    (work / "gbk.jsonl").write_bytes(GOOD.replace('"a"', '"\u4f60\u597d"').encode("gbk"))
    for name, dim, n_layers in (("wide", 48, 1), ("deep", 32, 2), ("torn", 32, 1)):
        config = LMConfig(dim=dim, n_layers=n_layers, n_heads=4, n_kv_heads=2, max_seq_len=64)
        torch.save(MiniMindLM(config).state_dict(), work / f"{name}.pth")
    whole = (work / "torn.pth").read_bytes()
    (work / "torn.pth").write_bytes(whole[: len(whole) // 2])
    torch.save([torch.zeros(1)], work / "list.pth")


def tree(folder: Path) -> dict[str, str]:
    """Each file's hash of its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def run_cases(
    work: Path, cases: list[tuple[str, str, list[str], list[str]]]
) -> dict[str, tuple[object, str, str]]:
    """Run the scripts one after the other in one fresh interpreter."""
    variables = {
        name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES
    }
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    results = work / "results.json"
    process = subprocess.run(
        [sys.executable, "-c", f"RESULTS = {str(results)!r}\n{RUNNER}"],
        input=json.dumps(
            [(name, str(ROOT / script), argv, hidden) for name, script, argv, hidden in cases]
        ),
        env=variables,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("bad_input")
    make_files(work)
    return work


def flags(work: Path, name: str, *more: str) -> list[str]:
    """Tiny settings and folders of the case's own; flags that come later win."""
    own = ["--out_dir", str(work / "out" / name), "--cache_dir", str(work / "cache" / name)]
    return [*TINY.split(), "--data_path", str(work / "good.jsonl"), *own, *more]


@pytest.fixture(scope="module")
def results(work):
    """All cases in one process: {name: (exit code, stdout, stderr)}."""
    cases = [(name, SFT, flags(work, name), []) for name in ("good", "run")]
    for folder, script, rows in (("rows", SFT, ROWS), ("pretrain_rows", PRETRAIN, PRETRAIN_ROWS)):
        for name in rows:
            cases.append(
                (
                    name,
                    script,
                    flags(work, name, "--data_path", str(work / folder / f"{name}.jsonl")),
                    [],
                )
            )
    for name, (given, _) in FLAGS.items():
        cases.append((name, SFT, flags(work, name, *given.format(work=work).split()), []))
    cases.append(
        (
            "tensorboard",
            SFT,
            flags(work, "tensorboard", "--report_to", "tensorboard"),
            ["tensorboard"],
        )
    )
    return run_cases(work, cases)


def check_error(result, *said: str) -> None:
    code, out, err = result
    assert code == 2, (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in out + err and len(err) < 600
    for text in said:
        assert text in err, err
    assert "step 1/" not in out, "it trained before it complained"


def check_nothing_written(work: Path, name: str) -> None:
    assert not list((work / "out" / name).rglob("*.pth")) and not list(
        (work / "out" / name).rglob("run.pt")
    )
    for entry in (work / "cache" / name).glob("*"):
        assert not entry.name.endswith(".building")
        assert not entry.is_dir() or (entry / "meta.json").is_file(), "half a cache"


def test_the_cases_would_run_without_their_fault(results, work):
    code, out, err = results["good"]
    assert code == 0 and "finished" in out and err == ""
    assert (work / "out/good/full_sft_32.pth").is_file()


@pytest.mark.parametrize("name", [*ROWS, *PRETRAIN_ROWS])
def test_bad_row(results, work, name):
    folder, rows = ("rows", ROWS) if name in ROWS else ("pretrain_rows", PRETRAIN_ROWS)
    check_error(results[name], f"error: {work / folder / name}.jsonl:3: ", rows[name][1])
    check_nothing_written(work, name)
    assert not [entry for entry in (work / "cache" / name).iterdir() if entry.is_dir()]


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flag_or_file(results, work, name):
    check_error(results[name], FLAGS[name][1].format(work=work))
    check_nothing_written(work, name)


def test_tensorboard_that_is_not_installed(results, work):
    check_error(
        results["tensorboard"],
        "--report_to tensorboard: it is not installed; pip install tensorboard",
    )
    check_nothing_written(work, "tensorboard")


@pytest.fixture(scope="module")
def resumed(work, results):
    """A finished run, then attempts to resume it as another: (results, its files before, after)."""
    run, last = work / "out" / "run" / "full_sft_32", "step_00000002"
    assert results["run"][0] == 0, results["run"]
    torn = work / "torn" / last
    torn.mkdir(parents=True)
    for file in (run / "checkpoints" / last).iterdir():
        (torn / file.name).write_bytes(file.read_bytes()[: 100 if file.name == "run.pt" else None])
    before, cases = tree(run.parent), []
    for name, (given, _) in RESUME.items():
        given = given.format(work=work, run=run, last=last)
        given = ["--out_dir", str(run.parent), "--resume", "auto", *given.split()]
        cases.append((name, SFT, flags(work, "run", *given), []))
    return run_cases(work, cases), before, tree(run.parent)


@pytest.mark.parametrize("name", RESUME)
def test_resume_of_another_run(resumed, work, name):
    check_error(
        resumed[0][name], "--resume ", RESUME[name][1].format(work=work, last="step_00000002")
    )


def test_refused_resume_leaves_the_run_as_it_was(resumed):
    assert resumed[1] == resumed[2]


# --------------------------------------------------------------------------------------------------
# Real processes
# --------------------------------------------------------------------------------------------------


def test_a_real_start_from_another_folder(run_script, work, tmp_path):
    data = work / "rows" / "unknown role.jsonl"
    done = run_script(SFT, *flags(work, "real", "--data_path", str(data)), cwd=tmp_path, fresh=True)
    check_error(
        (done.returncode, done.stdout, done.stderr), f"{data}:3: turn 1: unknown role 'robot'"
    )
    assert list(tmp_path.iterdir()) == []


def errors_of(done) -> list[str]:
    """The ranks' lines about errors; none of them, unlike torchrun at its end, has a traceback."""
    by_ranks = done.stderr.split("torch/distributed/elastic")[0]
    assert "Traceback" not in done.stdout + by_ranks, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_two_ranks_tell_of_bad_data_once(run_script, work):
    data = work / "rows" / "null content.jsonl"
    done = run_script(SFT, "--ddp", *flags(work, "two", "--data_path", str(data)), nproc=2)
    assert errors_of(done) == [f"error: {data}:3: turn 2: 'content' must be a string, found null"]
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    check_nothing_written(work, "two")


def test_two_ranks_and_a_fault_of_rank_0_alone(run_script, work):
    done = run_script(
        SFT, "--ddp", *flags(work, "two", "--out_dir", str(work / "file" / "out")), nproc=2
    )
    (line,) = errors_of(done)
    assert line.startswith(f"error: --out_dir: cannot write to {work}/file/out")
    assert "exitcode  : 2" in done.stderr


def test_torchrun_without_ddp(run_script, work):
    done = run_script(PRETRAIN, *flags(work, "without ddp"), nproc=2)
    assert errors_of(done) == [
        "error: started by torchrun as several processes but without --ddp: add --ddp"
    ]
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    check_nothing_written(work, "without ddp")


def test_busy_port(run_script, work):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run_script(SFT, "--ddp", *flags(work, "port"), env=launched_as(0, 2, port))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = errors_of(done)
    assert (
        f"cannot join the process group at 127.0.0.1:{port}: the port is busy, choose another"
        " --master_port" in line
    )
    check_nothing_written(work, "port")

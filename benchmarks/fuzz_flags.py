"""Give every flag of every script odd values: each has to make a run or one line that says what to mend, at once.

The flags are read from the scripts' own parsers, so that a new one is covered, and a new script as well. A case is a
fork of a process that has imported what the scripts import: it trains for real, one step of a tiny model, and takes a
part of a second. A fault is: a traceback, no end within --limit seconds, an exit code that is neither 0 nor 2 (1 of
doctor.py, which found something), more than one line on stderr with code 2, or a file outside of the run's folders.

    python benchmarks/fuzz_flags.py                                    all of them: hours
    python benchmarks/fuzz_flags.py --cases 2000 --seed 1              so many of them, chosen by the seed
    python benchmarks/fuzz_flags.py --scripts trainer/train_ppo.py --flags temperature,gamma
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GROUPS = ("trainer/train_*.py", "eval_model.py", "main.py", "scripts/*.py", "dataset/make_demo.py")
PRELOADED = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.pipelining",
             "torch._dynamo", "transformers.models.auto.tokenization_auto")  # fmt: skip
# What makes a run tiny, of every script that has such a flag.
TINY = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "batch_size": 2, "max_steps": 1,
        "device": "cpu", "max_new_tokens": 4, "group_size": 2, "pairs": 4, "persona": 2, "rl_prompts": 4,
        "n_experts": 2, "n_experts_per_tok": 1, "hold_out": 0, "vocab_size": 272, "lora_rank": 2,
        "pipeline_parallel": 1}  # fmt: skip
# Values that are right and take long, or a network.
SLOW = {("compile", "1"), ("use_wandb", ""), ("report_to", "wandb"), ("fix", "")}

WHOLE = "0 -1 1 2 3 7 16 1000000 1000000000 1.5 1e3 nan inf 0x10 1_0 two --1".split()
WHOLE += [*map(str, (2**31, 2**63, 2**64, 2**80, -(2**63))), "9" * 5000, "", " ", "1 2", "\u0664"]
REAL = (
    "0 -0.0 -1 1 2 0.5 0.999999 1.0000001 1e-300 5e-324 1e-30 1e-7 1e30 1e300 1e400 -1e300".split()
)
REAL += ["nan", "inf", "-inf", "1,5", "0x1p-3", "half", "9" * 5000, "", " ", "\u0664.5"]
WORDS = "\udcff . .. / ~ - -- a/b ../outside /nowhere/at/all %s {} * none auto 0 -1 nan true : a:b".split()
WORDS += (
    "field: field:\udcff length exact:nan exact:1e400 cuda cuda:99999999999 cpu:1 mps meta".split()
)
WORDS += ["", " ", "\t", "a\nb", "\u4f60\u597d\U0001f600", "x" * 300, "x/" * 3000]
FILES = ("empty", "garbage", "folder", "fifo", "link", "loop", "torn", "device", "zeros")
ENDINGS = ("", ".pth", ".json", ".jsonl", ".yaml", ".txt", ".py:score")
# What a YAML file may say about a flag, here NAME.
YAML = r"""
NAME: yes
NAME: [64]
NAME: {a: 1}
NAME:
NAME: ~
NAME: 2020-01-01
NAME: "\0"
NAME: "\uD83D"
NAME: .nan
NAME: !!binary aGk=
NAME: !!python/object/apply:os.getcwd []
NAME: 0o17
NAME: 1_0
NAME: 1:30
NAME: &a [*a]
a: &a [x, x]|b: &b [*a, *a]|NAME: [*b, *b]
NAME: 1|NAME: 1
<<: {NAME: 1}
<<: 3
<<: [1]
<<: *no
a: &a {<<: *a}|NAME: 1
? [NAME]|: 1
? {NAME: 1}|: 1
1: NAME
NAME: 1|	NAME: 2
- NAME
--- NAME|---|NAME: 1
x: {y: {z: {NAME: 1}}}
NAME: 99999999999999999999999999
NAME: 1e999
NAME: 你
你: NAME
NAME: ''
%YAML 9.9|---|NAME: 1
NAME: @
NAME: *x
"\0": NAME
null: NAME
training: 1|NAME: 2
"""
YAML = [text.replace("|", "\n") for text in YAML.strip().splitlines()]
YAML += ["[" * 3000, "{a: " * 3000]
# Forty mappings, each merging the one before twice: a loader that does not remember makes 2 ** 40 of them.
YAML += [
    "\n".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}" for n in range(40)).replace(
        "[*b-1, *b-1]", "{NAME: 1}"
    )
]


@dataclass
class Case:
    script: str  # relative to ROOT
    words: list[str]
    flags: tuple[str, ...]  # that have odd values

    def __str__(self) -> str:
        return f"{self.script} ... {' '.join(map(ascii, self.words[-3:]))}"


class Found(BaseException):
    """Ends a script when its parser is known."""


# ---------------------------------------------------------------------------------------------------------------------
# Scripts and their flags
# ---------------------------------------------------------------------------------------------------------------------


def scripts() -> list[str]:
    """All files of GROUPS that parse a command line."""
    paths = [path for group in GROUPS for path in sorted(ROOT.glob(group))]
    return [str(path.relative_to(ROOT)) for path in paths if "ArgumentParser(" in path.read_text(encoding="utf-8")
            and "__main__" in path.read_text(encoding="utf-8")]  # fmt: skip


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script would parse its command line with."""
    parsers, names = [], ("parse_args", "parse_known_args")
    kept = {name: getattr(argparse.ArgumentParser, name) for name in names}

    def find(self, *args, **kwargs):
        parsers.append(self)
        raise Found

    argv, sys.argv = sys.argv, [script]
    for name in names:
        setattr(argparse.ArgumentParser, name, find)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Found:
        return parsers[0]
    finally:
        sys.argv = argv
        for name in names:
            setattr(argparse.ArgumentParser, name, kept[name])
    raise AssertionError(f"{script} parses no command line")


def odd_values(action: argparse.Action, work: Path) -> list[list[str]]:
    """Words for a flag, each a list: as many as the flag takes."""
    if action.nargs == 0:
        return [[], ["1"]]
    if action.type is int:
        values = WHOLE
    elif action.type is float:
        values = REAL
    else:
        values = [*WORDS, *(str(work / f"{kind}{ending}") for kind in FILES for ending in ENDINGS)]
    if action.choices:
        values = [
            *map(str, action.choices),
            "",
            " ",
            "x",
            "2",
            "-1",
            "nan",
            "\udcff",
            next(iter(map(str, action.choices))) + " ",
        ]
    values = [[value] for value in values]
    return (
        values + [["none", "none"], ["a", ""], ["\udcff", "a"]] if action.nargs == "+" else values
    )


def cases_of(script: str, parser: argparse.ArgumentParser, work: Path) -> list[Case]:
    """First one without, which has to end well; one odd value at a time, and, where a script reads YAML, odd YAML."""
    base = base_flags(script, parser, work)
    found = [Case(script, base, ())]
    for action in parser._actions:
        name = action.option_strings[-1].removeprefix("--")
        for values in odd_values(action, work):
            if (name, "".join(values)) in SLOW:
                continue
            words = [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
            found.append(Case(script, [*base, *words], (name,)))
        if (
            name not in ("config", "compile")
            and "--config" in parser._option_string_actions
            and action.nargs != 0
        ):
            others = [word for word in base if not word.startswith(f"--{name}=")]
            for number, text in enumerate(YAML):
                path = work / "yaml" / f"{name}_{number}.yaml"
                path.parent.mkdir(exist_ok=True)
                path.write_text(text.replace("NAME", name))
                found.append(Case(script, [*others, f"--config={path}"], ("config", name)))
    found += [
        Case(script, [*base, word], ("",))
        for word in ("stray", "--unknown=1", "--", "-x", "@file", "\udcff")
    ]
    return found


def base_flags(script: str, parser: argparse.ArgumentParser, work: Path) -> list[str]:
    """Flags of a tiny run that ends well."""
    flags, stage = {}, Path(script).stem.removeprefix("train_")
    names = {option.removeprefix("--") for option in parser._option_string_actions}
    if (
        script.startswith("trainer/")
        or script.startswith("scripts/plan")
        or script.startswith("scripts/prepare")
    ):
        flags |= TINY
    if script in (
        "main.py",
        "scripts/run_distributed.py",
        "scripts/plan.py",
        "scripts/prepare_data.py",
    ):
        flags |= TINY | {
            "data_path": work / "sft.jsonl",
            "out_dir": work / "out",
            "cache_dir": work / "cache",
        }
        names = (
            names | parser_of("trainer/train_full_sft.py")._option_string_actions.keys()
        ) | set(flags)
        flags = {name: value for name, value in flags.items() if name not in ROLLOUTS}
    data = {
        "pretrain": "text",
        "dpo": "pairs",
        "reward": "pairs",
        "grpo": "prompts",
        "ppo": "prompts",
        "tokenizer": "text",
    }
    flags |= {
        "data_path": work / f"{data.get(stage, 'sft')}.jsonl",
        "cache_dir": work / "cache",
        "out_dir": work / "out",
    }
    flags |= {"from_weight": "none"} if script.startswith("trainer/") else {}
    flags |= {"teacher_weight": work / "weights/full_sft_32.pth"} if stage == "distillation" else {}
    if script in ("eval_model.py", "scripts/export_lora.py"):
        flags = {
            "weight": work / "weights/full_sft_32.pth",
            "out_dir": work / "weights",
            "device": "cpu",
        }
        flags |= {"prompt": "hi", "max_new_tokens": 4} if script == "eval_model.py" else {}
        flags |= (
            {"lora": work / "weights/lora_32.pth", "merge": work / "out/merged.pth"}
            if "lora" in script
            else {}
        )
    if script == "scripts/plan.py":
        flags |= {"data_path": "none"}
    return [f"--{name}={value}" for name, value in flags.items() if name in names]


ROLLOUTS = (
    "max_new_tokens",
    "group_size",
    "pairs",
    "persona",
    "rl_prompts",
    "hold_out",
    "vocab_size",
    "lora_rank",
)


# ---------------------------------------------------------------------------------------------------------------------
# Running a case
# ---------------------------------------------------------------------------------------------------------------------


def make_files(work: Path) -> None:
    """Data and weights for runs that end well, and odd things to name instead."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = {
        "sft": {"conversations": turns},
        "text": {"text": "a b c d e f " * 20},
        "pairs": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        "prompts": {"messages": turns[:1], "answer": "ho"},
    }
    for name, row in rows.items():
        (work / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 6)
    for ending in {ending.removesuffix(":score") for ending in ENDINGS}:
        (work / f"empty{ending}").touch()
        (work / f"garbage{ending}").write_bytes(bytes(range(256)) * 9)
        (work / f"torn{ending}").write_text('{"text": "a')
        (work / f"folder{ending}").mkdir()
        os.mkfifo(work / f"fifo{ending}")
        (work / f"link{ending}").symlink_to(work / "nothing")
        (work / f"loop{ending}").symlink_to(work / f"loop{ending}")
        (work / f"device{ending}").symlink_to("/dev/full")
        (work / f"zeros{ending}").symlink_to("/dev/zero")
    (work / "weights").mkdir()
    (work / "cases").mkdir()


def make_weights(work: Path) -> None:
    from model.lm import LMConfig, MiniMindLM
    from runtime.checkpoint import save_file

    config = LMConfig(
        **{name: size for name, size in TINY.items() if name in LMConfig.__annotations__}
        | {"vocab_size": 6400}
    )
    save_file(work / "weights/full_sft_32.pth", MiniMindLM(config).state_dict())
    save_file(work / "weights/full_sft_32.json", config.to_json())
    parser = parser_of("trainer/train_lora.py")
    words = [*base_flags("trainer/train_lora.py", parser, work), f"--out_dir={work / 'weights'}"]
    words.append(f"--from_weight={work / 'weights/full_sft_32.pth'}")
    code, out, err, *_ = run(Case("trainer/train_lora.py", words, ()), work, 300)
    assert code == 0, (out, err)


def stub_what_starts_processes(script: str) -> None:
    """A launcher has done its part when it starts the training; doctor's processes would talk for seconds."""
    import subprocess

    if script == "scripts/run_distributed.py":

        def end(*args, **kwargs):
            raise SystemExit(0)

        subprocess.Popen = end
    if script == "scripts/doctor.py":
        from runtime import link

        link.run_processes = lambda *_: (
            '{"ranks": 2, "bandwidth": 1e9, "latency": 1e-5, "right": true}'
        )


def run(case: Case, work: Path, limit: float) -> tuple[int | None, str, str, set[str], float]:
    """What a script does in a fork of this process.

    Returns:
        The exit code, None where it did not end; stdout; stderr; what it left beside --out_dir; seconds.
    """
    folder, begin = Path(tempfile.mkdtemp(dir=work / "cases")), time.monotonic()
    words = [word.replace(str(work / "out"), str(folder / "out")) for word in case.words]
    (folder / "out").mkdir()
    if (process := os.fork()) == 0:
        be_script(case.script, words, folder)
    code = None
    while time.monotonic() - begin < limit:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if code is None:
        os.waitpid(process, 0)
    printed = [(folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    beside = {*os.listdir(folder)} - {"out", "stdout", "stderr"}
    shutil.rmtree(folder, ignore_errors=True)
    return code, *printed, beside, time.monotonic() - begin


def be_script(script: str, words: list[str], folder: Path) -> None:
    """What the fork does; it never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number, (name, mode) in enumerate(
            (
                ("/dev/null", os.O_RDONLY),
                ("stdout", os.O_WRONLY | os.O_CREAT),
                ("stderr", os.O_WRONLY | os.O_CREAT),
            )
        ):
            os.dup2(os.open(name, mode, 0o600), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
        stub_what_starts_processes(script)
        sys.argv = [str(ROOT / script), *words]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def fault_of(case: Case, code: int | None, out: str, err: str, beside: set[str]) -> str:
    """What is wrong with how a case went; an empty string where nothing is."""
    if code is None:
        return "no end"
    if "Traceback" in out + err:
        return f"traceback: {err.strip().splitlines()[-1][:200] if err.strip() else out[-200:]}"
    if code not in ((0, 1, 2) if case.script.endswith("doctor.py") else (0, 2)):
        return f"exit code {code}: {err.strip()[-200:]}"
    if not case.flags and code == 2:
        return f"a tiny run does not end well: {err[:300]!r}"
    if code == 2 and not (err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1100):
        return f"not one line: {err[:300]!r}"
    if beside and case.flags == ("save_weight",):
        return f"written outside of --out_dir: {sorted(beside)}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", help="of the repository (default: all)")
    parser.add_argument("--flags", help="names, separated by commas (default: all)")
    parser.add_argument("--cases", type=int, default=0, help="of all, so many by chance (0: all)")
    parser.add_argument(
        "--pairs", type=int, default=0, help="cases beside these with two odd values at once"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen")
    parser.add_argument("--limit", type=float, default=30, help="seconds that a case may take")
    args = parser.parse_args()
    os.environ.update(
        CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline"
    )
    for name in PRELOADED:
        importlib.import_module(name)

    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        # 1. Files, weights, cases
        work, rng = Path(folder), random.Random(args.seed)
        make_files(work)
        make_weights(work)
        cases = []
        for script in args.scripts or scripts():
            cases += cases_of(script, parser_of(script), work)
        if args.flags:
            cases = [case for case in cases if {*args.flags.split(",")} & {*case.flags}]
        if args.cases:
            cases = rng.sample(cases, min(args.cases, len(cases)))
        for _ in range(args.pairs):
            one = rng.choice(cases)
            other = rng.choice([case for case in cases if case.script == one.script])
            cases.append(Case(one.script, one.words + other.words[-1:], one.flags + other.flags))

        # 2. Run them
        begin, codes, faults, longest = time.monotonic(), Counter(), [], 0.0
        for number, case in enumerate(cases):
            code, out, err, beside, seconds = run(case, work, args.limit)
            if fault := fault_of(case, code, out, err, beside):
                faults.append(case)
                print(f"FAULT {fault}\n      {str(case)[:1500]}", flush=True)
            codes[code] += 1
            longest = max(longest, seconds)
            if (number + 1) % 200 == 0:
                print(
                    f"{number + 1} of {len(cases)} cases, {len(faults)} faults",
                    file=sys.stderr,
                    flush=True,
                )
        how = ", ".join(
            f"{count:,} with code {code}" for code, count in sorted(codes.items(), key=str)
        )
        took = f"{time.monotonic() - begin:,.0f} s, the longest {longest:.1f} s"
        of = f"{len(cases):,} cases of {len({case.script for case in cases})} scripts"
        print(f"{of}: {how}; {len(faults)} faults; {took}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

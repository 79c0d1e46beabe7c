"""Give every flag of every script odd values: each has to make a run or one line that says what to
mend, at once.

The flags are read from the scripts' own parsers, so that a new one is covered, and a new script as
well. A case is a fork of a process that has imported what the scripts import: it trains for real,
one step of a tiny model, and takes a part of a second. A fault is: a traceback, no end within
--limit seconds, an exit code that is neither 0 nor 2 (1 of doctor.py, which found something), more
than one line on stderr with code 2, or a file outside of --out_dir. Streams that are closed, that
nobody reads, and that are full are odd values, too.

    python benchmarks/fuzz_flags.py                                    all of them: hours
    python benchmarks/fuzz_flags.py --streams                          no odd flags, but odd streams
    python benchmarks/fuzz_flags.py --cases 2000 --seed 1              so many of them, chosen by the seed
    python benchmarks/fuzz_flags.py --scripts trainer/train_ppo.py --flags temperature gamma
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.distributed.orphans import signal_when_parent_dies
from runtime.flags import BOUNDS

GROUPS = ("trainer/train_*.py", "trainer/engines/*.py", "eval_model.py", "main.py", "scripts/*.py",
          "dataset/make_demo.py")  # fmt: skip
PRELOADED = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.pipelining",
             "torch._dynamo", "transformers.models.auto.tokenization_auto")  # fmt: skip
# What makes a run tiny, of every script that has such a flag; WORK stands for the folder of
# `make_files`.
TINY = {
    "data_path": "WORK/sft.jsonl",
    "cache_dir": "WORK/cache",
    "out_dir": "WORK/out",
    "device": "cpu",
    "from_weight": "none",
    "dim": 32,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_experts": 2,
    "n_experts_per_tok": 1,
    "max_seq_len": 64,
    "batch_size": 2,
    "max_steps": 1,
}
ROLLOUTS = {"data_path": "WORK/prompts.jsonl", "max_new_tokens": 4, "group_size": 2}
MODEL = {"out_dir": "WORK/weights", "weight": "full_sft", "lora": "lora"}
OWN = {
    "trainer/train_pretrain.py": TINY | {"data_path": "WORK/text.jsonl"},
    "trainer/train_tokenizer.py": {
        "data_path": "WORK/text.jsonl",
        "out_dir": "WORK/out",
        "hold_out": 0,
        "vocab_size": 272,
    },
    "trainer/train_lora.py": TINY | {"lora_rank": 2},
    "trainer/train_distillation.py": TINY | {"teacher_weight": "WORK/weights/full_sft_32.pth"},
    "trainer/train_reward.py": TINY | {"data_path": "WORK/pairs.jsonl"},
    "trainer/train_dpo.py": TINY | {"data_path": "WORK/pairs.jsonl"},
    "trainer/train_grpo.py": TINY | ROLLOUTS,
    "trainer/train_ppo.py": TINY | ROLLOUTS,
    "trainer/engines/train_sft_pipeline.py": TINY | {"pipeline_parallel": 1},
    "eval_model.py": MODEL | {"device": "cpu", "prompt": "hi", "max_new_tokens": 4},
    "scripts/convert.py": MODEL,
    "scripts/lm_eval_adapter.py": MODEL,
    "scripts/report.py": {"out": "WORK/out/report.html"},
    "scripts/serve.py": {
        "out_dir": "WORK/weights",
        "device": "cpu",
        "port": 0,
        "max_concurrent": 2,
        "grace": 1,
    },
    "scripts/plan.py": TINY | {"data_path": "none"},
    "scripts/doctor.py": {"out_dir": "WORK/out"},
    "scripts/check_copies.py": {},
    "dataset/make_demo.py": {"out_dir": "WORK/out", "pairs": 4, "persona": 2, "rl_prompts": 4},
}
# What a script is given first; where that is a command, the flags are the command's.
COMMAND = {
    "scripts/convert.py": ["to-hf", "WORK/weights/full_sft_32.pth", "WORK/out/hf"],
    "scripts/report.py": ["WORK/weights/lora_32"],
}
# Scripts that hand all flags they do not know to a stage.
STARTERS = ("main.py", "scripts/plan.py", "scripts/prepare_data.py", "scripts/run_distributed.py")
# Scripts whose output is all that they make: they end when nobody reads it.
PRODUCTS = ("eval_model.py", "scripts/plan.py", "scripts/doctor.py")
# Scripts that need what is not here: tasks of another package, its weights.
INCOMPLETE = ("scripts/lm_eval_adapter.py", "scripts/smollm2_from_package.py")
STREAMS = ("closed", "no reader", "full")  # what stdin, stdout and stderr may be; see `set_streams`
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
# Forty mappings, each merging the one before twice: a loader that does not remember makes 2 ** 40
# of them.
YAML += [
    "\n".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}" for n in range(40)).replace(
        "[*b-1, *b-1]", "{NAME: 1}"
    )
]


@dataclass
class Case:
    script: str  # relative to ROOT
    words: list[str]
    flags: tuple[str, ...] = ()  # that have odd values
    streams: str = ""  # of STREAMS; else files

    def __str__(self) -> str:
        return f"{self.script} {self.streams} ... {' '.join(map(ascii, self.words[-3:]))}"


class Found(BaseException):
    """Ends a script when its parser is known."""


# --------------------------------------------------------------------------------------------------
# Scripts and their flags
# --------------------------------------------------------------------------------------------------


def scripts() -> list[str]:
    """All files of GROUPS that parse a command line."""
    paths = [path for group in GROUPS for path in sorted(ROOT.glob(group))]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    return [
        name for name, text in texts.items() if "ArgumentParser(" in text and "__main__" in text
    ]


@functools.cache
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
        commands = [a for a in parsers[0]._actions if isinstance(a, argparse._SubParsersAction)]
        return commands[0].choices[COMMAND[script][0]] if commands else parsers[0]
    finally:
        sys.argv = argv
        for name in names:
            setattr(argparse.ArgumentParser, name, kept[name])
    raise AssertionError(f"{script} parses no command line")


def base_flags(script: str, work: Path) -> list[str]:
    """The words of a tiny run that ends well."""
    flags = OWN.get(script, TINY)
    known = parser_of(script)._option_string_actions
    known = [
        *known,
        *(
            parser_of("trainer/train_full_sft.py")._option_string_actions
            if script in STARTERS
            else ()
        ),
    ]
    words = [f"--{name}={value}" for name, value in flags.items() if f"--{name}" in known]
    words = [*COMMAND.get(script, []), *words]
    return [word.replace("WORK", str(work)) for word in words]


def odd_values(action: argparse.Action, work: Path) -> list[list[str]]:
    """What a flag is given, each as many words as it takes."""
    if action.nargs == 0:
        return [[], ["1"]]
    if action.choices:
        right = [*map(str, action.choices)]
        values = [*right, f"{right[0]} ", *" x 2 -1 nan \udcff".split(" ")]
    elif action.type in (int, float):
        values = WHOLE if action.type is int else REAL
    else:
        values = [*WORDS, *(str(work / f"{kind}{ending}") for kind in FILES for ending in ENDINGS)]
    several = [["none", "none"], ["a", ""], ["\udcff", "a"]] if action.nargs == "+" else []
    return [*([value] for value in values), *several]


def cases_of(script: str, work: Path) -> list[Case]:
    """A script without odd values, with odd streams, with one odd value at a time, and with odd
    YAML."""
    base, actions = base_flags(script, work), parser_of(script)._actions
    actions = [action for action in actions if action.option_strings]
    found = [Case(script, base), *(Case(script, base, streams=streams) for streams in STREAMS)]
    for action in actions:
        name = action.option_strings[-1].removeprefix("--")
        for values in odd_values(action, work):
            words = [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
            if (name, "".join(values)) not in SLOW:
                found.append(Case(script, [*base, *words], (name,)))
    takes_yaml = any("--config" in action.option_strings for action in actions)
    for name in [action.dest for action in actions if action.nargs != 0] if takes_yaml else []:
        others = [word for word in base if not word.startswith(f"--{name}=")]
        for number, text in enumerate(YAML if name not in ("config", "compile") else ()):
            path = work / "yaml" / f"{name}_{number}.yaml"
            path.write_text(text.replace("NAME", name))
            found.append(Case(script, [*others, f"--config={path}"], ("config", name)))
    strange = ("stray", "--unknown=1", "--", "-x", "@file", "\udcff")
    return [*found, *(Case(script, [*base, word], ("",)) for word in strange)]


# --------------------------------------------------------------------------------------------------
# Running a case
# --------------------------------------------------------------------------------------------------


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
    for name in ("weights", "cases", "yaml"):
        (work / name).mkdir()
    make_weights(work)


def make_weights(work: Path) -> None:
    """A model and an adapter of it."""
    from model.lm import LMConfig, MiniMindLM
    from runtime.checkpoint import save_file

    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len")
    config = LMConfig(**{name: TINY[name] for name in sizes}, vocab_size=6400)
    save_file(work / "weights/full_sft_32.pth", MiniMindLM(config).state_dict())
    save_file(work / "weights/full_sft_32.json", config.to_json())
    script = "trainer/train_lora.py"
    words = [f"--out_dir={work / 'weights'}", f"--from_weight={work / 'weights/full_sft_32.pth'}"]
    ended = run(Case(script, [*base_flags(script, work), *words]), work, 300)
    assert ended.code == 0, ended


def stub_what_takes_long(script: str) -> None:
    """A launcher has done its part when it starts the training, a server when it has started;
    doctor's processes would talk for seconds."""
    if script == "scripts/serve.py":
        import uvicorn

        async def startup(self, sockets=None) -> None:
            await start_server(self, sockets)
            self.should_exit = True

        start_server, uvicorn.Server.startup = uvicorn.Server.startup, startup
    if script == "scripts/run_distributed.py":
        subprocess.Popen = lambda *args, **kwargs: sys.exit(0)
    if script == "scripts/doctor.py":
        from runtime.distributed import link

        link.run_processes = lambda *_: (
            '{"ranks": 2, "bandwidth": 1e9, "latency": 1e-5, "right": true}'
        )


@dataclass
class Ended:
    """How a case went."""

    code: int | None  # exit code; None: it did not end
    out: str
    err: str
    log: str  # of a training run
    beside: set[str]  # what it left beside --out_dir
    seconds: float


def run(case: Case, work: Path, limit: float) -> Ended:
    """Run a script in a fork of this process, in a folder of its own."""
    folder, begin = Path(tempfile.mkdtemp(dir=work / "cases")), time.monotonic()
    (folder / "out").mkdir()
    if (process := os.fork()) == 0:
        be_script(
            case,
            [word.replace(str(work / "out"), str(folder / "out")) for word in case.words],
            folder,
        )
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
    seconds, printed = time.monotonic() - begin, ("stdout", "stderr")
    out, err = ((folder / name).read_text(errors="replace") for name in printed)
    log = "".join(path.read_text() for path in folder.glob("out/*/training.log"))
    beside = {*os.listdir(folder)} - {"out", *printed}
    shutil.rmtree(folder, ignore_errors=True)
    return Ended(code, out, err, log, beside, seconds)


def be_script(case: Case, words: list[str], folder: Path) -> None:
    """What the fork does; it never returns."""
    code = 1
    try:
        os.setsid()
        signal_when_parent_dies(signal.SIGKILL)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        set_streams(case.streams)
        stub_what_takes_long(case.script)
        sys.argv = [str(ROOT / case.script), *words]
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


def set_streams(kind: str) -> None:
    """Give this process its stdin, stdout and stderr: files, or closed ones, or on stdout what
    cannot be written to."""
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    if kind == "closed":
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None
        return
    if kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    if kind == "no reader":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)


def fault_of(case: Case, ended: Ended) -> str:
    """What is wrong with how a case went; an empty string where nothing is."""
    code, err = ended.code, ended.err
    right = {0, 1} if case.script == "scripts/doctor.py" else {0}  # 1: doctor has found something
    if case.flags or case.script in INCOMPLETE:
        right.add(2)
    if case.streams in ("no reader", "full") and case.script in PRODUCTS:
        right = {141} if case.streams == "no reader" else {1}
    if code is None:
        return "no end"
    if "Traceback" in ended.out + err:
        return f"traceback: {' / '.join((ended.out + err).strip().splitlines()[-3:])[:300]}"
    if code not in right:
        return f"exit code {code}: {err.strip()[-300:]}"
    if (
        code == 2
        and not case.streams
        and not (err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1100)
    ):
        return f"not one line: {err[:300]!r}"
    if (
        case.streams
        and "max_steps" in str(case.words)
        and ended.log
        and "finished; " not in ended.log
    ):
        return f"training.log does not have everything: {ended.log[-300:]!r}"
    if ended.beside and case.flags == ("save_weight",):
        return f"written outside of --out_dir: {sorted(ended.beside)}"
    return ""


def unbounded(names: set[str]) -> list[tuple[str, str]]:
    """The flags of scripts that take any number."""
    actions = [(name, action) for name in sorted(names) for action in parser_of(name)._actions]
    numbers = [
        (name, action)
        for name, action in actions
        if action.type in (int, float) and not action.choices
    ]
    return [(name, action.dest) for name, action in numbers if action.dest not in BOUNDS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", help="of the repository (default: all)")
    parser.add_argument("--flags", nargs="+", help="names (default: all)")
    parser.add_argument("--cases", type=int, default=0, help="of all, so many by chance (0: all)")
    parser.add_argument(
        "--pairs", type=int, default=0, help="cases beside these with two odd values at once"
    )
    parser.add_argument(
        "--streams", action="store_true", help="odd streams alone, and no odd values"
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
        # 1. Files, cases
        work, rng = Path(folder), random.Random(args.seed)
        make_files(work)
        cases = [case for script in args.scripts or scripts() for case in cases_of(script, work)]
        if args.flags:
            cases = [case for case in cases if {*args.flags} & {*case.flags}]
        if args.streams:
            cases = [case for case in cases if not case.flags]
        if args.cases:
            cases = rng.sample(cases, min(args.cases, len(cases)))
        singles = [case for case in cases if case.flags]
        for one in rng.choices(singles, k=args.pairs):
            other = rng.choice([case for case in singles if case.script == one.script])
            cases.append(Case(one.script, one.words + other.words[-1:], one.flags + other.flags))

        # 2. Run them
        begin, codes, faults, longest = time.monotonic(), Counter(), 0, 0.0
        for script, flag in unbounded({case.script for case in cases}):
            faults += 1
            print(f"FAULT no bounds in runtime/flags.py\n      {script} --{flag}")
        for number, case in enumerate(cases, 1):
            ended = run(case, work, args.limit)
            if ended.code is None:  # perhaps the machine is busy
                ended = run(case, work, 5 * args.limit)
            if fault := fault_of(case, ended):
                faults += 1
                print(f"FAULT {fault}\n      {str(case)[:1500]}", flush=True)
            codes[ended.code] += 1
            longest = max(longest, ended.seconds)
            if number % 200 == 0:
                print(
                    f"{number} of {len(cases)} cases, {faults} faults", file=sys.stderr, flush=True
                )
        how = ", ".join(
            f"{count:,} with code {code}" for code, count in sorted(codes.items(), key=str)
        )
        took = f"{time.monotonic() - begin:,.0f} s, the longest {longest:.1f} s"
        print(
            f"{len(cases):,} cases of {len({case.script for case in cases})} scripts: {how};"
            f" {faults} faults; {took}"
        )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())

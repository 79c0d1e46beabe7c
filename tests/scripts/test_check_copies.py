"""scripts/check_copies.py: every kind of finding on a small tree, --fix, and the real tree."""

import subprocess
import sys
import textwrap

import pytest
from running import ROOT

PRETRAIN = '''
    """A stage."""
    DTYPES = ("float32", "bfloat16")


    # Cosine, see the paper.
    @staticmethod
    def get_lr(step, total):
        """A schedule."""
        text = """kept
      as it is"""
        # why
        return step / total
        # the end


    def evaluate(model):
        return 1


    class Meter:
        total = 0


    def train_epoch():
        return "pretrain"


    def parse_args(parser):
        parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision")
        parser.add_argument("--lr", type=float, default=1e-3, help="peak "
                            "rate")


    def main():
        parse_args()
'''
DPO = '''
    CHOICES = ("float32", "bfloat16")


    # Copied from trainer.train_pretrain.get_lr
    @staticmethod
    def get_lr(step, total):
        """A schedule."""
        text = """kept
      as it is"""
        # why
        return step / total
        # the end


    # Differs from trainer.train_pretrain.evaluate: scores pairs
    def evaluate(model):
        return 2


    # Copied from trainer.train_pretrain.Meter
    class Meter:
        total = 0


    def train_epoch():
        return "dpo"


    def parse_args(parser):
        parser.add_argument("--dtype", choices=CHOICES, default="bfloat16", help="precision")
        parser.add_argument("--lr", type=float, default=5e-6, help="peak rate")


    def main():
        return parse_args
'''


def check(root, *flags):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "check_copies.py"),
        "--root",
        str(root),
        *flags,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stderr == "" or result.returncode == 2
    return result.returncode, result.stdout.splitlines()


@pytest.fixture
def tree(tmp_path):
    """tree(dpo=..., lora=...): a folder with train_pretrain.py, train_dpo.py and more scripts."""

    def make(pretrain=PRETRAIN, dpo=DPO, **more):
        (tmp_path / "trainer").mkdir(exist_ok=True)
        for stage, source in {"pretrain": pretrain, "dpo": dpo, **more}.items():
            (tmp_path / "trainer" / f"train_{stage}.py").write_text(
                textwrap.dedent(source), encoding="utf-8"
            )
        return tmp_path

    return make


def test_the_real_tree_agrees():
    code, lines = check(ROOT)
    assert (code, len(lines)) == (0, 1), "\n".join(lines)


def test_a_tree_that_agrees(tree):
    assert check(tree()) == (0, ["check_copies: 2 scripts with 2 copies and 2 shared flags agree"])


def test_trailing_whitespace_and_line_ends_are_no_difference(tree):
    root = tree(dpo=DPO.replace("return step / total", "return step / total  "))
    path = root / "trainer" / "train_dpo.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert check(root)[0] == 0


# What is changed in DPO, and the one finding that comes of it.
SPOILED = {
    "code": ("return step / total", "return total / step", "get_lr differs from its original"),
    "comment": ("    # why", "    # because", "get_lr differs from its original"),
    "comment at the end": ("    # the end", "    # the end?", "get_lr differs from its original"),
    "docstring": ("A schedule", "The schedule", "get_lr differs from its original"),
    "decorator": ("@staticmethod", "@classmethod", "get_lr differs from its original"),
    "class": ("    total = 0", "    total = 1", "Meter differs from its original"),
    "unmarked function": (
        "    # Copied from trainer.train_pretrain.get_lr\n",
        "",
        (
            "get_lr is defined in trainer/train_pretrain.py:8 too: put '# Copied from"
            " trainer.train_pretrain.get_lr'"
        ),
    ),
    "unmarked class": (
        "    # Copied from trainer.train_pretrain.Meter\n",
        "",
        "Meter is defined in trainer/train_pretrain.py:21 too",
    ),
    "marker of no script": (
        "train_pretrain.Meter",
        "train_sft.Meter",
        "names trainer.train_sft.Meter, which no other",
    ),
    "marker of no function": (
        "Meter\n    class Meter",
        "Rate\n    class Rate",
        "names trainer.train_pretrain.Rate,",
    ),
    "marker of itself": (
        "train_pretrain.Meter",
        "train_dpo.Meter",
        "names trainer.train_dpo.Meter, which no other",
    ),
    "marker of another": (
        "train_pretrain.get_lr",
        "train_pretrain.Meter",
        "names Meter, the def is get_lr",
    ),
    "differs without reason": ("evaluate: scores pairs", "evaluate:", "malformed marker"),
    "differs without colon": ("evaluate: scores pairs", "evaluate", "malformed marker"),
    "differs but equal": (
        "return 2",
        "return 1",
        "equals trainer/train_pretrain.py:17: mark it as copied",
    ),
    "other spelling": (
        "# Copied from trainer.train_pretrain.Meter",
        "#copied from trainer/x.py",
        "malformed",
    ),
    "marker behind code": (
        "def main():",
        "def main():  # Copied from trainer.x.main",
        "stands behind code",
    ),
    "blank line below": ("get_lr\n", "get_lr\n\n", "marker is not directly above"),
    "marker inside": (
        "        return 2",
        "        # Copied from trainer.train_pretrain.Meter\n        return 2",
        "marker is not directly above",
    ),
    "flag type": (
        "type=float",
        "type=int",
        "--lr differs from trainer/train_pretrain.py:31: type is int here, float",
    ),
    "flag choices": ('CHOICES = ("float32",', 'CHOICES = ("float16",', "--dtype differs"),
    "flag help": (
        'help="peak rate"',
        'help="rate"',
        "--lr differs from trainer/train_pretrain.py:31: help",
    ),
    "flag action": (
        "type=float",
        "action='store_true'",
        "type is none here, float there; action is 'store_true' here",
    ),
    "flag nargs": ("type=float", "type=float, nargs='+'", "nargs is '+' here, none there"),
    "flag marker but equal": (
        '        parser.add_argument("--lr"',
        (
            "        # Differs from trainer.train_pretrain.--lr: smaller\n       "
            ' parser.add_argument("--lr"'
        ),
        "equals trainer/train_pretrain.py:31: take the marker away",
    ),
    "flag marker of another": (
        '        parser.add_argument("--lr"',
        (
            "        # Differs from trainer.train_pretrain.--dtype: smaller\n       "
            ' parser.add_argument("--lr"'
        ),
        "only '# Differs from trainer.MODULE.--lr: reason' fits here",
    ),
    "syntax": ("def main():", "def main(:", "cannot be parsed"),
}


@pytest.mark.parametrize("old, new, message", SPOILED.values(), ids=SPOILED)
def test_findings(tree, old, new, message):
    assert old in DPO
    root = tree(dpo=DPO.replace(old, new))
    code, lines = check(root)
    assert code == 1
    assert any(message in line for line in lines), lines
    source = (root / "trainer" / "train_dpo.py").read_text().split("\n")
    for line in lines:  # each names the file and a line that is there
        file, number, _ = line.split(":", 2)
        assert file == "trainer/train_dpo.py" and 1 <= int(number) <= len(source)


def test_a_difference_names_its_line(tree):
    root = tree(dpo=DPO.replace("# why", "# because"))
    source = (root / "trainer" / "train_dpo.py").read_text().split("\n")
    assert check(root)[1][0].startswith(
        f"trainer/train_dpo.py:{source.index('    # because') + 1}: "
    )


def test_two_scripts_without_a_marker_and_without_the_first(tree):
    code, lines = check(tree(lora="def merge():\n    pass\n", grpo="def merge():\n    return\n"))
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith(
        "trainer/train_lora.py:1: merge is defined in trainer/train_grpo.py:1 too"
    )


def test_a_copy_of_a_copy(tree):
    lora = DPO.replace("train_pretrain.Meter", "train_dpo.Meter")
    code, lines = check(tree(lora=lora))
    assert code == 1 and len(lines) == 1
    assert "trainer/train_dpo.py:22 is itself a copy: name trainer.train_pretrain.Meter" in lines[0]


def test_a_copy_of_what_differs(tree):
    marker = "Differs from trainer.train_pretrain.evaluate: scores pairs"
    assert check(tree(lora=DPO.replace(marker, "Copied from trainer.train_dpo.evaluate")))[0] == 0


def test_a_flag_may_differ_with_a_reason(tree):
    marked = (
        "        # Differs from trainer.train_pretrain.--lr: whole numbers\n       "
        ' parser.add_argument("--lr"'
    )
    dpo = DPO.replace('        parser.add_argument("--lr"', marked).replace(
        "type=float", "type=int"
    )
    assert check(tree(dpo=dpo))[0] == 0


def test_flags_of_a_group_by_a_short_name(tree):
    """`add = group.add_argument` adds flags, too, and a local name stands for its value."""
    short = """        add = parser.add_argument_group("optimisation").add_argument
        kinds = ("float32", "bfloat16")
        add("--dtype", choices=kinds, default="bfloat16", help="precision")
        add("--lr", type=float, default=5e-6, help="peak rate")
"""
    begin, end = DPO.index("        parser.add_argument("), DPO.index("\n\n    def main")
    dpo = DPO[:begin] + short + DPO[end:]
    assert check(tree(dpo=dpo)) == check(tree())
    code, lines = check(tree(dpo=dpo.replace("type=float", "type=int")))
    assert code == 1 and len(lines) == 1 and "--lr differs" in lines[0]
    code, lines = check(tree(dpo=dpo.replace('("float32", "bf', '("float16", "bf')))
    assert code == 1 and "--dtype differs" in lines[0]


def test_the_tokenizer_is_no_stage(tree):
    """It shares no flags, but must not define a helper again."""
    tokenizer = 'def parse_args(parser):\n    parser.add_argument("--lr", nargs="+")\n'
    assert check(tree(tokenizer=tokenizer))[0] == 0
    code, lines = check(tree(tokenizer=tokenizer + "\n\ndef get_lr():\n    pass\n"))
    assert (
        code == 1
        and len(lines) == 1
        and lines[0].startswith("trainer/train_tokenizer.py:5: get_lr is defined in")
    )


def test_fix_rewrites_the_marked_copies_and_nothing_else(tree):
    spoiled = DPO.replace(
        "return step / total\n        # the end", "if step:\n            return 7\n        return 9"
    )
    root = tree(dpo=spoiled.replace("total = 0", "total = 0\n        count = 0\n"))
    path = root / "trainer" / "train_dpo.py"
    path.chmod(0o750)

    code, lines = check(root, "--fix")
    assert code == 0 and len(lines) == 3
    assert "get_lr rewritten from trainer/train_pretrain.py:8" in lines[0]
    fixed = path.read_text(encoding="utf-8")
    assert fixed.replace("\n\n\n\n", "\n\n\n") == textwrap.dedent(DPO)
    assert path.stat().st_mode & 0o777 == 0o750
    assert sorted(p.name for p in path.parent.iterdir()) == ["train_dpo.py", "train_pretrain.py"]

    before = path.stat().st_mtime_ns
    assert check(root, "--fix") == (0, lines[2:])  # a second time there is nothing to do
    assert path.stat().st_mtime_ns == before and path.read_text(encoding="utf-8") == fixed


def test_fix_leaves_what_only_a_person_can_decide(tree):
    root = tree(
        dpo=DPO.replace("return step / total", "return 0").replace("type=float", "type=int")
    )
    code, lines = check(root, "--fix")
    assert code == 1 and len(lines) == 2
    assert "rewritten" in lines[0] and "--lr differs" in lines[1]


def test_a_folder_without_scripts_is_a_wrong_call(tmp_path):
    assert check(tmp_path) == (2, [])

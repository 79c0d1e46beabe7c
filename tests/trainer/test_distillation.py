"""Distillation: divergences and their gradients, losses by chunks, and runs beside a teacher."""

import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import RUN_FLAGS, SIZES, check_same_run, curve
from running import run_script
from stage_runs import resumed_three_times, same_bits

from model.distillation import Student, make_teacher, read_teacher_config
from model.lm import LMConfig, MiniMindLM
from model.weights import load_weights
from runtime.launch import check_flags
from trainer.train_distillation import chunk_losses, divergence

KINDS = ("forward", "reverse", "js")


def student_of(config: LMConfig, teacher, kind: str, temperature: float, **options) -> Student:
    losses_of = functools.partial(chunk_losses, kind=kind, temperature=temperature)
    return Student(config, teacher, losses_of, **options)


def reference(student, teacher, kind: str, temperature: float):
    """The textbook formulas, in float64 on probabilities."""
    q, p = ((logits.double() / temperature).softmax(dim=-1) for logits in (student, teacher))
    m = (p + q) / 2
    kl = {
        "forward": (p * (p / q).log()).sum(dim=-1),
        "reverse": (q * (q / p).log()).sum(dim=-1),
        "js": ((p * (p / m).log()).sum(dim=-1) + (q * (q / m).log()).sum(dim=-1)) / 2,
    }
    return kl[kind] * temperature**2


# --------------------------------------------------------------------------------------------------
# The losses
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_and_gradient_are_the_formula(kind, temperature):
    student, teacher = (torch.randn(7, 50, dtype=torch.float64) * 3 for _ in range(2))
    values, gradients = [], []
    for function, dtype in ((divergence, torch.float32), (reference, torch.float64)):
        logits = student.to(dtype).requires_grad_()
        values.append(function(logits, teacher.to(dtype), kind, temperature))
        values[-1].sum().backward()
        gradients.append(logits.grad.double())
    assert values[0].dtype == torch.float32 and (values[0] >= 0).all()
    assert torch.allclose(values[0].detach().double(), values[1].detach(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(*gradients, atol=1e-6 * max(1.0, temperature**2))


def test_divergence_against_torch():
    """Forward and reverse KL by torch's own function."""
    student, teacher = torch.randn(9, 30), torch.randn(9, 30)
    logs = [logits.log_softmax(dim=-1) for logits in (student, teacher)]
    for kind, (q, p) in (("forward", logs), ("reverse", logs[::-1])):
        expected = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)
        assert torch.allclose(divergence(student, teacher, kind, 1.0), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_equals_is_zero_and_of_strangers_is_finite(kind):
    logits = torch.tensor([[200.0, -200.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    assert divergence(logits, logits.detach(), kind, 1.0).abs().max() < 1e-6
    far = divergence(logits, logits.detach().flip(1), kind, 1.0)
    far.sum().backward()
    assert far.isfinite().all() and logits.grad.isfinite().all()


def test_js_is_symmetric_and_bounded():
    a, b = torch.randn(20, 10) * 30, torch.randn(20, 10) * 30
    js = divergence(a, b, "js", 1.0)
    assert (
        torch.allclose(js, divergence(b, a, "js", 1.0), atol=1e-6)
        and js.max() <= torch.log(torch.tensor(2.0)) + 1e-6
    )


def test_gradient_keeps_its_size_whatever_the_temperature():
    """That is what the factor temperature^2 is for: Hinton et al., section 2."""
    student, teacher = torch.randn(50, 40, requires_grad=True), torch.randn(50, 40)
    norms = []
    for temperature in (20.0, 40.0):
        norms.append(
            torch.autograd.grad(
                divergence(student, teacher, "forward", temperature).sum(), student
            )[0].norm()
        )
    assert norms[1] / norms[0] == pytest.approx(1.0, abs=0.05)


# --------------------------------------------------------------------------------------------------
# A chunk at a time
# --------------------------------------------------------------------------------------------------

SHAPE = {**SIZES, "vocab_size": 700, "max_seq_len": 64}


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(1)
    model = MiniMindLM(LMConfig(**{**SHAPE, "dim": 48, "n_layers": 3}))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    (tmp_path / "teacher.json").write_text(model.config.to_json())
    return tmp_path / "teacher.pth"


def load_teacher(path) -> MiniMindLM:
    model = make_teacher(read_teacher_config(path, 700, 64))
    load_weights(model, path)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": False}, {"use_moe": True}], ids=["dense", "untied", "moe"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(teacher, kind, options):
    """Values and gradients are those of all logits at once, made in the plain way."""
    X, lens = torch.randint(700, (1, 60)), [25, 35]
    at = torch.arange(0, 59, 2)  # 30 tokens: chunks of 7 leave a rest
    targets = X[0, at + 1]
    plain, whole = (
        MiniMindLM(LMConfig(**SHAPE, **options)),
        MiniMindLM(LMConfig(**{**SHAPE, "dim": 48, "n_layers": 3})),
    )
    whole.load_state_dict(torch.load(teacher, weights_only=True))
    out = plain(X, doc_lens=lens, logits_at=at)
    with torch.no_grad():
        theirs = whole(X, doc_lens=lens, logits_at=at).logits
    expected = (
        F.cross_entropy(out.logits, targets, reduction="sum"),
        divergence(out.logits, theirs, kind, 2.0).sum(),
    )
    (expected[0] + 3 * expected[1] + out.aux_loss).backward()
    for chunk in (7, 30, 512):
        student = student_of(plain.config, load_teacher(teacher), kind, 2.0, chunk=chunk)
        student.load_state_dict(plain.state_dict())
        ce, kl, aux_loss = student(X, lens, at, targets)
        (ce + 3 * kl + aux_loss).backward()
        assert [ce.item(), kl.item()] == pytest.approx(
            [value.item() for value in expected], rel=1e-6
        )
        for (name, ours), wanted in zip(
            student.named_parameters(), plain.parameters(), strict=True
        ):
            assert (ours.grad - wanted.grad).norm() <= 1e-6 * wanted.grad.norm() + 1e-7, name


def test_logits_exist_for_a_chunk_only(teacher):
    """No tensor of logits that autograd keeps, or that a pass makes, is larger than a chunk's."""
    student = student_of(LMConfig(**SHAPE), load_teacher(teacher), "js", 1.0, chunk=4)
    X, at = torch.randint(700, (1, 64)), torch.arange(60)
    sizes, kept = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                t.shape for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    def pack(t):
        kept.append(t.shape)
        return t

    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ce, kl, _ = student(X, [64], at, X[0, at])
        (ce + kl).backward()
    rows = {shape[0] for shape in sizes if len(shape) == 2 and shape[1] == 700}
    assert rows == {4, 32, 48}  # logits of a chunk; the two heads, transposed
    assert not [shape for shape in kept if len(shape) == 2 and shape[1] == 700]


def test_a_rank_without_a_token_takes_part(teacher):
    student = student_of(LMConfig(**SHAPE), load_teacher(teacher), "forward", 1.0)
    none = torch.zeros(0, dtype=torch.int64)
    ce, kl, aux_loss = student(torch.zeros(1, 1, dtype=torch.int64), [], none, none)
    (ce + kl + aux_loss).backward()
    assert (ce.item(), kl.item()) == (0, 0) and all(
        p.grad is not None for p in student.parameters()
    )


def test_teacher_that_does_not_match(teacher):
    model = load_teacher(teacher)
    names = [name for name, _ in student_of(LMConfig(**SHAPE), model, "js", 1.0).named_parameters()]
    assert names == [name for name, _ in MiniMindLM(LMConfig(**SHAPE)).named_parameters()]
    for arguments, message in [
        (
            (701, 64),
            "--teacher_weight .*: it has a vocabulary of 700, the student's tokenizer has 701",
        ),
        ((700, 65), "--max_seq_len 65: the context of the teacher is 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_teacher_config(teacher, *arguments)


@pytest.mark.parametrize("flag", [{"kl_weight": 1.5}, {"kl_weight": -0.1}, {"kl_temperature": 0.0}])
def test_flags_that_make_no_sense(flag):
    (name, value), *_ = flag.items()
    with pytest.raises(ValueError, match=f"--{name} {value}: must be"):
        check_flags({"device": "cpu", **flag})


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

RUN = "--from_weight=none --global_batch_size=4 --replica_check=1 --eval_ratio=0.1 --epochs=2 --kl=js".split()
RUN += ["--kl_temperature=2"]


@pytest.fixture(scope="module")
def train(job, tmp_path_factory, tokenizer):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    model = MiniMindLM(LMConfig(**{**SIZES, "dim": 48}, vocab_size=len(tokenizer), max_seq_len=128))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(model.config.to_json())
    run = functools.partial(job, script="train_distillation")

    def start(name, *flags, **options):
        return run(name, 90, *RUN, f"--teacher_weight={path}", *flags, **options)

    start.teacher = path
    return start


@pytest.fixture(scope="module")
def one(train):
    return train("one", "--batch_size=2", "--max_steps=20")


@pytest.mark.parametrize(
    "strategy, batch_size", [("ddp", 2), ("ddp", 1), ("zero1", 2), ("zero2", 2), ("zero3", 1)]
)
def test_two_ranks_are_one_process(train, one, strategy, batch_size):
    name, flags = (
        f"{strategy}_{batch_size}",
        [f"--strategy={strategy}", f"--batch_size={batch_size}"],
    )
    run = train(name, *flags, "--max_steps=20", nproc=2)
    check_same_run(run, one)
    for key in ("ce_loss", "kl_loss", "eval_kl"):
        values = [[line[key] for line in curve(path) if key in line] for path in (run, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0]


def test_loss_is_the_mixture_and_falls(one):
    lines = [line for line in curve(one) if "loss" in line]
    for line in lines:
        assert line["loss"] == pytest.approx((line["ce_loss"] + line["kl_loss"]) / 2, rel=1e-6)
    assert (
        lines[-1]["ce_loss"] < lines[0]["ce_loss"] and lines[-1]["kl_loss"] != lines[0]["kl_loss"]
    )


def test_without_divergence_it_is_sft(train, job):
    flags = ["--batch_size=4", "--max_steps=6"]
    reference = job("sft", 90, *RUN[:-2], *flags)
    check_same_run(train("ce", *flags, "--kl_weight=0"), reference)


def test_mixture_of_experts_on_two_ranks(train):
    flags = ["--use_moe=1", "--n_shared_experts=1", "--max_steps=6"]
    reference = train("moe", *flags, "--batch_size=4")
    check_same_run(train("moe_2", *flags, "--strategy=zero3", "--batch_size=1", nproc=2), reference)
    assert all(line["aux_loss"] > 0 for line in curve(reference) if "loss" in line)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(train, one, dtype):
    lines = [
        line["loss"]
        for line in curve(train(dtype, f"--dtype={dtype}", "--max_steps=4"))
        if "loss" in line
    ]
    assert lines == pytest.approx(
        [line["loss"] for line in curve(one) if "loss" in line][:4], rel=0.02
    )


def test_three_resumes_are_bit_identical(train):
    flags = ["--dropout=0.1", "--batch_size=4"]
    same_bits(
        resumed_three_times(train, *flags),
        train("whole", *flags, "--save_interval=2", "--max_steps=8"),
    )


def test_another_teacher_is_another_run(train, one, job):
    """Also: exit code and line of a user's mistake."""
    state = torch.load(train.teacher, weights_only=True)
    state["model.norm.weight"] += 1
    other = train.teacher.with_name("other.pth")
    torch.save(state, other)
    shutil.copy(train.teacher.with_suffix(".json"), other.with_suffix(".json"))
    flags = [
        *RUN_FLAGS,
        *RUN,
        "--batch_size=2",
        f"--data_path={job.data[90]}",
        f"--cache_dir={job.folder / 'cache'}",
    ]
    flags += [
        f"--teacher_weight={other}",
        f"--out_dir={one.parent}",
        "--resume=auto",
        "--max_steps=20",
    ]
    done = run_script("trainer/train_distillation.py", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "this is another run: the weights of --teacher_weight was" in done.stderr

"""--optimizer lamb: the paper's update, the same on any number of processes, and resumed to the
last bit."""

import math

import numpy as np
import pytest
import torch
from conftest import check_same_run, curve, losses
from stage_runs import same_bits
from torch import nn

from runtime.optim import make_optimizer

BETAS, EPS = (0.9, 0.999), 1e-6  # the paper's
FLAGS = (
    "--optimizer=lamb --use_moe=1 --n_shared_experts=1 --max_steps=6 --global_batch_size=8".split()
)
FLAGS += ["--learning_rate=2e-2", "--eval_ratio=0.1"]


class Sample(nn.Module):
    """One of each kind: a matrix, stacked matrices, a matrix of zeros; a norm's gains, a head with
    one output."""

    def __init__(self):
        super().__init__()
        shapes = {
            "matrix": (5, 3),
            "experts": (2, 3, 4),
            "zeros": (3, 3),
            "gains": (6,),
            "head": (1, 4),
        }
        for name, shape in shapes.items():
            value = torch.zeros(shape) if name in ("zeros", "head") else torch.randn(shape)
            setattr(self, name, nn.Parameter(value.double()))


def algorithm_2(x, gradients, rates, weight_decay: float, adapted: bool):
    """LAMB as You et al. (2020) write it, for one layer with phi(z) = z, element by element in
    plain Python."""
    x = [float(value) for value in x]
    m, v = [0.0] * len(x), [0.0] * len(x)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        step = []
        for i, g in enumerate(gradient):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            r = (m[i] / (1 - BETAS[0] ** t)) / (math.sqrt(v[i] / (1 - BETAS[1] ** t)) + EPS)
            step.append(r + weight_decay * x[i])
        ratio = math.hypot(*x) / math.hypot(*step) if adapted and any(x) else 1.0
        x = [a - rate * ratio * b for a, b in zip(x, step, strict=True)]
    return x


def test_update_is_the_papers():
    model, rates = Sample(), [0.1, 0.05, 0.2, 0.01]
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    gradients = {
        name: [np.random.randn(*value.shape) for _ in rates] for name, value in start.items()
    }
    optimizer = make_optimizer(model, "lamb", lr=1.0, weight_decay=0.3)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[name][step].copy())
        optimizer.step()
    for name, p in model.named_parameters():
        layers = len(start[name]) if name == "experts" else 1  # each expert is a layer of its own
        columns = [g.reshape(layers, -1) for g in gradients[name]]
        decay = 0.0 if name == "gains" else 0.3
        wanted = [
            algorithm_2(x, [g[n] for g in columns], rates, decay, name not in ("gains", "head"))
            for n, x in enumerate(start[name].reshape(layers, -1))
        ]
        np.testing.assert_allclose(
            p.detach().numpy().reshape(layers, -1), wanted, rtol=1e-12, atol=0, err_msg=name
        )


def test_a_layer_without_gradient_stays():
    model = Sample()
    optimizer, before = make_optimizer(model, "lamb", 0.1, 0.0), model.matrix.clone()
    model.matrix.grad, model.gains.grad = torch.zeros_like(model.matrix), None
    optimizer.step()
    assert torch.equal(model.matrix, before) and model.gains.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ddp": "--strategy=ddp --batch_size=2",
    "zero1": "--strategy=zero1 --batch_size=2",
    "zero2": "--strategy=zero2 --batch_size=2",
    "zero3 offload": "--strategy=zero3 --offload=1 --batch_size=4",
    "tensor": "--tensor_parallel=2 --batch_size=4",
}


@pytest.fixture(scope="module")
def one(job):
    return job("one", 90, *FLAGS, "--batch_size=3", "--save_interval=3", "--save_total_limit=9")


def test_it_learns(one):
    assert losses(one)[6] < losses(one)[1] - 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_norms_are_those_of_whole_tensors(job, one, name):
    """Two processes take the steps of one, also where each has but a part of a matrix or some of
    the experts."""
    check_same_run(job(name.replace(" ", "_"), 90, *FLAGS, *LAYOUTS[name].split(), nproc=2), one)


def test_sharded_in_both_ways(job, one):
    flags = "--strategy=zero3 --tensor_parallel=2 --batch_size=4".split()
    resumed = job(
        "four", 90, *FLAGS, *flags, f"--resume={one / 'checkpoints/step_00000003'}", nproc=4
    )
    check_same_run(resumed, one, first=4)


def test_stages_of_a_pipeline(job):
    flags = "--optimizer=lamb --max_steps=4 --global_batch_size=8 --learning_rate=2e-2 --eval_ratio=0.1".split()
    reference = job("dense", 90, *flags, "--batch_size=4")
    check_same_run(
        job("pipeline", 90, *flags, "--batch_size=2", nproc=2, script="train_sft_pipeline"),
        reference,
    )


def test_resumed_to_the_last_bit(job, one):
    resumed = job(
        "again", 90, *FLAGS, "--batch_size=3", f"--resume={one / 'checkpoints/step_00000003'}"
    )
    same_bits(resumed, one, first=3)


def test_float16(job, one):
    lines = curve(job("half", 90, *FLAGS, "--batch_size=3", "--dtype=float16"))
    expected = losses(one)
    assert len(lines) == len(curve(one))
    for line in lines:
        if "loss" in line:
            assert line["loss"] == pytest.approx(expected[line["step"]], rel=0.02)


def test_adapters_are_refused(run_script):
    """They begin at 0, and steps that are a share of a norm never leave it."""
    done = run_script("trainer/train_lora.py", "--optimizer=lamb")
    assert done.returncode == 2 and "argument --optimizer: invalid choice: 'lamb'" in done.stderr

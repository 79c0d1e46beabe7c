"""Two machines: network namespaces of this one, joined by a virtual cable; real launches, kills and
a slow link."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import RUN_FLAGS, conversations, curve, losses, write_jsonl
from running import ROOT, kill_all, start, wait_for_steps, wait_until

HOSTS = (f"mm-test-{os.getpid()}-a", f"mm-test-{os.getpid()}-b")
ADDRESSES = ("10.77.31.1", "10.77.31.2")
CABLES = ("mmtesta", "mmtestb")


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def remove_hosts() -> None:
    """Ours, and those of tests that were killed."""
    for host, process in re.findall(r"^(mm-test-(\d+)-[ab])", ip("netns").stdout, re.MULTILINE):
        if host in HOSTS or not Path(f"/proc/{process}").exists():
            ip("netns", "delete", host)


@pytest.fixture(scope="module")
def hosts():
    """Two hosts with an address each, or a skip where that is not permitted."""
    if not Path("/sbin/ip").exists() and not Path("/usr/sbin/ip").exists():
        pytest.skip("two hosts need the ip command (iproute2)")
    remove_hosts()
    made = [ip("netns", "add", host) for host in HOSTS]
    made.append(
        ip(
            "link",
            "add",
            CABLES[0],
            "netns",
            HOSTS[0],
            "type",
            "veth",
            "peer",
            CABLES[1],
            "netns",
            HOSTS[1],
        )
    )
    for host, address, cable in zip(HOSTS, ADDRESSES, CABLES, strict=True):
        made.append(ip("-n", host, "address", "add", f"{address}/24", "dev", cable))
        made += [ip("-n", host, "link", "set", device, "up") for device in (cable, "lo")]
    if any(done.returncode for done in made):
        remove_hosts()
        pytest.skip(
            "network namespaces are not permitted here: "
            + "".join(done.stderr for done in made).strip()
        )
    yield
    remove_hosts()


@pytest.fixture
def launch(hosts, tmp_path_factory, tmp_path):
    """launch(host, *flags) starts a node of the job; its output is in `.log`."""
    folder, started = tmp_path_factory.getbasetemp() / "multinode", []
    folder.mkdir(exist_ok=True)
    data = write_jsonl(folder / "data.jsonl", conversations(90))
    fixed = [
        *RUN_FLAGS,
        f"--data_path={data}",
        f"--cache_dir={folder / 'cache'}",
        f"--out_dir={tmp_path}",
    ]

    def launch(host: int, *flags: str, restarts: int = 0) -> subprocess.Popen:
        words = [ROOT / "scripts/run_distributed.py", "--nproc_per_node=1", "--nnodes=2"]
        words += [f"--node_rank={host}", f"--master_addr={ADDRESSES[0]}", "--master_port=29531"]
        words += [f"--max_restarts={restarts}", "--algorithm=sft", *fixed, *flags]
        log = tmp_path / f"node{host}-{len(started)}.log"
        with open(log, "w") as output:
            node = start(
                ["tests/in_netns.py", HOSTS[host], *words],
                env={"GLOO_SOCKET_IFNAME": CABLES[host]},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        node.log = log
        started.append(node)
        return node

    yield launch
    for node in started:
        kill_all(node)


def finish(*nodes: subprocess.Popen) -> None:
    for node in nodes:
        assert node.wait(240) == 0, node.log.read_text()


def sent_bytes() -> int:
    """Bytes that the first host has sent through its cable."""
    return int(
        ip(
            "netns", "exec", HOSTS[0], "cat", f"/sys/class/net/{CABLES[0]}/statistics/tx_bytes"
        ).stdout
    )


FLAGS = [
    "--batch_size=4",
    "--global_batch_size=8",
    "--max_steps=6",
    "--from_weight=none",
    "--save_interval=0",
]


def test_a_host_dies_and_comes_back(launch, tmp_path):
    flags = [
        "--max_steps=150",
        "--global_batch_size=2",
        "--batch_size=1",
        "--epochs=100",
        "--from_weight=none",
    ]
    flags += ["--save_interval=5", "--resume=auto"]
    first, second = launch(0, *flags, restarts=3), launch(1, *flags, restarts=3)

    def saved() -> list[Path]:
        assert second.poll() is None, second.log.read_text()
        return list(tmp_path.glob("*/checkpoints/step_*"))

    wait_until(first, saved)  # the run has something to go on from
    kill_all(second)  # the power goes: launcher and worker at once
    again = launch(1, *flags, restarts=3)
    finish(first, again)
    log = first.log.read_text()
    assert "resumed from" in log and log.count("finished; weights in") == 1
    run = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert [line["step"] for line in curve(run)] == [*range(1, 151)]


def test_two_hosts_train_the_curve_of_one_process_over_a_slow_link(launch, job, tmp_path):
    """20 Mbit/s, measured on the cable: four micro-batches a step send no more than one."""
    limit = ["netns", "exec", HOSTS[0], "tc", "qdisc", "replace", "dev", CABLES[0], "root", "tbf"]
    limit = ip(*limit, "rate", "20mbit", "burst", "64kb", "latency", "400ms")
    if limit.returncode:
        pytest.skip(f"the link cannot be slowed down: {limit.stderr.strip()}")
    alone, sent, steps = losses(job("alone", 90, *FLAGS)), {}, 6
    for size in (1, 4):
        flags = [*FLAGS[1:], f"--batch_size={4 // size}", f"--save_weight=x{size}"]
        before = sent_bytes()
        finish(launch(0, *flags), launch(1, *flags))
        sent[size] = sent_bytes() - before
        assert losses(tmp_path / f"x{size}_32") == pytest.approx(alone, rel=1e-5)
    weights = 4 * sum(value.numel() for value in weights_of(tmp_path).values())
    # An all-reduce over two hosts sends the gradients once; the weights go over the cable once, at
    # the start.
    assert steps * weights < sent[1] < 1.3 * (steps + 1) * weights
    assert sent[4] < 1.1 * sent[1], sent


def weights_of(folder: Path) -> dict:
    import torch

    weights = torch.load(next(folder.glob("*.pth")), weights_only=True)
    del weights["lm_head.weight"]  # tied
    return weights


def test_hosts_with_other_flags_are_refused(launch):
    nodes = [
        launch(host, *FLAGS, f"--learning_rate={rate}") for host, rate in ((0, 1e-3), (1, 2e-3))
    ]
    assert all(node.wait(60) != 0 for node in nodes)
    assert "--learning_rate" in nodes[0].log.read_text() + nodes[1].log.read_text()


def test_interrupting_one_host_stops_both_with_a_checkpoint(launch, tmp_path):
    flags = [*FLAGS, "--max_steps=5000", "--epochs=1000"]
    nodes = [launch(0, *flags), launch(1, *flags)]
    wait_for_steps(nodes[0], tmp_path, 3)
    nodes[1].send_signal(signal.SIGTERM)
    for node in nodes:
        node.wait(90)
    assert list(tmp_path.glob("*/checkpoints/step_*/manifest.json")), "".join(
        node.log.read_text() for node in nodes
    )

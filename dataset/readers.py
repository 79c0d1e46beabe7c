"""Processes that read data ahead of training, and end with the process that they read for.

A signal to the job reaches them, too: Ctrl-C, a launcher's, a scheduler's. The step that is being
made still needs their rows, so they start, and stay, with signals blocked. That takes
multiprocessing its way to end them, SIGTERM.
"""

import atexit
import multiprocessing.util  # registers its own exit handler, which runs behind the one below
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

HAS_MASK = hasattr(signal, "pthread_sigmask")  # not on Windows
BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if HAS_MASK else ()


def read_ahead(
    dataset: Dataset, batches: Iterable, collate: Callable, num_workers: int
) -> Iterator:
    """The batches of a dataset, one after the other, read by other processes.

    Args:
        batches: the ids of each one's documents.
        num_workers: processes, at least 1.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        pin_memory=torch.cuda.is_available(),
        # DataLoader would draw a seed from the generator that dropout uses
        generator=torch.Generator(),
    )
    if not HAS_MASK:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(reader: int) -> None:
    """In a reader: end as soon as the process that it reads for is gone, also by kill -9."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register
def kill_readers() -> None:
    """Before multiprocessing's exit handler, which would send SIGTERM and wait without end."""
    # DataLoader's handler would report every one of them as a fault.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()

"""--compile: whether it is worth its time in a run, and compiling a model's blocks."""

from torch import nn

from runtime.gradient_sync import one_order
from runtime.kernel_loader import package, report
from runtime.ranks import SHARDED, mesh_sizes, world

WORTH_COMPILING = 2e16  # operations of a run, per process: minutes on a GPU, of which part is saved


def choose_compile(model: nn.Module, dataset, args, dtype: str, global_batch: int) -> int:
    """1 where compiling is known to pay, takes less time than it saves, and is possible; says so.

    A function of flags, data and the kind of machine, not of a clock: a run that goes on computes
    as it did before. Wins were measured for dense models on GPUs in 16 bits: benchmarks/speed.
    """
    row = args.max_seq_len if args.packing else dataset.lengths.mean()
    tokens = min(args.total_steps * global_batch * row, args.epochs * dataset.lengths.sum())
    operations = 6 * sum(p.numel() for p in model.parameters()) * tokens / world()[1]
    is_dense = not model.config.use_moe and not args.gradient_checkpointing
    is_whole = args.strategy not in SHARDED and max(mesh_sizes.values()) == 1
    if not (operations > WORTH_COMPILING and is_dense and is_whole and package()):
        return 0
    if not compiling().compiler_works(args.device, dtype):
        return 0
    if world()[0] == 0:
        print(
            f"--compile 1: half a minute before the first step, for {operations:.1e} operations to"
            " come",
            flush=True,
        )
    return 1


def compiling():
    """The module of kernels/ with what --compile needs. ValueError: it is not to be had."""
    kernels = package()
    if kernels is None:
        raise ValueError(
            f"--compile 1 needs kernels/, but there is {report() or 'MINIMIND_KERNELS=off'}"
        )
    return kernels.compiling


def compile_model(model: nn.Module, args, dtype: str) -> None:
    """Have each block compiled: now, or where it is sharded at its first use.

    A process may have no room for a whole pass of a model that it shares with others.

    Args:
        args: the flags device, strategy, batch_size and max_seq_len.
    """
    compiling().compile_blocks(model)
    if args.strategy not in SHARDED and max(mesh_sizes.values()) == 1:
        with one_order(args.device):
            compiling().compile_now(model, args.device, dtype, args.batch_size, args.max_seq_len)

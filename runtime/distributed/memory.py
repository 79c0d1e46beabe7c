"""How much memory a process of a run needs, by part, and which strategy fits the device.

Sources: Rajbhandari et al., ZeRO (2020), sections 3 and 5: weights, gradients and optimizer state,
and how a stage divides them; Korthikanti et al., Reducing Activation Recomputation in Large
Transformer Models (2022), section 4: counting what the backward pass keeps, here for the operations
of `model/lm.py`. Both are adapted to what this stack does: weights, gradients and optimizer state
are float32; autocast makes copies of 2 bytes for the time of a step.
"""

import contextlib
import functools
import json
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import torch

from model.cross_entropy import chunk_size
from model.lm import LMConfig, MiniMindLM
from runtime.launcher import read_launch
from runtime.optim import is_block_matrix

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
FLOAT = 4  # bytes of a float32
SAFE_SHARE = (
    0.9  # of the device: the rest is for the allocator's gaps and the communication library
)
GIB = 2**30
# Files that say how many bytes a container may take and has taken: of version 2, of version 1
CONTROL_GROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def parameter_shapes(config: LMConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter, a tied one once. No memory is taken: the model is built on
    the meta device."""
    shape = {
        field.name: getattr(config, field.name) for field in fields(LMConfig)
    }  # a reward model's has more
    return shapes_of(LMConfig(**shape).to_json())


@functools.cache
def shapes_of(config: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {
            name: p.shape
            for name, p in MiniMindLM(LMConfig(**json.loads(config))).named_parameters()
        }


def parameter_count(config: LMConfig) -> int:
    """Parameters of the model, exactly; tied weights count once, all experts count."""
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def matrix_count(config: LMConfig) -> int:
    """Weights in the matrices of all blocks, by their sizes alone: nothing is built, however large
    the model is."""
    heads = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    experts, inner = config.n_experts + config.n_shared_experts, config.moe_hidden_dim
    mlp = config.n_experts + 3 * experts * inner if config.use_moe else 3 * config.hidden_dim
    return config.n_layers * config.dim * (heads + mlp)


def estimate(
    config: LMConfig,
    strategy: str,
    *,
    data_ranks: int,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    tokens: int,
    supervised: int,
    dtype: str = "float32",
    optimizer: str = "adamw",
    gradient_checkpointing: int = 0,
    offload: bool = False,
    accumulation_steps: int = 1,
) -> dict[str, int]:
    """Bytes per process at the peak of a step, by part.

    With n parameters per process (tensor parallelism divides the matrices) and N = data_ranks x
    context_parallel:

    | part       | ddp                       | zero1  | zero2               | zero3           |
    |------------|---------------------------|--------|---------------------|-----------------|
    | parameters | 4 n                       | 4 n    | 4 n / N             | 4 n / N         |
    | gradients  | 4 n                       | 4 n    | 4 n / N (*)         | 4 n / N (*)     |
    | optimizer  | 8 n                       | 8 n/N  | 8 n / N             | 8 n / N         |
    | buffers    | casts of the matrices,    | as ddp | a working copy of   | a copy of two   |
    |            | second gradient of a tied |        | all weights         | blocks,         |
    |            | embedding                 |        |                     | embedding, head |

    (*) 4 n with accumulation: gradients are exchanged once per step.
    "/ N" is what the fullest rank holds: zero1 deals out whole tensors, the largest first, each to
    the rank with the least (torch's ZeroRedundancyOptimizer); zero2 and zero3 split the rows of
    every tensor (FSDP2), of stacked experts the rows of each expert where they can be divided.
    Working copies have two bytes a weight under autocast, embedding and head four beside their
    cast; with them go the gradient of one block (or of the embedding) and its float32 message.
    DDP's buckets cost nothing: gradients are views of them. With tensor parallelism ddp has a
    working copy, too.

    Args:
        strategy: one of STRATEGIES.
        data_ranks: processes that train on different rows.
        tokens: of one micro-batch, before context_parallel splits them.
        supervised: those of them that need logits.
        gradient_checkpointing: the level, see model/recompute.py; 0: everything is kept.
        optimizer: 'adamw' and 'lamb' keep two numbers per parameter, 'muon' one for each matrix
        inside the blocks. offload: zero2 and zero3 keep parameters, gradients and optimizer state
        in CPU memory ('host'); gradients that
            accumulate stay.
        accumulation_steps: micro-batches between two exchanges of gradients.

    Returns:
        parameters, gradients, optimizer, activations, buffers, and total, their sum, in bytes of
        the device; host: bytes of CPU memory beside it.
    """
    assert strategy in STRATEGIES, strategy
    sharded, ranks = strategy in ("zero2", "zero3"), data_ranks * context_parallel
    width = FLOAT if dtype == "float32" else 2
    shapes = parameter_shapes(config)
    local, mine = {}, {}  # parameters in this process' layers; what it keeps of them
    for name, shape in shapes.items():
        divisor = tensor_parallel if splits(name, shape) else 1
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        local[name], rows = shape.numel() // divisor, shape[0] // (1 if by_columns else divisor)
        rows = (
            shape[1] if len(shape) == 3 and shape[1] % ranks == 0 else rows
        )  # experts: each is split
        mine[name] = -(-rows // ranks) * local[name] / rows if sharded else local[name]
    one_number = {
        name
        for name, shape in shapes.items()
        if optimizer == "muon" and is_block_matrix(name, shape)
    }
    state = {name: FLOAT * n * (1 if name in one_number else 2) for name, n in mine.items()}

    parts = {
        "parameters": FLOAT * sum(mine.values()),
        "gradients": FLOAT * sum((local if accumulation_steps > 1 else mine).values()),
        "optimizer": fullest(state.values(), ranks) if strategy == "zero1" else sum(state.values()),
    }
    if sharded or tensor_parallel > 1:
        groups: dict[str, int] = defaultdict(
            int
        )  # what is gathered together: each block, and all the rest
        for name, n in local.items():
            groups[name.split(".")[2] if ".layers." in name else "rest"] += n
        rest, block = groups.pop("rest"), max(groups.values())
        blocks = min(2, config.n_layers) * block if strategy == "zero3" else sum(groups.values())
        buffers = width * blocks + FLOAT * rest + (0 if width == FLOAT else width * rest)
        buffers += max((width + FLOAT) * block, 2 * FLOAT * rest)
    else:
        embedding = local["model.embed_tokens.weight"]
        matrices = sum(n for name, n in local.items() if splits(name, shapes[name]))
        matrices -= 0 if config.tie_embeddings else embedding  # a lookup is no matrix product
        buffers = 0 if width == FLOAT else width * matrices
        buffers += (
            FLOAT * embedding if config.tie_embeddings else 0
        )  # autograd adds up both gradients beside .grad
    parts["activations"] = activations(
        config, tokens, supervised, width, tensor_parallel, context_parallel, gradient_checkpointing
    )
    parts["buffers"] = buffers
    host = 0
    if offload and sharded:
        host = FLOAT * 2 * sum(mine.values()) + parts["optimizer"]
        parts.update(parameters=0, optimizer=0)
        if accumulation_steps == 1:
            parts["gradients"] = 0
    parts = {part: round(size) for part, size in parts.items()}
    return {**parts, "total": sum(parts.values()), "host": round(host)}


def splits(name: str, shape: torch.Size) -> bool:
    """Whether tensor parallelism divides a parameter: matrices, except the router, which every rank
    asks alike."""
    return len(shape) > 1 and not name.endswith("mlp.gate.weight")


def fullest(sizes, ranks: int) -> int:
    """The largest share when each size goes, the largest first, to the rank that has the least."""
    loads = [0] * ranks
    for size in sorted(sizes, reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads)


def activations(
    config: LMConfig,
    tokens: int,
    supervised: int,
    width: int,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    gradient_checkpointing: int = 0,
) -> float:
    """Bytes that forward keeps for backward, at the peak: what autograd saves, plus the gradients
    in flight there.

    Per token and block, with c = `width` bytes of what matrix products read: both RMSNorms keep
    their input, in float32 the normalised input, too (a GPU's fused kernel does not: there this is
    an upper bound), and give one tensor to the projections; so do the norms of q and k; attention
    reads rotated q, k and v and keeps its result twice (per document, and laid out for o_proj);
    SwiGLU keeps gate, up, silu(gate) and their product. The kernels for a CPU keep up to a third
    less: no normalised input, the result of attention once, no silu(gate). Behind the head there
    are its gradients: of what it reads, and of its weights in float32; logits exist for a chunk of
    tokens only, where tensor ranks do not share them: then cross-entropy has three tensors of their
    size when its backward begins.

    Args: see `estimate`; width: 4 for float32, 2 for float16 and bfloat16.
    """
    c, dim, tp = width, config.dim, tensor_parallel
    q, kv = config.n_heads * config.head_dim / tp, config.n_kv_heads * config.head_dim / tp
    tokens, supervised = tokens / context_parallel, supervised / context_parallel
    kept = 2 * FLOAT if c == FLOAT else FLOAT  # by a norm
    attention = q * (kept + 3 * c) + kv * (
        kept + 2 * c * context_parallel
    )  # all of a row's keys and values
    norms = 2 * (
        kept * dim / tp + c * dim
    )  # sequence parallel between the products, gathered before them
    if config.use_moe:
        visits = (
            config.n_experts_per_tok + 8 * config.n_experts / tokens
        )  # rows of an expert are filled up to 16
        inner = (
            visits * config.moe_hidden_dim + config.n_shared_experts * config.moe_hidden_dim
        ) / tp
        # The rows sorted by expert, the results in the order of the tokens, and the router's
        # float32 input.
        mlp = (
            4 * c * inner
            + c * dim * (visits + config.n_experts_per_tok)
            + (0 if c == FLOAT else FLOAT * dim)
        )
    else:
        inner = config.hidden_dim / tp
        mlp = 4 * c * inner
    dropout = 2 * c * dim if config.dropout else 0  # the masks behind attention and MLP
    block = tokens * (norms + attention + mlp + dropout)
    results = c * (
        2 * q + 2 * kv + dim + 2 * inner + dim * (visits if config.use_moe else 1)
    )  # products, attention
    in_flight = tokens * 3 * c * inner  # the gradients of SwiGLU's three inner tensors
    head = supervised * (kept + c) * dim
    if tp > 1:
        head += supervised * 3 * FLOAT * config.vocab_size / tp
    else:
        chunk = min(supervised, chunk_size(config.vocab_size)) * config.vocab_size
        head += (
            supervised * c * dim
            + FLOAT * config.vocab_size * dim
            + chunk * (FLOAT if c == FLOAT else FLOAT + c)
        )
    if (
        gradient_checkpointing
    ):  # the input of every block and what is not computed anew; the rest of one block
        results *= tokens if gradient_checkpointing == 2 else 0
        return config.n_layers * (tokens * FLOAT * dim + results) + max(
            block - results + in_flight, head
        )
    return config.n_layers * block + max(in_flight, head)


def device_memory(device: torch.device) -> int | None:
    """Bytes that this process may use: what is free on the GPU, or its share of the machine's RAM;
    None: unreadable.

    RAM is shared by the processes of the machine, and limited by the control group (containers).
    """
    if device.type == "cuda":
        try:  # what this process holds already is its own to use
            return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        except RuntimeError:
            return None
    free = [meminfo("MemAvailable")]
    if free == [0]:
        return None
    for limit, used in CONTROL_GROUP:
        with contextlib.suppress(
            OSError, ValueError
        ):  # another version of control groups, or no limit ("max")
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(free)) // read_launch().local_world_size


def meminfo(name: str) -> int:
    """Bytes that a line of /proc/meminfo says; 0: it cannot be read."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def machine_memory() -> int:
    """Bytes of this machine's RAM, or of what its control group may take of it; 0: it cannot be
    read."""
    limits = [meminfo("MemTotal")]
    for limit, _ in CONTROL_GROUP:
        with contextlib.suppress(OSError, ValueError):  # as above
            limits.append(int(Path(limit).read_text()))
    return min(limits)


def choose_strategy(
    config: LMConfig, device: torch.device, *, memory: int | None = None, **run: object
) -> tuple[str, str]:
    """The first of ddp, zero1, zero2, zero3 that fits into SAFE_SHARE of the device's memory, and
    why, in one line.

    Each saves more and costs more than the one before. With tensor parallelism zero1 is left out:
    its optimizer knows nothing of sharded tensors. Where the memory cannot be read the number of
    parameters decides. Ranks may read different numbers: one of them has to choose for all, or
    `memory` be their minimum.

    Args:
        memory: bytes per process; None: read it here; 0: it cannot be read.
        run: the other arguments of `estimate`, except strategy and offload.
    """
    memory = device_memory(device) if memory is None else memory
    if run["data_ranks"] * run.get("context_parallel", 1) == 1:
        candidates = ["ddp"]  # nobody to share with
    else:
        candidates = [s for s in STRATEGIES if s != "zero1" or run.get("tensor_parallel", 1) == 1]
    if not memory:
        count = parameter_count(config)
        strategy = (
            "ddp" if count < 1e9 or len(candidates) == 1 else "zero2" if count <= 7e9 else "zero3"
        )
        rule = "below 1 billion ddp, up to 7 zero2, above zero3"
        return (
            strategy,
            (
                f"{strategy}: {count / 1e9:.3g} billion parameters ({rule}); free memory cannot be"
                " read"
            ),
        )
    rejected = []
    for strategy in candidates:
        need = estimate(config, strategy, **run)
        if need["total"] <= SAFE_SHARE * memory:
            break
        rejected.append(f"{strategy} {need['total'] / GIB:.3g}")
    parts = ", ".join(
        f"{part} {need[part] / GIB:.3g}" for part in need if part not in ("total", "host")
    )
    fits = need["total"] <= SAFE_SHARE * memory
    reason = (
        f"{strategy}: {'needs' if fits else 'nothing fits, not even this: it needs'}"
        f" {need['total'] / GIB:.3g} GiB of {memory / GIB:.3g} GiB per process ({parts})"
    )
    rejected = rejected if fits else rejected[:-1]
    if rejected:
        reason += (
            f"; {', '.join(rejected)} GiB would not fit"
            if fits
            else f"; without it {', '.join(rejected)} GiB"
        )
    return strategy, reason

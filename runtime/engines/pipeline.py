"""Pipeline parallelism: each process has some layers, and passes hidden states on to the next.

Processes form a mesh of pipeline x data x tensor ranks, tensor ranks being neighbours. The layers
are cut into stages; a schedule of torch.distributed.pipelining says in which order a process runs
the forward and backward passes of its stages, micro-batch by micro-batch. Every process reads the
rows and the lengths of the documents itself, so that only hidden states travel, and back their
gradients. Sources: Huang et al., GPipe (2019), section 2.3; Narayanan et al., Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM (2021), section 2.2, for 1F1B and the
interleaved schedule.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from model.lm import LMOutput, MiniMindLM
from model.recompute import recompute
from runtime import parallel
from runtime.apple_gpu import needs_process_group
from runtime.compilation import compiling
from runtime.device import is_sharded, local
from runtime.distributed import mesh as rank_mesh
from runtime.distributed.replicas import shard_number
from runtime.distributed.tensor_parallel import split_layers
from runtime.gradient_sync import one_order
from runtime.parallel import gather_objects, world

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
LOOPS = 2  # stages per process of the interleaved schedule


# --------------------------------------------------------------------------------------------------
# Layout
# --------------------------------------------------------------------------------------------------


def make_mesh(device: torch.device, pipeline: int, tensor: int) -> DeviceMesh:
    """Lay the processes out as pipeline x data x tensor ranks. Every rank calls it once.

    Raises:
        ValueError: the sizes do not divide the number of processes.
    """
    needs_process_group(device, "a pipeline")
    processes, asked = world()[1], f"--pipeline_parallel {pipeline} x --tensor_parallel {tensor}"
    if processes % (pipeline * tensor):
        lack = "needs --ddp and a launcher"
        if dist.is_initialized():
            lack = f"does not divide {processes} processes"
        remedy = f"torchrun --nproc_per_node {pipeline * tensor} ... --ddp, or a multiple of it"
        raise ValueError(f"{asked} {lack}: {remedy}; one process alone takes --pipeline_parallel 1")
    if not dist.is_initialized():  # schedules ask for a process group, even where nothing travels
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id
        )
    rank_mesh.make_mesh(device, "ddp", 1, tensor)
    shape = (pipeline, processes // (pipeline * tensor), tensor)
    return init_device_mesh(device.type, shape, mesh_dim_names=("pipeline", "data", "tensor"))


def check_sizes(schedule: str, processes: int, n_layers: int, micro_batches: int) -> None:
    """Refuse what a schedule cannot do.

    Args:
        processes: of one pipeline.
        micro_batches: of an optimizer step and a pipeline.

    Raises:
        ValueError: fewer layers than stages, or a number of micro-batches that does not fit; says
        which would.
    """
    stages, asked = (
        stages_of(schedule, processes),
        f"--pipeline_schedule {schedule} --pipeline_parallel {processes}",
    )
    if schedule == "interleaved" and processes == 1:
        raise ValueError(
            f"{asked}: one process has no neighbour to take turns with: use gpipe or 1f1b"
        )
    if stages > n_layers:
        raise ValueError(
            f"{asked} has {stages} stages, but --n_layers {n_layers}: each needs a layer at least"
        )
    remedy = (
        f"change --accumulation_steps or --global_batch_size (a step has {micro_batches}), or take"
        " gpipe"
    )
    if schedule == "1f1b" and micro_batches < stages:
        raise ValueError(f"{asked} needs at least {stages} micro-batches per step: {remedy}")
    if schedule == "interleaved" and micro_batches % max(1, micro_batches // processes):
        raise ValueError(
            f"{asked} needs a multiple of {processes} micro-batches per step: {remedy}"
        )


def stages_of(schedule: str, processes: int) -> int:
    return processes * (LOOPS if schedule == "interleaved" else 1)


def layers_of(stage: int, stages: int, n_layers: int) -> range:
    """The layers of a stage; the last ones may have one less: the head is work, too."""
    return range(-(-n_layers * stage // stages), -(-n_layers * (stage + 1) // stages))


def cut(model: MiniMindLM, layers: list[int], first: bool, last: bool) -> MiniMindLM:
    """Take away what other processes have; names stay, and a tied matrix stays at both ends."""
    tied = model.config.tie_embeddings
    for index in set(range(model.config.n_layers)).difference(layers):
        model.model.layers[index] = nn.Identity()
    if not (first or last and tied):
        del model.model.embed_tokens
    if not last:
        del model.model.norm
    if not (last or first and tied):
        del model.lm_head
    if not (first or last):
        model.config = replace(model.config, tie_embeddings=False)  # nothing is left to tie
    return model


# --------------------------------------------------------------------------------------------------
# A stage
# --------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What the stages of a process share while a schedule runs."""

    batches: list[tuple]  # a micro-batch each, as `dataset.collate` makes them
    loss_of: Callable  # see `Pipeline.run`
    supervised: int
    tokens: int
    scale: Tensor
    loss: Tensor  # sums over the micro-batches, on the last stage
    aux_loss: Tensor


class Stage(nn.Module):
    """Some consecutive layers, the first stage with the embedding, the last one with head and loss.

    The messages between stages have one size for all micro-batches, as schedules want it. A
    micro-batch fills the front of it; what is behind its tokens travels, but nothing is computed
    for it.
    """

    def __init__(
        self,
        model: MiniMindLM,
        layers: range,
        first: bool,
        last: bool,
        room: int,
        sharers: int,
        autocast,
    ):
        """A stage of the whole pipeline.

        Args:
            room: tokens of a message.
            sharers: tensor ranks; each holds its part of a row's tokens.
        """
        super().__init__()
        self.model, self.layers, self.first, self.last = model, layers, first, last
        self.room, self.sharers, self.autocast = room, sharers, autocast

    def forward(self, *received: Tensor, micro: Tensor, work: Work) -> Tensor | tuple[Tensor, ...]:
        """One micro-batch: hidden states (1, room, dim), auxiliary losses; at the end the loss.

        Args:
            received: what the stage below returned.
            micro: (1,) int64 on the CPU, number of the micro-batch.
        """
        batch, device = work.batches[int(micro)], work.scale.device
        with self.autocast:
            if self.last:
                loss, aux_loss = work.loss_of(
                    functools.partial(self.head, received), *batch, device
                )
                loss, aux_loss = loss / work.supervised, aux_loss * (sum(batch[-1]) / work.tokens)
                work.loss, work.aux_loss = (
                    work.loss + loss.detach(),
                    work.aux_loss + aux_loss.detach(),
                )
                return (loss + aux_loss) * work.scale
            x, aux_loss = self.blocks(received, batch[0].to(device, non_blocking=True), batch[-1])
        x = F.pad(x, (0, 0, 0, self.room - x.size(1)))
        return (x, aux_loss) if self.model.config.use_moe else x

    def head(
        self,
        received: tuple[Tensor, ...],
        input_ids: Tensor,
        doc_lens: list[int],
        logits_at: Tensor,
        targets: Tensor,
    ) -> LMOutput:
        """What `MiniMindLM.forward` returns, from what the stage below returned."""
        x, aux_loss = self.blocks(received, input_ids, doc_lens)
        x = x.reshape(-1, x.size(-1)).index_select(0, logits_at)  # (K, dim)
        loss = self.model.lm_head(self.model.model.norm(x), targets)
        return LMOutput(None, aux_loss / self.model.config.n_layers, loss)

    def blocks(
        self, received: tuple[Tensor, ...], input_ids: Tensor, doc_lens: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (1, N, dim) behind this stage; auxiliary losses of all layers so far."""
        model = self.model
        layout = model.layout(input_ids, doc_lens=doc_lens)
        if self.first:
            x = model.model.embed_tokens(input_ids)
        else:
            x = received[0][:, : input_ids.size(1) // self.sharers]
        aux_loss = received[1] if len(received) > 1 else x.new_zeros((), dtype=torch.float32)
        for index in self.layers:
            block = model.model.layers[index]
            x, own_loss = recompute(model.gradient_checkpointing, block, x, layout)
            aux_loss = aux_loss + own_loss
        return x, aux_loss


# --------------------------------------------------------------------------------------------------
# The stages of this process, and what it does together with others
# --------------------------------------------------------------------------------------------------


class Pipeline:
    """What this process holds of a model, and the schedule that runs it together with the rest.

    Attributes:
        module: the model without what other processes have; names of parameters are those of the
        whole model.
    """

    def __init__(
        self, model: MiniMindLM, mesh: DeviceMesh, args, micro_batches: int, autocast, fill=None
    ):
        """Cut the model and set up the schedule.

        Args:
            model: with all layers, the same on all ranks; is cut.
            mesh: of `make_mesh`.
            args: the flags device, batch_size, max_seq_len, pipeline_schedule, compile.
            micro_batches: of an optimizer step and a pipeline.
            autocast: context of the forward passes.
            fill: of `start.Start`, where the model has no memory yet.
        """
        rank, data_rank, _ = mesh.get_coordinate()
        size, data_ranks, tensor = mesh.shape
        stages = stages_of(args.pipeline_schedule, size)
        config = model.config  # of the whole model; that of a part is another one
        layers = {n: layers_of(n, stages, config.n_layers) for n in range(rank, stages, size)}
        own = [layer for index in layers for layer in layers[index]]
        self.module = cut(model, own, rank == 0, rank == size - 1)
        if args.compile:
            compiling().compile_blocks(self.module)
        if tensor > 1:
            split_layers(self.module, mesh["tensor"])
        if fill is not None:
            fill(self.module, args.device)

        self.data_world = (data_rank, data_ranks)
        self.mesh, self.stages = mesh, stages
        self.micro_batches, self.device = micro_batches, args.device
        self.data_group, self.tied_group = mesh.get_group("data"), None
        # Both ends hold a tied matrix, each has the gradient of its own use
        if config.tie_embeddings and size > 1:
            for ends in mesh.mesh[[0, -1]].flatten(1).T.tolist():
                group = dist.new_group(ends)
                self.tied_group = group if world()[0] in ends else self.tied_group
        parts = [(name, shard_number(p)) for name, p in self.module.named_parameters()]
        holders = Counter(part for held in gather_objects(parts) for part in held)
        self.copies = [holders[part] for part in parts]  # ranks that hold the same, by parameter
        padding = torch.zeros(1, tensor, dtype=torch.int64)
        self.nothing = (padding, padding, padding, [])  # a micro-batch without a document
        held = self.pipeline_stages(layers, args, autocast)
        self.schedule = SCHEDULES[args.pipeline_schedule](
            held if args.pipeline_schedule == "interleaved" else held[0],
            micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def pipeline_stages(self, layers: dict[int, range], args, autocast) -> list[PipelineStage]:
        """The stages of this process, for torch's schedule. Args: layers: of each."""
        config, tensor = self.module.config, self.mesh.shape[2]
        room = -(-args.batch_size * args.max_seq_len // tensor)
        message = [torch.empty(1, room, config.dim, device="meta", requires_grad=True)]
        number = torch.empty((), device="meta", requires_grad=True)
        message += [number] if config.use_moe else []
        held = []
        for index in layers:
            first, last = index == 0, index == self.stages - 1
            stage = Stage(self.module, layers[index], first, last, room, tensor, autocast)
            shapes = {
                "input_args": () if first else tuple(message),
                "output_args": number if last else tuple(message),
            }
            group = self.mesh.get_group("pipeline")
            held.append(
                PipelineStage(stage, index, self.stages, args.device, group=group, **shapes)
            )
        return held

    def run(
        self,
        batches: list[tuple],
        loss_of: Callable,
        supervised: int = 1,
        tokens: int = 1,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward passes of some micro-batches, under `torch.no_grad` forward alone.

        Args:
            batches: up to `micro_batches` of them, the same on all processes of the pipeline.
            loss_of: (model, X, Y, loss_mask, doc_lens, device) -> summed loss, auxiliary loss (a
            mean over tokens). supervised, tokens: of the whole step, over all data ranks: what the
            losses are divided by. scale: of the gradients.

        Returns:
            Loss and auxiliary loss of this pipeline's share of the step; 0 where the last stage is
            not.
        """
        zero, numbers = torch.zeros((), device=self.device), torch.arange(self.micro_batches)
        batches = batches + [self.nothing] * (self.micro_batches - len(batches))
        work = Work(
            batches, loss_of, supervised, tokens, zero + 1 if scale is None else scale, zero, zero
        )
        run = self.schedule.step if torch.is_grad_enabled() else self.schedule.eval
        with one_order(self.device):
            run(target=numbers, return_outputs=False, micro=numbers, work=work)
        return work.loss, work.aux_loss

    def sum_gradients(self) -> None:
        """Once a step: sum gradients over data ranks, of a tied matrix over both ends, too."""
        parameters = list(self.module.parameters())
        for p in parameters:
            if is_sharded(p):  # norms: each tensor rank has the gradient of its own tokens
                p.grad = p.grad.redistribute(p.device_mesh, p.placements)
        if self.data_world[1] > 1:
            sums = [
                dist.all_reduce(local(p.grad), group=self.data_group, async_op=True)
                for p in parameters
            ]
            for message in sums:
                message.wait()
        if self.tied_group is not None:
            dist.all_reduce(
                local(self.module.model.embed_tokens.weight.grad), group=self.tied_group
            )

    @torch.no_grad()
    def evaluate(self, loss_of: Callable, dataset, rows, batch_size: int) -> float:
        """As `evaluation.evaluate`."""
        (rank, ranks), total = self.data_world, 0.0
        self.module.eval()
        for at in range(0, len(rows), ranks * batch_size * self.micro_batches):
            end = min(len(rows), at + ranks * batch_size * self.micro_batches)
            starts = range(at + rank * batch_size, end, ranks * batch_size)
            samples = [
                [dataset[row] for row in rows[start : start + batch_size]] for start in starts
            ]
            batches = [dataset.collate(micro, **parallel.row_split()) for micro in samples]
            total += self.run(batches, loss_of)[0].item()
        self.module.train()
        return parallel.sum_over_ranks(total)[0] / int(dataset.supervised[rows].sum())

    def whole_tensors(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """All stages' tensors on the CPU and whole, on rank 0; elsewhere empty.

        Every rank calls it with its own.
        One tensor at a time is put together and sent, so that no other process ever holds the whole
        model.
        """
        owners, whole = {}, {}
        for rank, shapes in enumerate(
            gather_objects({name: value.shape for name, value in state_dict.items()})
        ):
            for name, shape in shapes.items():
                owners.setdefault(name, (rank, shape))
        for name, (owner, shape) in owners.items():
            value = state_dict.get(name)
            value = value.full_tensor() if is_sharded(value) else value
            if world()[0] == 0 != owner:
                value = torch.empty(shape, device=self.device)
                dist.recv(value, owner)
            elif world()[0] == owner != 0:
                dist.send(value.contiguous(), 0)
            if world()[0] == 0:
                whole[name] = value.to("cpu", copy=True)
        if self.module.config.tie_embeddings and whole:
            whole["lm_head.weight"] = whole["model.embed_tokens.weight"]  # saved once
        return whole

    def describe(self) -> str:
        """The layout, in a line; the idle share is that of Narayanan et al. (2021), section 2.2."""
        size, data, tensor = self.mesh.shape
        idle = (size - 1) / (self.micro_batches * self.stages // size + size - 1)
        shape = f"pipeline x {size}, data x {data}, tensor x {tensor}"
        return f"{shape}; stages {self.stages}, micro-batches {self.micro_batches}, idle {idle:.0%}"

"""Tensor parallelism: the ranks of a group share every layer, and between layers every row.

Each rank has some heads, some columns of the MLP or some experts, and some rows of the vocabulary.
The residual stream and its norms are split by token, so that nothing is computed twice: a layer
gathers its tokens at the entrance and scatters the sum at the exit.
Source: Shoeybi et al., Megatron-LM (2019), section 3; Korthikanti et al., Reducing Activation
Recomputation (2022), section 4.2.2, for the split by token.
"""

import copy
from collections.abc import Callable
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from torch.func import functional_call

from model.lm import Head, LMConfig, MiniMindLM, SwiGLU
from model.moe import Experts, MoE


def check_sizes(config: LMConfig, tensor: int) -> None:
    """Raises ValueError: --tensor_parallel does not divide what it splits; names it."""
    sizes = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
    }
    if config.use_moe:
        sizes["n_experts"] = config.n_experts
    if not config.use_moe or config.n_shared_experts:
        sizes["the MLP's inner width"] = (
            config.moe_hidden_dim if config.use_moe else config.hidden_dim
        )
    for name, size in sizes.items():
        if size % tensor:
            raise ValueError(
                f"--tensor_parallel {tensor} does not divide {name} {size}: choose a divisor of it"
            )


def split_layers(model: MiniMindLM, mesh: DeviceMesh) -> None:
    """Turn parameters into DTensors over the ranks of `mesh` (1-D); layers compute on their parts.

    Rows must hold a multiple of the ranks in tokens. The logits that come out are (K, vocab /
    ranks).

    Raises:
        ValueError: a size of the model that the ranks do not divide.
    """
    check_sizes(model.config, mesh.size())
    enter = PrepareModuleInput(
        input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
    )
    leave = {"output_layouts": Shard(1)}
    mlp = {
        "gate_proj": ColwiseParallel(),
        "up_proj": ColwiseParallel(),
        "down_proj": RowwiseParallel(**leave),
    }
    block = {
        "input_layernorm": OwnTokens(),
        "self_attn": enter,
        **{f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
        "self_attn.o_proj": RowwiseParallel(**leave),
        "post_attention_layernorm": OwnTokens(),
    }
    if model.config.qk_norm:  # of own heads, to be exact
        block |= {"self_attn.q_norm": OwnTokens(), "self_attn.k_norm": OwnTokens()}
    if model.config.use_moe:
        # All see all tokens, but through their own experts only: the gradient of the router is a
        # sum, too.
        block |= {"mlp": GatherAndSum(), "mlp.gate": OwnTokens(), "mlp.experts": OwnExperts()}
        block["mlp.shared_expert"] = OwnColumns()
    else:
        block |= {
            "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        }
        block |= {f"mlp.{name}": style for name, style in mlp.items()}
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **leave),
        "model.norm": AllTokens(),
    }
    plan["lm_head"] = OwnVocabulary()
    for index in range(len(model.model.layers)):
        plan |= {f"model.layers.{index}.{name}": style for name, style in block.items()}
    # Behind the last block every rank needs the tokens whose logits are asked for.
    plan[f"model.layers.{index}"] = PrepareModuleOutput(
        output_layouts=(Shard(1), None), desired_output_layouts=(Replicate(), None)
    )
    # Shared experts are optional, and a stage of a pipeline has some layers only.
    modules = dict(model.named_modules())
    plan = {name: style for name, style in plan.items() if name in modules}
    parallelize_module(model, mesh, plan)
    if model.config.tie_embeddings:  # parallelize_module made two parameters of one
        model.lm_head.weight = model.model.embed_tokens.weight


def spread(
    module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement], gradient=None
) -> Callable:
    """Spread parameters over the ranks; returns the module's forward pass with this rank's part.

    Args:
        placements: name of a parameter -> how it is spread.
        gradient: how that of the part is placed; by default as the parameter.
    """
    plain = copy.copy(module)  # keeps the forward of its class when that of `module` is replaced
    for name, placement in placements.items():
        owner, _, leaf = name.rpartition(".")
        whole = attrgetter(name)(module).detach()
        setattr(
            module.get_submodule(owner),
            leaf,
            nn.Parameter(distribute_tensor(whole, mesh, [placement])),
        )

    def forward(*args):
        parts = {
            n: attrgetter(n)(module).to_local(grad_placements=[gradient or at])
            for n, at in placements.items()
        }
        return functional_call(plain, parts, args)

    return forward


class OwnTokens(ParallelStyle):
    """A layer with one `weight` for each rank's own tokens: gradients must be summed."""

    gradient = Partial()

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.forward = spread(module, mesh, {"weight": Replicate()}, self.gradient)
        return module


class AllTokens(OwnTokens):
    """A layer that every rank applies to the same tokens: each has the whole gradient."""

    gradient = Replicate()


class OwnExperts(ParallelStyle):
    """The experts of a layer: each rank computes its own, for all tokens, and ranks are summed."""

    def _apply(self, module: Experts, mesh: DeviceMesh) -> nn.Module:
        experts = module.down_proj.size(0) // mesh.size()
        first = mesh.get_local_rank() * experts
        module.partial = True  # for kernels: not every choice is one of these experts
        own = spread(module, mesh, {"gate_up_proj": Shard(0), "down_proj": Shard(0)})

        def forward(x: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
            inside = (choice >= first) & (choice < first + experts)
            return own(x, weight * inside, (choice - first).where(inside, -1))

        module.forward = forward
        return module


class OwnColumns(ParallelStyle):
    """A SwiGLU around which others sum: each rank computes some inner columns, for all tokens."""

    def _apply(self, module: SwiGLU, mesh: DeviceMesh) -> nn.Module:
        columns, rows = Shard(0), Shard(1)  # of weights, which are (out, in)
        splits = {"gate_proj.weight": columns, "up_proj.weight": columns, "down_proj.weight": rows}
        module.forward = spread(module, mesh, splits)
        return module


class GatherAndSum(ParallelStyle):
    """Around the experts: gathers all tokens; sums the ranks' outputs, split by token again."""

    def _apply(self, module: MoE, mesh: DeviceMesh) -> nn.Module:
        size = mesh.size()

        def enter(_, args):
            x = DTensor.from_local(args[0], mesh, [Shard(1)], run_check=False).redistribute(
                placements=[Replicate()]
            )
            return x.to_local(grad_placements=[Partial()]), *args[1:]

        def leave(_, args, outputs):
            out, aux_loss = outputs
            out = DTensor.from_local(out, mesh, [Partial()], run_check=False).redistribute(
                placements=[Shard(1)]
            )
            # Every rank has the whole auxiliary loss, and what flows back from all of them is
            # summed.
            return out.to_local(), aux_loss / size + aux_loss.detach() * (1 - 1 / size)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class OwnVocabulary(ParallelStyle):
    """The head: each rank has the logits of a part of the vocabulary, the loss that of all."""

    def _apply(self, module: Head, mesh: DeviceMesh) -> nn.Module:
        own = spread(module, mesh, {"weight": Shard(0)})

        def forward(x: Tensor, targets: Tensor | None = None) -> Tensor:
            x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(
                grad_placements=[Partial()]
            )
            logits = own(x)
            return (
                logits
                if targets is None
                else sharded_cross_entropy(logits.float(), targets, mesh.get_group())
            )

        module.forward = forward
        return module


class ShardedCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] where each rank has some columns of the logits.

    Source: Shoeybi et al., Megatron-LM (2019), section 3.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        columns = logits.size(1)
        own = targets - group.rank() * columns  # (K,) column of the target, if it is here
        here = (own >= 0) & (own < columns)
        own = own.where(here, 0).unsqueeze(1)
        highest = logits.amax(dim=1, keepdim=True)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        shifted = logits - highest
        at_target = shifted.gather(1, own).squeeze(1).where(here, 0.0)
        sums = torch.stack((shifted.exp().sum(dim=1), at_target))  # (2, K)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(shifted, sums[0], own, here)
        return (sums[0].log() - sums[1]).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        shifted, normaliser, own, here = ctx.saved_tensors
        probs = shifted.exp() / normaliser.unsqueeze(1)
        return probs.scatter_add(1, own, -here.to(probs.dtype).unsqueeze(1)) * grad, None, None


def sharded_cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The summed loss, the same on every rank.

    Args:
        logits: (K, vocab / ranks) float32.
        targets: (K,) int64.
    """
    return ShardedCrossEntropy.apply(logits, targets, group)

"""Causal attention inside each document of a packed row, all documents in one call."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from kernels.compiling import uncompiled
from kernels.pointwise import apply_rope
from model import lm
from model.layout import Layout


def document_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend: q (1, H, N, D), k and v (1, H_kv, N, D) -> (1, H, N, D).

    No work outside a document's own triangle, no mask, and no document that depends on its
    neighbours.
    """
    if q.device.type == "cuda":
        return varlen_attention(q, k, v, layout)
    functions = native.library("attention.cpp", q.dtype)
    same = q.dtype == k.dtype == v.dtype
    if functions is None or not same or not native.is_local_cpu_tensor(q, k, v):
        return lm.document_attention(q, k, v, layout)
    return DocumentAttentionFunction.apply(q, k, v, layout.cu_seqlens, functions)


class FastAttention(lm.Attention):
    apply_rope = staticmethod(apply_rope)
    document_attention = staticmethod(document_attention)
    # torch.compile cannot see into the kernels, and lengths change all the time
    attend_packed = uncompiled(lm.Attention.attend_packed)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if layout.doc_lens is not None or q.size(2) > 1:
            return super().attend(q, k, v, layout)
        # A step of generation: a group of heads as queries of the head whose keys they share.
        grouped = q.view(len(q), k.size(1), -1, q.size(3))
        out = F.scaled_dot_product_attention(grouped, k, v, layout.mask)
        return out.reshape(q.shape)


class DocumentAttentionFunction(torch.autograd.Function):
    """`document_attention` by attention.cpp."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, functions) -> Tensor:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # (1, N, H, D)
        out, lse = torch.empty_like(q), torch.empty(q.shape[1:3])
        N, H, H_kv, D = q.size(1), q.size(2), k.size(2), q.size(3)
        ctx.functions, ctx.sizes = functions, (N, len(cu_seqlens) - 1, H_kv, H // H_kv, D)
        functions.attention(q, k, v, cu_seqlens, out, lse, *ctx.sizes)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, grad = ctx.saved_tensors, grad.transpose(1, 2).contiguous()
        grads = [torch.empty_like(t) for t in saved[:3]]
        ctx.functions.attention_backward(*saved, grad, *grads, *ctx.sizes)
        return *(t.transpose(1, 2) for t in grads), None, None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """On a GPU: a kernel that is told where the documents begin.

    The public name of the first is torch.nn.attention.varlen.varlen_attn. To import it loads the
    compiler, two seconds of every start, so here is the operator that it calls.
    """
    ends = (layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (1, N, H, D)
    flash = q.size(3) % 8 == 0 and q.size(3) <= 256 and q.dtype != torch.float32
    if flash and torch.cuda.get_device_capability(q.device) >= (8, 0):
        out = torch.ops.aten._flash_attention_forward(q[0], k[0], v[0], *ends, 0.0, True, False)[0]
        return out.unsqueeze(0).transpose(1, 2)
    # Another kernel, half as fast, which needs keys and values for each head.
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), dim=2) for t in (k, v))
    causal, for_backward = 1, torch.is_grad_enabled()
    efficient = torch.ops.aten._efficient_attention_forward
    return efficient(q, k, v, None, *ends, 0.0, causal, for_backward)[0].transpose(1, 2)

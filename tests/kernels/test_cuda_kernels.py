"""Kernels that need a GPU: attention, recorded steps. Without one all are skipped, aloud."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES

import kernels
from kernels import attention, decode_graph
from model.generate_batch import generate_batch
from model.kv_cache import KVCache
from model.layout import Layout
from model.lm import LMConfig, MiniMindLM
from model.sampling import make_sampler
from runtime.gradient_sync import one_order

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ACCURACY = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def layout_of(lens: torch.Tensor, device: torch.device) -> Layout:
    cu_seqlens = F.pad(lens.cumsum(0), (1, 0)).int().to(device)
    return Layout(None, None, doc_lens=lens, cu_seqlens=cu_seqlens, max_seqlen=int(lens.max()))


@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
def test_attention_of_all_documents_at_once_is_that_of_each(dtype):
    generator = torch.Generator().manual_seed(0)
    lens = torch.tensor([70, 5, 0, 300, 1])
    q, k, v, upstream = (
        torch.randn(1, heads, 376, 16, generator=generator).to(dtype) for heads in (6, 2, 2, 6)
    )
    ours = [t.cuda().requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out, expected = (
        attention.document_attention(*t, layout_of(lens, t[0].device)) for t in (ours, exact)
    )
    out.backward(upstream.cuda())
    expected.backward(upstream.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for mine, theirs in pairs:
        assert (
            mine.dtype == dtype
            and (mine.cpu().double() - theirs).norm() < ACCURACY[dtype] * theirs.norm()
        )


def test_gradient_of_attention_is_the_same_every_time():
    layout = layout_of(torch.tensor([3000, 700, 0]), torch.device("cuda"))
    for dtype in ACCURACY:
        q, k, v = (
            torch.randn(1, heads, 3700, 64, dtype=dtype, device="cuda").requires_grad_()
            for heads in (4, 2, 2)
        )
        with one_order(q.device):
            outs = (attention.document_attention(q, k, v, layout) for _ in "12")
            once, again = (
                torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in outs
            )
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "qwen3": {},
    "moe": {"use_moe": True, "n_shared_experts": 1},
    "llama": {"qk_norm": False, "rope_scaling": YARN},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
}


def completions(
    device: str, prompts: list[list[int]], limits: list[int], shape: dict
) -> list[list[int]]:
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**SIZES, max_seq_len=256, **shape)).eval()
    for parameter in model.parameters():  # far from logits that are all alike
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    model.to(device)
    kernels.apply(model, torch.device(device), torch.float32)
    out, sampler = [[] for _ in prompts], make_sampler(prompts, 6400, torch.device(device))
    for row, _, token in generate_batch(model, prompts, limits, sampler, batch_size=3):
        for number, chosen in zip(row.tolist(), token.tolist(), strict=True):
            out[number].append(chosen)
    return out


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_recorded_steps_complete_prompts_as_a_cpu_does(family, monkeypatch):
    """Rows come and go, and outgrow the first recording."""
    monkeypatch.setattr(decode_graph, "STEP", 16)
    prompts = [[n + 5] * (3 * n + 1) for n in range(8)]
    limits = [30, 1, 60, 0, 12, 40, 7, 25]
    on_gpu, on_cpu = (
        completions(device, prompts, limits, FAMILIES[family]) for device in ("cuda", "cpu")
    )
    assert on_gpu == on_cpu


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logits_are_those_of_the_model(family):
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**SIZES, max_seq_len=256, **FAMILIES[family])).cuda().eval()
    kernels.apply(model, torch.device("cuda"), torch.bfloat16)
    caches = [KVCache(model.config, 5, 64, torch.device("cuda"), torch.bfloat16) for _ in range(2)]
    held = torch.tensor([7, 0, 33, 21, 1])
    caches[0].kv.normal_(std=0.5)
    caches[1].kv.copy_(caches[0].kv)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        recorded = decode_graph.DecodeGraph(model, caches[0])
        for cache in caches:
            cache.lengths[:] = held
        for step in range(4):
            token = torch.arange(5, device="cuda") + step
            logits = model(token.unsqueeze(1), cache=caches[1]).logits.squeeze(1).float()
            assert (recorded.step(token) - logits).norm() < 0.02 * logits.norm()
    assert torch.equal(caches[0].lengths, caches[1].lengths)

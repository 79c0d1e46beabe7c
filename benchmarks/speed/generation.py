"""New tokens per second against transformers' generate, with the same weights, prompts and number of new tokens."""

import torch
from common import autocast, dtypes, figure, in_turn, model_of, qwen, ratio, seconds_of

BATCH, NEW = 64, 128


def measure(args) -> list[dict]:
    device, lines = torch.device(args.device), []
    model = model_of(device, dim=512, n_layers=8, vocab_size=6400, max_seq_len=768).eval()
    theirs = qwen(model.config).to(device).eval()
    theirs.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    lens = torch.randint(16, 257, (BATCH,), generator=generator)
    mask = (torch.arange(int(lens.max())) >= lens.max() - lens.unsqueeze(1)).long()
    ids = torch.randint(10, 6400, mask.shape, generator=generator) * mask
    ids, mask = ids.to(device), mask.to(device)
    new: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def ours() -> None:
        new["ours"] = model.generate(ids, mask, max_new_tokens=NEW)

    @torch.inference_mode()
    def peer() -> None:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        new["theirs"] = theirs.generate(ids, attention_mask=mask, **options)[:, ids.size(1) :]

    for kind in dtypes(device):
        works = {"ours": lambda _: seconds_of(ours, device), "transformers": lambda _: seconds_of(peer, device)}
        with autocast(device, kind):
            times = in_turn(works, range(args.rounds))
        same = (new["ours"] == new["theirs"]).float().mean().item()
        detail = f"{BATCH * NEW / min(times['ours']):,.0f} tokens/s; {same:.1%} of the tokens are the same"
        what = f"generation, {BATCH} prompts of 16 to 256 tokens, {NEW} new, {kind}: tokens/s / transformers' generate"
        lines.append(figure(what, 1 / ratio(times, "ours", "transformers"), least=4.0, detail=detail))
    return lines

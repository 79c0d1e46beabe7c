"""nn.DataParallel for rows of documents, for the record: one process drives all GPUs."""

import torch
from torch import nn

from model.lm import LMOutput

WHY_NOT = (
    "--strategy dp: one Python process drives all GPUs, copies the weights to each of them in every"
    " micro-batch and gathers outputs and gradients on the first; torchrun with --ddp is faster on"
    " one machine and goes beyond it"
)


class RowParallel(nn.DataParallel):
    """nn.DataParallel for a batch that is one row: it is split between documents."""

    def scatter(self, inputs: tuple, kwargs: dict, device_ids: list[int]) -> tuple[list, list]:
        """(X,), {doc_lens, logits_at, targets} -> the same for each GPU, with some documents each."""
        (X,), lens, at, targets = inputs, kwargs["doc_lens"], kwargs["logits_at"], kwargs["targets"]
        parts = split_documents(lens, len(device_ids))
        self.shares = [
            sum(part) / max(1, sum(lens)) for part in parts
        ]  # of the tokens, for `gather`
        ends = torch.tensor([sum(part) for part in parts]).cumsum(0).tolist()
        ends[-1] = X.size(1)  # padding goes with the last
        args, options, start = [], [], 0
        for device, part, end in zip(device_ids, parts, ends, strict=False):
            own = (at >= start) & (at < end)
            args.append((X[:, start:end].to(device),))
            moved = {"logits_at": (at[own] - start).to(device), "targets": targets[own].to(device)}
            options.append({"doc_lens": part, **moved})
            start = end
        return args, options

    def gather(self, outputs: list[LMOutput], output_device: int) -> LMOutput:
        """The loss is a sum; the auxiliary loss, a mean over tokens, is weighted by them."""
        loss = sum(out.loss.to(output_device) for out in outputs)
        aux_loss = sum(
            out.aux_loss.to(output_device) * share
            for out, share in zip(outputs, self.shares, strict=True)
        )
        return LMOutput(None, aux_loss, loss)


def split_documents(lens: list[int], parts: int) -> list[list[int]]:
    """Neighbouring documents in 1 to `parts` groups of about the same number of tokens."""
    groups, total, done = [[]], sum(lens), 0
    for length in lens:
        if groups[-1] and len(groups) < parts and done + length / 2 > total * len(groups) / parts:
            groups.append([])
        groups[-1].append(length)
        done += length
    return groups

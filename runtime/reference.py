"""The frozen model that a policy is compared with: asked about every batch, or once about all
pairs."""

import copy
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.preference_dataset import PreferenceDataset, ReferencedPairs
from model.preference_loss import answer_logps
from model.weights import hash_weights
from runtime.parallel import data_world, gather_objects, token_losses, world
from runtime.terminal import naming


def logps_of(
    model: nn.Module, X: Tensor, Y: Tensor, loss_mask: Tensor, doc_lens: list[int], device
) -> tuple:
    """Log-probabilities of the answers of a batch of pairs, all in one forward pass.

    Args:
        X, Y, loss_mask, doc_lens: of `PreferenceDataset.collate`.

    Returns:
        Sums over the supervised tokens of each answer, and their lengths, (P, 2) float32 each,
        chosen and rejected; the model's auxiliary loss, a mean over tokens.
    """
    supervised = (
        loss_mask.flatten().nonzero().squeeze(1)
    )  # (K,), found on the CPU: a GPU would have to be waited for
    targets = Y.flatten()[supervised].to(device, non_blocking=True)
    out = model(
        X.to(device, non_blocking=True),
        doc_lens=doc_lens,
        logits_at=supervised.to(device, non_blocking=True),
    )
    return *answer_logps(token_losses(out.logits, targets), loss_mask, doc_lens), out.aux_loss


class Reference:
    """A copy of the policy as it is before training, or what that one said about the pairs of a
    data set.

    Attributes:
        identity: of the weights, for `checkpoint.find_run`: a run goes on with the reference that
        it began with.
    """

    def __init__(self, policy: nn.Module, flags: dict, autocast, dtype: str):
        """
        Args:
            policy: not wrapped, without dropout, with the weights that it starts from.
            flags: of the stage. device, a torch.device; loss_type: simpo has no reference;
            cache_reference: ask the
                policy about all pairs at once, in `attach`, and make no copy; batch_size: then
                pairs of a forward pass.
            dtype: of the matrix products, the one of autocast.
        """
        self.needed, self.cached = flags["loss_type"] != "simpo", bool(flags["cache_reference"])
        self.batch_size, self.autocast, self.device, self.dtype = (
            flags["batch_size"],
            autocast,
            flags["device"],
            dtype,
        )
        self.identity, self.model = {}, policy
        if self.needed:
            self.identity["the weights of --from_weight"] = hash_weights(policy.state_dict())
        if self.needed and not self.cached:
            self.model = copy.deepcopy(policy).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, X: Tensor, Y: Tensor, loss_mask: Tensor, doc_lens: list[int], *rest
    ) -> Tensor | None:
        """Log-probabilities of the answers, (P, 2) float32; where they are cached `rest` begins
        with them."""
        if not self.needed:
            return None
        return rest[0].to(self.device) if self.cached else self.ask(X, Y, loss_mask, doc_lens)

    def ask(self, *batch) -> Tensor:
        with self.autocast:
            return logps_of(self.model, *batch, self.device)[0]

    def attach(self, pairs: PreferenceDataset) -> PreferenceDataset | ReferencedPairs:
        """The pairs as this reference wants them; where it is cached, batches come with what it
        says about them.

        Every rank calls it. Each pair is computed by one rank, once: the result stays beside the
        token cache.
        """
        if not self.needed or not self.cached:
            return pairs
        told = f"{self.identity} {pairs.key} {self.dtype} {self.device.type} {torch.__version__}"
        path = pairs.cache.folder.with_name(
            f"reference_{hashlib.sha256(told.encode()).hexdigest()[:32]}.npz"
        )
        logps = gather_objects(load(path, len(pairs)) if world()[0] == 0 else None)[0]
        if logps is None:
            logps = self.compute(pairs)
            if world()[0] == 0:
                temporary = path.with_name(f".{path.name}.{os.getpid()}")
                with naming(temporary), open(temporary, "wb") as file:
                    np.savez(file, logps=logps)  # a ZIP file, which has a checksum
                os.replace(temporary, path)
        return ReferencedPairs(pairs, logps)

    @torch.no_grad()
    def compute(self, pairs: PreferenceDataset) -> np.ndarray:
        """(pairs, 2) float32 on every rank."""
        rank, ranks = data_world()
        training, mine = self.model.training, [torch.empty(0, 2)]
        rows = range(rank, len(pairs), ranks)
        self.model.eval()
        for at in range(0, len(rows), self.batch_size):
            batch = pairs.collate([pairs[row] for row in rows[at : at + self.batch_size]])
            mine.append(self.ask(*batch).cpu())
        self.model.train(training)
        logps = np.empty((len(pairs), 2), np.float32)
        for other, part in enumerate(gather_objects(torch.cat(mine).numpy())):
            logps[other::ranks] = part
        return logps


def load(path: Path, pairs: int) -> np.ndarray | None:
    """Remembered log-probabilities; None where there are none. Altered ones are told of: they are
    computed again."""
    try:
        with np.load(path) as file:
            logps = file["logps"]
        if logps.shape != (pairs, 2) or logps.dtype != np.float32:
            raise ValueError(f"{logps.shape} {logps.dtype} for {pairs} pairs")
        return logps
    except FileNotFoundError:
        return None
    except Exception as error:  # of numpy, zipfile and struct
        print(f"{path} is damaged ({error}): it is computed again", file=sys.stderr, flush=True)
        return None

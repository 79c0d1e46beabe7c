"""Run as every rank: how much memory models take until training begins, and whether their values
are right.

Usage: share_model.py STAGE FILES [flags of the stage]. FILES, with commas, have the values that are
expected, in the order in which the stage spreads its models.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from runtime import frozen, parallel
from runtime.rl import reward_model


class TrainingBegins(Exception):
    pass


def peak_of(start) -> int:
    """Most bytes that tensors had at once while `start` ran, beyond those of before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        start()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")


def models_of(stage) -> tuple[list, int]:
    """What a stage spreads over processes, in order, until training begins; its peak of memory."""
    models = []

    def recorded(wrap):
        def record(*args, **more):
            models.append(wrap(*args, **more))
            return models[-1]

        return record

    def begin(run, *others):
        if not models:  # a stage of a pipeline
            models.append(run.model)
        raise TrainingBegins

    def initialize(model, *others, **more):
        models.append(model)
        raise TrainingBegins

    def run() -> None:
        try:
            stage.main()
        except TrainingBegins:
            pass

    parallel.wrap = recorded(parallel.wrap)
    for module in (stage, reward_model, frozen):
        if hasattr(module, "wrap_frozen"):
            module.wrap_frozen = recorded(module.wrap_frozen)
    if hasattr(stage, "lightning_engine"):  # which begins with it
        wrap = stage.lightning_engine.wrap
        stage.lightning_engine.wrap = lambda *args: initialize(wrap(*args))
    else:
        stage.train_epoch = begin
    if hasattr(stage, "deepspeed_engine"):
        import deepspeed

        deepspeed.initialize = initialize
    peak = peak_of(run)
    return models, peak


def values_of(model):
    """Names and whole values of a model that processes share."""
    for key, p in model.state_dict(keep_vars=True).items():
        if hasattr(p, "ds_shape"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(p):
                yield key, p.data.clone()
        else:
            yield key, p.full_tensor() if hasattr(p, "full_tensor") else p


def main() -> None:
    name, files = sys.argv.pop(1), sys.argv.pop(1).split(",")
    wholes = [torch.load(file, weights_only=True) for file in files]
    models, peak = models_of(importlib.import_module(name))
    if hasattr(models[-1], "actor"):
        models[-1:] = [models[-1].actor, models[-1].critic]
    size = 0
    for model, whole in zip(models, wholes, strict=True):
        for key, value in values_of(model):
            assert torch.equal(value, whole[key]) if key in whole else not value.any(), key
        if model.config.tie_embeddings and hasattr(model, "lm_head"):
            assert model.lm_head.weight is model.model.embed_tokens.weight
        size += sum(value.nbytes for value in whole.values())
        if model.config.tie_embeddings:
            size -= whole["lm_head.weight"].nbytes
    largest = max(value.nbytes for whole in wholes for value in whole.values())
    print(json.dumps({"peak": peak, "size": size, "largest": largest}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

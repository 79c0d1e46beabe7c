"""Run a script under the profiler and print how often rank 0 called each collective.

torchrun --nproc_per_node 2 tests/count_collectives.py SCRIPT ARGS
"""

import collections
import json
import os
import runpy
import sys

import torch

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    names = (event.name for event in profile.events())  # "c10d::allreduce_", whatever the backend
    counts = collections.Counter(
        name.removeprefix("c10d::") for name in names if name.startswith("c10d::")
    )
    if os.environ["RANK"] == "0":
        print("collectives", json.dumps(counts))

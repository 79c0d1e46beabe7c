"""What a process that is alone computes by itself is what it would get from a group of one."""

import pytest
import torch
import torch.distributed as dist

from runtime import parallel
from runtime.distributed import exchange, replicas

NUMBERS = (1.5, 3, True, torch.tensor(1 / 3), torch.tensor(2, dtype=torch.int64), float("nan"))
NUMBERS += (torch.tensor(1e-30), torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(True))


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_numbers_of_a_process_that_is_alone_are_those_of_a_group_of_one(request):
    step = (float("inf"), *NUMBERS)
    alone = parallel.agree_on_step(*step), parallel.sum_over_ranks(*NUMBERS)
    objects = parallel.gather_objects({"a": 1})
    ranks = parallel.world(), parallel.data_world(), parallel.replicas(), parallel.row_split()
    request.getfixturevalue("group_of_one")
    together = replicas.agree_on_step(*step), exchange.sum_over_world(*NUMBERS)
    assert repr(alone) == repr(together) == repr((parallel.agree_on_step(*step), alone[1]))
    assert objects == parallel.gather_objects({"a": 1})
    assert ranks == (
        parallel.world(),
        parallel.data_world(),
        parallel.replicas(),
        parallel.row_split(),
    )

"""How the rows of an optimizer step are shared among many processes."""

import heapq


def rank_batches(
    rows: range, sizes: list[int], rank: int, world_size: int, batch_size: int
) -> list[list[int]]:
    """The rows of each micro-batch of a rank, as many micro-batches on every rank.

    Some may be without a row: their forward and backward passes keep the ranks in step, so that a
    strategy which exchanges weights in them never waits for a rank that has nothing to do.

    Args:
        rows: those of the step.
        sizes: tokens of each.
        batch_size: rows of a micro-batch.
    """
    own = balance_rows(rows, sizes, world_size)[rank]
    most = -(-len(rows) // world_size)  # of rank 0
    return [own[at : at + batch_size] for at in range(0, most, batch_size)]


def balance_rows(rows: range, sizes: list[int], world_size: int) -> list[list[int]]:
    """Rows for each rank, with about as many tokens: ranks wait for each other in every step.

    The longest row first, each goes to the rank with the fewest tokens so far; none gets more rows
    than its share.
    Source: Graham, Bounds on multiprocessing timing anomalies (1969): longest processing time
    first.
    """
    rank_rows = [[] for _ in range(world_size)]
    heap = [(0, rank) for rank in range(min(len(rows), world_size))]  # tokens so far, rank
    for size, row in sorted(zip(sizes, rows, strict=True), key=lambda pair: -pair[0]):
        tokens, rank = heapq.heappop(heap)
        rank_rows[rank].append(row)
        if len(rank_rows[rank]) < len(rows[rank::world_size]):
            heapq.heappush(heap, (tokens + size, rank))
    return [sorted(rows) for rows in rank_rows]

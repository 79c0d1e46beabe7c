"""How the rows of an optimizer step are shared among many processes."""

import heapq


def balance_rows(rows: range, sizes: list[int], world_size: int) -> list[list[int]]:
    """Rows for each rank, with about as many tokens: ranks wait for each other in every step.

    The longest row first, each goes to the rank with the fewest tokens so far; none gets more rows
    than its share.
    Source: Graham, Bounds on multiprocessing timing anomalies (1969): longest processing time
    first.

    Args:
        rows: those of the step.
        sizes: tokens of each.
    """
    rank_rows = [[] for _ in range(world_size)]
    heap = [(0, rank) for rank in range(min(len(rows), world_size))]  # tokens so far, rank
    for size, row in sorted(zip(sizes, rows, strict=True), key=lambda pair: -pair[0]):
        tokens, rank = heapq.heappop(heap)
        rank_rows[rank].append(row)
        if len(rank_rows[rank]) < len(rows[rank::world_size]):
            heapq.heappush(heap, (tokens + size, rank))
    return [sorted(rows) for rows in rank_rows]

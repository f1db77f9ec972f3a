"""Batches made ready ahead of the step that needs them."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def draw_ahead(draw: Callable[[int], Item], steps: range, depth: int) -> Generator[Item]:
    """Yield what `draw` returns for each step, in order, and raise what it raises.

    Args:
        draw: A pure function of the step; one thread at a time calls it.
        steps: The steps.
        depth: How many to draw ahead, in a thread that ends with the iterator; 0: none.
    """
    if depth == 0:
        yield from map(draw, steps)
        return
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        futures = (executor.submit(draw, step) for step in steps)
        ahead = deque(islice(futures, depth))
        while ahead:
            item = ahead.popleft().result()
            ahead.extend(islice(futures, 1))
            yield item
    finally:
        executor.shutdown(cancel_futures=True)

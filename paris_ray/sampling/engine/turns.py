"""Whose turn it is: fair shares among clients, and among the requests of each."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

ROWS_OF_A_TURN = 2  # the call of a guided picture

Item = TypeVar("Item")


class Owner(Protocol):
    """A request that items belong to; it is told from others by its identity."""

    @property
    def client(self) -> str:
        """Whose request it is."""
        ...


class _ClientsTurn(Generic[Item]):
    """What waits of one client: its requests take turns, an item each."""

    def __init__(self) -> None:
        self.requests: OrderedDict[Owner, deque[tuple[Item, int]]] = OrderedDict()
        self.credit = 0  # rows that it may have before it is the turn of the next

    def peek(self) -> tuple[Item, int]:
        return next(iter(self.requests.values()))[0]

    def pop(self) -> Item:
        owner, queue = self.requests.popitem(last=False)
        item, rows = queue.popleft()
        if queue:
            self.requests[owner] = queue
        self.credit -= rows
        return item


class Turns(Generic[Item]):
    """Items that clients have in turn, as many rows each; so within a client its requests.

    Source: deficit round robin, Shreedhar and Varghese 1996.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, _ClientsTurn[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        """Go through the items, in no order."""
        for client in self._clients.values():
            yield from (item for queue in client.requests.values() for item, _ in queue)

    def push(self, owner: Owner, item: Item, rows: int) -> None:
        """Put an item last of its request's, a new request last of its client's, and so on.

        Args:
            owner: The request.
            item: The item.
            rows: What it counts.
        """
        client = self._clients.setdefault(owner.client, _ClientsTurn())
        client.requests.setdefault(owner, deque()).append((item, rows))
        self._count += 1

    def peek(self) -> Item:
        """Return what `pop` would."""
        while True:
            name, client = next(iter(self._clients.items()))
            item, rows = client.peek()
            if rows <= client.credit:
                return item
            client.credit += ROWS_OF_A_TURN
            self._clients.move_to_end(name)

    def pop(self) -> Item:
        """Return the next item."""
        self.peek()
        name, client = next(iter(self._clients.items()))
        item = client.pop()
        if not client.requests:
            del self._clients[name]
        self._count -= 1
        return item

    def discard(self, owner: Owner) -> None:
        """Forget a request."""
        client = self._clients.get(owner.client)
        if client is None:
            return
        self._count -= len(client.requests.pop(owner, ()))
        if not client.requests:
            del self._clients[owner.client]

"""The queue of requests: clients take turns, and each client's own requests keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from selfdoubt.serve.engine.request import RequestHandle


class FairQueue:
    """A queue of requests in which clients take turns: one client's hundred do not hold up another client's first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[RequestHandle]] = OrderedDict()  # the first is next; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[RequestHandle]:
        for handles in self._clients.values():
            yield from handles

    def add(self, handle: RequestHandle) -> None:
        """Append a request to its client's others; a new client is behind one request of each other client."""
        self._clients.setdefault(handle.request.client, deque()).append(handle)

    def next(self, may: Callable[[RequestHandle], bool] = lambda _: True) -> RequestHandle | None:
        """Return the request whose turn it is among those that may be taken now; it stays in the queue."""
        return next(filter(may, self), None)

    def take(self, handle: RequestHandle | None = None) -> RequestHandle:
        """Take out this request, or the one whose turn it is; then it is the next client's turn."""
        handle = handle or next(iter(self))
        client = handle.request.client
        handles = self._clients[client]
        handles.remove(handle)
        if handles:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        return handle

    def remove(self, unwanted: Callable[[RequestHandle], bool]) -> list[RequestHandle]:
        """Take out the requests for which a condition holds, and return them."""
        removed = [handle for handle in self if unwanted(handle)]
        if not removed:  # nearly always, and it is checked between any two tokens
            return removed
        for client, handles in list(self._clients.items()):
            kept = deque(handle for handle in handles if handle not in removed)
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
        return removed

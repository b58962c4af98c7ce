"""Who is next: clients take turns, and each client's own requests keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from selfdoubt.serve.engine.request import RequestHandle


class FairQueue:
    """Jobs that wait. A client with a hundred of them does not hold up another client's first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[RequestHandle]] = OrderedDict()  # the first is next; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[RequestHandle]:
        for jobs in self._clients.values():
            yield from jobs

    def add(self, job: RequestHandle) -> None:
        """Behind the client's own others; a client that has none waits for one turn of each other."""
        self._clients.setdefault(job.ask.client, deque()).append(job)

    def next(self, may: Callable[[RequestHandle], bool] = lambda _: True) -> RequestHandle | None:
        """The job whose turn it is among those that may be taken now; it stays."""
        return next(filter(may, self), None)

    def take(self, job: RequestHandle | None = None) -> RequestHandle:
        """Take out this job, or the one whose turn it is; then it is the next client's turn."""
        job = job or next(iter(self))
        client = job.ask.client
        jobs = self._clients[client]
        jobs.remove(job)
        if jobs:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        return job

    def remove(self, unwanted: Callable[[RequestHandle], bool]) -> list[RequestHandle]:
        """Take out the jobs of which this is true."""
        found = [job for job in self if unwanted(job)]
        if not found:  # nearly always, and it is asked between any two tokens
            return found
        for client, jobs in list(self._clients.items()):
            kept = deque(job for job in jobs if job not in found)
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
        return found

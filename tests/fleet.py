"""Processes that train together, as threads of this one, each with a clock of its own."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any


class Fleet:
    """So many ranks, and what they exchange.

    Attributes:
        sent: for each rank, the lists that it has sent.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.sent: list[list[list[int]]] = [[] for _ in range(ranks)]
        self._counts: Counter[int] = Counter()  # how many ranks have sent their list of a number
        self._arrived = threading.Condition()
        self._is_broken = False

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        """Call `body` with each rank. Returns, by rank, what it returned or raised."""
        outcomes: list[Any] = [None] * self.ranks

        def run_rank(rank: int) -> None:
            try:
                outcomes[rank] = body(rank)
            except BaseException as exception:
                outcomes[rank] = exception

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    def send(self, rank: int, values: list[int]) -> None:
        """Let a rank send a list."""
        with self._arrived:
            number = len(self.sent[rank])
            self.sent[rank].append(values)
            self._counts[number] += 1
            if self._counts[number] == self.ranks:  # else a thousand would wake up for nothing
                self._arrived.notify_all()

    def break_off(self) -> None:
        """Let every rank that waits fail, as a framework does once one is gone."""
        with self._arrived:
            self._is_broken = True
            self._arrived.notify_all()

    def receive(self, number: int) -> list[int]:
        """The maximum of the lists of this number, once all are there.

        Raises:
            TimeoutError: a rank does not send its list.
        """
        with self._arrived:
            everybody = self._arrived.wait_for(
                lambda: self._is_broken or self._counts[number] == self.ranks, 60
            )
            if self._is_broken or not everybody:
                self.break_off()
                raise TimeoutError("a rank did not come")
            lists = [lists[number] for lists in self.sent]
        assert len({len(values) for values in lists}) == 1, "these are not the same exchange"
        return [max(values) for values in zip(*lists)]


class Ahead:
    """The exchange of a rank in two parts."""

    def __init__(self, fleet: Fleet, rank: int) -> None:
        self._fleet = fleet
        self._rank = rank
        self._finished: set[int] = set()

    def __call__(self, values: list[int]) -> Callable[[], list[int]]:
        """Send; what is returned receives."""
        number = len(self._fleet.sent[self._rank])
        self._fleet.send(self._rank, values)

        def finish() -> list[int]:
            self._finished.add(number)
            return self._fleet.receive(number)

        return finish

    def unfinished(self) -> int:
        """How many exchanges were started and not finished."""
        return len(self._fleet.sent[self._rank]) - len(self._finished)

"""Loaders that keep their state, each in a way that a library has; orders differ in each epoch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any


@lru_cache
def drawn(seed: int, length: int) -> list[int]:
    return random.Random(seed).sample(range(length), length)


class Shuffled:
    """The part that all have: an order that nobody can repeat without the state."""

    runs = itertools.count()

    def __init__(self, length: int = 6) -> None:
        self.length = length
        self.seed = 1000 * next(self.runs)
        self.at = 0
        self.loaded = False

    def begin(self) -> None:
        """Begin an epoch: a new one, or the loaded one at its place."""
        if not self.loaded:
            self.seed += 1
            self.at = 0
        self.loaded = False

    def take(self) -> int:
        """The next number of the epoch."""
        if self.at == self.length:
            raise StopIteration
        self.at += 1
        return self.order()[self.at - 1]

    def order(self) -> list[int]:
        return drawn(self.seed, self.length)

    def get(self) -> Any:
        return {"seed": self.seed, "at": self.at}

    def put(self, state: Any) -> None:
        self.seed, self.at, self.loaded = state["seed"], state["at"], True


class StatefulLoader(Shuffled):
    """With the state of an epoch's end it comes back exhausted, once."""

    def __iter__(self) -> Iterator[int]:
        self.begin()
        for _ in range(self.at, self.length):
            yield self.take()

    state_dict, load_state_dict = Shuffled.get, Shuffled.put


class BeginsAnew(StatefulLoader):
    """With the state of an epoch's end it has the next epoch before it, and not an empty rest."""

    def load_state_dict(self, state: Any) -> None:
        self.put(state)
        self.loaded = self.at < self.length


class LateWorkers(StatefulLoader):
    """Two workers in turn; a resumed one says that it is at its start until it gave a batch."""

    def __init__(self, length: int = 6) -> None:
        super().__init__(length)
        self.places = self.told = [0, 0]
        self.turn = 0

    def __iter__(self) -> Iterator[int]:
        self.told = [0, 0]
        if not self.loaded:
            self.places, self.turn = [0, 0], 0
        self.begin()
        order = self.order()
        while self.places[self.turn] < len(order[self.turn :: 2]):
            worker = self.turn
            number = order[worker::2][self.places[worker]]
            self.places[worker] += 1
            self.told[worker] = self.places[worker]
            self.turn = 1 - worker
            yield number

    def state_dict(self) -> Any:
        return {"seed": self.seed, "at": 0, "told": list(self.told), "turn": self.turn}

    def load_state_dict(self, state: Any) -> None:
        self.put(state)
        self.places, self.turn = list(state["told"]), state["turn"]
        self.loaded = sum(self.places) < self.length


class CountsTwice(StatefulLoader):
    """Like torchdata's of a data set without a state: once resumed, it counts wrong."""

    dataset = type("Stream", (), {"__iter__": None})()
    counted = 0

    def __iter__(self) -> Iterator[int]:
        self.begin()
        if self.at > self.length:
            self.loaded = True
            raise StopIteration
        self.counted = self.at
        return iter(self.take, None)

    def state_dict(self) -> Any:
        return {"seed": self.seed, "at": self.at + self.counted}

    def load_state_dict(self, state: Any) -> None:
        self.put(state)
        self.loaded = self.at != self.length


class DrawsItsOrder(StatefulLoader):
    """It draws each epoch's order as the epoch begins: no state tells that of the next one."""

    drawn: list[int]

    def __iter__(self) -> Iterator[int]:
        if not self.loaded:
            self.drawn, self.at = random.sample(range(self.length), self.length), 0
        self.loaded = False
        while self.at < len(self.drawn):
            self.at += 1
            yield self.drawn[self.at - 1]

    def state_dict(self) -> Any:
        return {"drawn": list(self.drawn), "at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.drawn, self.at, self.loaded = list(state["drawn"]), state["at"], True


class WithStatefulIterator(Shuffled):
    """Like Grain's: the iterator has get_state and set_state."""

    class Iterator:
        def __init__(self, loader: Shuffled) -> None:
            self.loader = loader
            loader.begin()

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            return self.loader.take()

        def get_state(self) -> Any:
            return self.loader.get()

        def set_state(self, state: Any) -> None:
            self.loader.put(state)
            self.loader.loaded = False

    def __iter__(self) -> Any:
        return self.Iterator(self)


class WithStateDictIterator(WithStatefulIterator):
    """The iterator has state_dict and load_state_dict."""

    class Iterator(WithStatefulIterator.Iterator):
        state_dict = WithStatefulIterator.Iterator.get_state
        load_state_dict = WithStatefulIterator.Iterator.set_state
        get_state = set_state = None


def sized(kind: type[Shuffled]) -> type[Shuffled]:
    """The same loader with a `len()`."""
    return type(f"Sized{kind.__name__}", (kind,), {"__len__": lambda self: self.length})


KINDS: list[type[Any]] = [
    StatefulLoader,
    BeginsAnew,
    LateWorkers,
    CountsTwice,
    DrawsItsOrder,
    WithStatefulIterator,
    WithStateDictIterator,
]
ALL = [*KINDS, *map(sized, KINDS)]
"""All of them, without and with a length."""

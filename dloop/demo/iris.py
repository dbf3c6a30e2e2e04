"""The Iris data set, and a dataloader over its training rows."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev

SPECIES = ("setosa", "versicolor", "virginica")

Row = tuple[list[float], int]
"""Four measurements, standardised, and the number of the species."""


def load() -> tuple[list[Row], list[Row]]:
    """The rows to train on, and every fifth one, held out to validate with."""
    with Path(__file__).with_name("iris.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            ([float(value) for value in flower], SPECIES.index(species))
            for *flower, species in list(csv.reader(file))[1:]
        ]
    held_out = rows[::5]
    training = [row for number, row in enumerate(rows) if number % 5]
    columns = list(zip(*(flower for flower, _ in training)))
    scales = [(fmean(column), pstdev(column)) for column in columns]

    def standardised(row: Row) -> Row:
        flower, species = row
        return [(x - mean) / deviation for x, (mean, deviation) in zip(flower, scales)], species

    return list(map(standardised, training)), list(map(standardised, held_out))


class Batches:
    """A dataloader: batches of rows, in a new order every epoch."""

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; dloop calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Sequence[Row]]:
        rows = random.Random(f"{self.seed} {self.epoch}").sample(self.rows, len(self.rows))
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

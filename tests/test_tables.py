"""Tables of pandas, Polars and PyArrow: going through one gives no rows, so it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dloop import Loop
from frameworks import needed

COLUMNS = {"number": [0, 1, 2, 3], "square": [0, 1, 4, 9]}


def pandas() -> Any:
    needed("pandas")
    import pandas as pd  # type: ignore[import-untyped]

    return pd.DataFrame(COLUMNS)


def polars() -> Any:
    needed("polars")
    import polars as pl

    return pl.DataFrame(COLUMNS)


def arrow() -> Any:
    needed("pyarrow")
    import pyarrow as pa  # type: ignore[import-untyped]

    return pa.table(COLUMNS)


@pytest.mark.parametrize("called", [False, True], ids=["bare", "from a callable"])
@pytest.mark.parametrize(
    ("table", "advice"),
    [(pandas, "itertuples"), (polars, "iter_slices"), (arrow, "to_batches")],
    ids=["pandas", "Polars", "PyArrow"],
)
def test_a_table_is_refused_with_what_to_pass(
    table: Callable[[], Any], advice: str, called: bool
) -> None:
    loader = table()
    with pytest.raises(TypeError) as caught:
        if called:
            next(iter(Loop(lambda: loader, max_epochs=1)))
        else:
            Loop(loader, max_epochs=1)
    text = str(caught.value)
    assert "dataloader" in text
    assert advice in text
    assert "\n" not in text
    assert len(text) < 400


ROWS = [(0, 0), (1, 1), (2, 4), (3, 9)]


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(
    ("table", "load", "rows"),
    [
        (pandas, lambda frame: frame.itertuples(index=False, name=None), lambda row: [row]),
        (polars, lambda frame: frame.iter_rows(), lambda row: [row]),
        (polars, lambda frame: frame.iter_slices(3), lambda batch: batch.rows()),
        (
            arrow,
            lambda table: table.to_batches(max_chunksize=3),
            lambda batch: list(zip(*batch.to_pydict().values())),
        ),
    ],
    ids=["itertuples", "iter_rows", "iter_slices", "to_batches"],
)
def test_its_rows_or_batches_are_taken(
    table: Callable[[], Any],
    load: Callable[[Any], Any],
    rows: Callable[[Any], list[tuple[int, int]]],
    epochs: int,
) -> None:
    loaded = load(table()) if epochs == 1 else lambda: load(table())
    loop: Loop[Any] = Loop(loaded, max_epochs=epochs)
    assert [row for batch, _ in loop for row in rows(batch)] == ROWS * epochs

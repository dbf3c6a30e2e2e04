"""What `python -m fuzz` does for minutes, for a moment and on every Python; and what it found."""

from __future__ import annotations

import random

import pytest

from fuzz import TARGETS, Bytes, told


@pytest.mark.no_core
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_any_bytes_come_to_an_end_that_is_documented(target: object) -> None:
    chance = random.Random(1)
    for _ in range(400):
        data = chance.randbytes(chance.randrange(8, 200))
        try:
            target(data)  # type: ignore[operator]
        except BaseException:
            print("the bytes:", data.hex())
            raise


@pytest.mark.no_core
@pytest.mark.parametrize("made", [AttributeError("a"), ValueError("a\nb"), ValueError("")])
def test_what_is_not_documented_or_not_one_line_is_told(made: Exception) -> None:
    with pytest.raises(AssertionError):
        told(made)


@pytest.mark.no_core
def test_bytes_that_are_over_choose_the_first() -> None:
    chosen = Bytes(b"\x02")
    assert [chosen.pick("abc"), chosen.pick("abc"), chosen.byte()] == ["c", "a", 0]

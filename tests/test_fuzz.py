"""The fuzz targets with a few random bytes, and the helpers of fuzz.py."""

from __future__ import annotations

import random

import pytest

from fuzz import TARGETS, Bytes, checked


@pytest.mark.no_core
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_random_bytes_give_runs_or_documented_errors(target: object) -> None:
    generator = random.Random(1)
    for _ in range(400):
        data = generator.randbytes(generator.randrange(8, 200))
        try:
            target(data)  # type: ignore[operator]
        except BaseException:
            print("the bytes:", data.hex())
            raise


@pytest.mark.no_core
@pytest.mark.parametrize("made", [AttributeError("a"), ValueError("a\nb"), ValueError("")])
def test_undocumented_errors_and_messages_that_are_not_one_line_fail(made: Exception) -> None:
    with pytest.raises(AssertionError):
        checked(made)


@pytest.mark.no_core
def test_after_the_last_byte_the_first_option_is_chosen() -> None:
    chosen = Bytes(b"\x02")
    assert [chosen.pick("abc"), chosen.pick("abc"), chosen.byte()] == ["c", "a", 0]

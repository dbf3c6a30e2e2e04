"""The place of a saved run in its epoch, and the same sample at another batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import loaders
from .errors import log, warn


@dataclass
class SavedPlace:
    """Where a saved run was in its epoch.

    Attributes:
        epoch: the epoch; `place`: how many of its batches were done.
        samples: how many samples a step took over all processes; 0 if it is not known, or if the
            place was converted.
        length: the epoch's length in batches, if it was known.
        is_left: whether the loader is left as it is, so that these batches do not come.
        ignores_length: whether the loader resumes by its own state at another batch size, and so
            has another number of batches left than its length says.
    """

    epoch: int = 0
    place: int = 0
    samples: int = 0
    length: int | None = None
    is_left: bool = False
    ignores_length: bool = False

    def place_in(self, loader: Any, length: int | None, has_state: bool) -> int:
        """Return how many batches of a loader come before the sample that is next.

        Args:
            loader: what yields the epoch now.
            length: its length in batches, if it is known.
            has_state: whether the loader goes to its place by a state of its own.
        """
        place, before = self.place, self.samples
        now = loaders.samples_per_step(loader) if before else 0
        if before == now:
            self._warn_of_length(length)
            return place
        if has_state or not loaders.begins_with_the_same_samples(loader):
            self.ignores_length = has_state
            warn(
                f"epoch {self.epoch} is resumed after {place} batches, but a step takes {now} "
                f"samples and not {before} as before: samples may come twice or never; keep "
                "batch_size and the number of processes with this dataloader"
            )
            return place
        reached = place * before // now
        if length:
            reached = min(reached, length - 1)  # one batch stays, so that EPOCH_END fires
        again = place * before - reached * now
        log("%d steps of %d samples are %d of %d samples", place, before, reached, now)
        if again:
            warn(
                f"epoch {self.epoch} is resumed within a batch, since a step takes {now} samples "
                f"and not {before} as before: {again} samples come again"
            )
        return reached

    def _warn_of_length(self, length: int | None) -> None:
        if self.place and None not in (self.length, length) and self.length != length:
            warn(
                f"epoch {self.epoch} is resumed after {self.place} batches, but has {length} "
                f"batches and not {self.length} as before: samples may come twice or never; keep "
                "the batch size, or begin a new run"
            )

"""Loaders that Accelerate has prepared; each is built again for every run, as in a new process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frameworks import needed
from loaders import Loader


@dataclass(frozen=True)
class Accelerated:
    """A loader of PyTorch, and what the Accelerator that prepares it is told of its loaders."""

    loader: Loader
    configuration: dict[str, Any] = field(default_factory=dict)

    def __call__(self, folder: Path) -> tuple[Any, Any]:
        """A new Accelerator and the loader that it has prepared."""
        needed("accelerate")
        if self.configuration.get("use_stateful_dataloader"):
            needed("torchdata")
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DataLoaderConfiguration

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator: Any = Accelerator(
            cpu=True,
            gradient_accumulation_steps=4,
            dataloader_config=DataLoaderConfiguration(**self.configuration),
        )
        return accelerator, accelerator.prepare(self.loader(folder))


def accelerated(loaders: dict[str, Loader]) -> dict[str, Accelerated]:
    """Each of the loaders with state and without, dispatched and not."""
    return {
        name + ", stateful" * stateful + ", dispatched" * dispatched: Accelerated(
            loader,
            {
                "use_stateful_dataloader": stateful,
                "dispatch_batches": dispatched,
                "use_seedable_sampler": True,
                "data_seed": 3,
            },
        )
        for name, loader in loaders.items()
        for stateful in (False, True)
        for dispatched in (False, True)
    }

"""A program for torchrun: two processes that Accelerate, or Fabric, has set up, and that agree."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from dloop import Event, Loop, sync
from processes import report

RANK = int(os.environ.get("RANK", "0"))
SAMPLES = 45


def with_accelerate(loader: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(loader)


def with_fabric(loader: Any) -> Any:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    return fabric.setup_dataloaders(loader)


def main() -> None:
    import torch.distributed
    from torch.utils.data import DataLoader

    set_up = {"accelerate": with_accelerate, "fabric": with_fabric}[sys.argv[2]]
    data: Any = range(SAMPLES)
    loader = set_up(DataLoader(data, batch_size=2, shuffle=True))
    events = {"Save": Event(lambda state: (RANK, state.global_step) in ((0, 2), (1, 21)))}
    loop: Loop[Any] = Loop(loader, events, max_epochs=5, sync=sync.torch_distributed(every=4))
    trace = []
    for _, fired in loop:
        trace += [(loop.epoch, loop.global_step, sorted(map(str, fired)))] if fired else []
        if (RANK, loop.global_step) == (1, 38):
            loop.stop()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(Loop(range(3), events, max_epochs=1))
    report(
        {"trace": [*trace, loop.stop_reason], "warnings": [str(each.message) for each in caught]}
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else it can abort a process that exits


if __name__ == "__main__":
    main()

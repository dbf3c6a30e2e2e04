"""Other packages with the same three step events and an empty body, and a progress bar.

Each is reduced to its minimum: no logger, no bar, no checkpoint, no optimizer where it can do
without. They are in the dependency group `peers`; one that is not installed is left out.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from dloop import Loop

from .rows import STEP_EVENTS, Row, Side, last_batch, loop_with

STEPS = 20_000
"""Fewer than in other rows, since a step of theirs takes microseconds."""


def three_checks(loop: Loop[int]) -> int:
    n = 0
    for _batch, events in loop:
        if "OptimizerStep" in events:
            n += 1
        if "Log" in events:
            n += 1
        if "DropLR" in events:
            n += 1
    return n


def ignite(data: list[int]) -> Callable[[], int]:
    """An Engine whose process function does nothing."""
    engine_of: Any = import_module("ignite.engine")
    engine = engine_of.Engine(lambda engine, batch: None)
    n = 0

    def count(engine: object) -> None:
        nonlocal n
        n += 1

    done = engine_of.Events.ITERATION_COMPLETED
    for when in (done(every=16), done(every=100), done(once=10_001)):
        engine.add_event_handler(when, count)

    def run() -> int:
        engine.run(data, max_epochs=1)
        return n

    return run


def pfn_extras(data: list[int]) -> Callable[[], int]:
    """An ExtensionsManager around a `for` loop."""
    training: Any = import_module("pytorch_pfn_extras.training")
    manager = training.ExtensionsManager(
        {}, {}, 1, iters_per_epoch=len(data), out_dir=tempfile.gettempdir()
    )
    n = 0

    def count(manager: object) -> None:
        nonlocal n
        n += 1

    at_step = training.triggers.ManualScheduleTrigger([10_001], "iteration")
    for name, trigger in [("16", (16, "iteration")), ("100", (100, "iteration")), ("at", at_step)]:
        manager.extend(count, name=name, trigger=trigger)

    def run() -> int:
        for _batch in data:
            with manager.run_iteration():
                pass
        return n

    return run


def fires(step: int) -> int:
    """How many of the three events fire, by hand: the trainers below have callbacks alone."""
    return ((step + 1) % 16 == 0) + ((step + 1) % 100 == 0) + (step == 10_000)


def lightning(data: list[int]) -> Callable[[], int]:
    """A Trainer, with a module that does nothing."""
    lightning: Any = import_module("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    n = 0

    class Module(lightning.LightningModule):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: object, step: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    class Count(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(
            self, trainer: object, module: object, outputs: object, batch: object, step: int
        ) -> None:
            nonlocal n
            n += fires(step)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Count()],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )

    def run() -> int:
        trainer.fit(Module(), data)
        return n

    return run


def keras(data: list[int]) -> Callable[[], int]:
    """`Model.fit` on PyTorch, with a train_step that does nothing."""
    os.environ["KERAS_BACKEND"] = "torch"
    keras: Any = import_module("keras")
    numpy: Any = import_module("numpy")
    n = 0

    class Model(keras.Model):  # type: ignore[misc]
        def call(self, batch: object) -> object:
            return batch

        def train_step(self, batch: object) -> dict[str, float]:
            return {}

    class Count(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, step: int, logs: object = None) -> None:
            nonlocal n
            n += fires(step)

    model = Model()
    model.compile(run_eagerly=True)
    batch = (numpy.zeros(1),)  # it takes arrays alone

    def run() -> int:
        batches = (batch for _ in data)
        model.fit(batches, steps_per_epoch=len(data), verbose=0, callbacks=[Count()], shuffle=False)
        return n

    return run


def trainer(data: list[int]) -> Callable[[], int]:
    """A Trainer of Hugging Face, whose training_step does nothing; its optimizer has to step."""
    transformers: Any = import_module("transformers")
    torch: Any = import_module("torch")
    n = 0

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> list[dict[str, object]]:
            return [{} for _ in data]

        def training_step(self, *arguments: object) -> Any:
            return torch.zeros(())

        def log(self, *arguments: object) -> None: ...

    class Count(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, arguments: object, state: Any, control: object, **_: object) -> None:
            nonlocal n
            n += fires(state.global_step - 1)

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0,
    )
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def run() -> int:
        Trainer(
            model,
            arguments,
            train_dataset=data,
            callbacks=[Count()],
            optimizers=(optimizer, None),
        ).train()
        return n

    return run


def tnt(data: list[int]) -> Callable[[], int]:
    """`train` of TNT, with a unit that does nothing."""
    framework: Any = import_module("torchtnt.framework")
    n = 0

    class Unit(framework.TrainUnit):  # type: ignore[misc]
        def train_step(self, state: object, data: object) -> None: ...

    class Count(framework.Callback):  # type: ignore[misc]
        def on_train_step_end(self, state: object, unit: Any) -> None:
            nonlocal n
            n += fires(unit.train_progress.num_steps_completed - 1)

    def run() -> int:
        framework.train(Unit(), data, max_epochs=1, callbacks=[Count()])
        return n

    return run


class Nowhere:
    """A file that discards the progress bar."""

    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


def bar(data: list[int]) -> Iterable[int]:
    tqdm: Any = import_module("tqdm")
    drawn: Iterable[int] = tqdm.tqdm(data, file=Nowhere())
    return drawn


def call(run: Callable[[], int]) -> int:
    return run()


def last_item(batches: Iterable[int]) -> int:
    for batch in batches:  # noqa: B007
        pass
    return batch


TRAINERS = [
    ("Ignite's Engine", ignite, "ignite"),
    ("pytorch-pfn-extras' ExtensionsManager", pfn_extras, "pytorch_pfn_extras"),
    ("TNT's train", tnt, "torchtnt"),
    ("Keras' fit", keras, "keras"),
    ("Lightning's Trainer", lightning, "lightning"),
    ("Hugging Face's Trainer", trainer, "transformers"),
]
PEERS = [
    Row(
        "iteration, step events / tqdm(data)",
        Side(loop_with(STEP_EVENTS), last_batch),
        Side(bar, last_item),
        needs="tqdm",
    ),
    *[
        Row(
            f"three step events / {name}",
            Side(loop_with(STEP_EVENTS), three_checks),
            Side(peer, call),
            steps=STEPS,
            needs=package,
        )
        for name, peer, package in TRAINERS
    ],
]

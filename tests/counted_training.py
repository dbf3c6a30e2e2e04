"""Two trainings that decide in the body; each saves often, and can be killed and run again.

`python counted_training.py NAME FOLDER STEP` kills itself with SIGKILL in the body of that step, if
it gets there. Its last line is its weights, to the last digit.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from dloop import Event, Loop, LoopEvents, batched


def sentences() -> list[list[float]]:
    """Sequences of varying length."""
    numbers = random.Random(1)
    return [[numbers.random() for _ in range(numbers.randint(1, 30))] for _ in range(90)]


def load(path: Path, loop: Loop[Any], model: dict[str, Any]) -> None:
    if path.exists():
        saved = json.loads(path.read_text())
        loop.load_state_dict(saved["loop"])
        model.update(saved["model"])


def save(path: Path, loop: Loop[Any], model: dict[str, Any]) -> None:
    path.with_suffix(".new").write_text(json.dumps({"loop": loop.state_dict(), "model": model}))
    path.with_suffix(".new").replace(path)


def by_tokens(path: Path, dies_at: int) -> dict[str, Any]:
    """Its units are tokens: it saves, evaluates and ends by them."""
    events = {
        "Save": Event(every_n=150, of="tokens") | LoopEvents.TRAINING_END,
        "Evaluate": Event(every_n=400, of="tokens", wait_for="Slow"),
        "Slow": Event(every_n_steps=3),
    }
    loop = Loop(batched(sentences(), 4), events, stop_when=Event(at=5000, of="tokens"))
    model: dict[str, Any] = {"weight": 0.5, "evaluated": []}
    load(path, loop, model)
    for batch, _ in loop:
        tokens = [token for sentence in batch for token in sentence]
        model["weight"] -= 0.1 * sum([model["weight"] - math.sin(each) for each in tokens]) / 99
        events_now = loop.count("tokens", len(tokens))
        if "Evaluate" in events_now:
            model["evaluated"].append([loop.global_step, loop.counts["tokens"], model["weight"]])
        if loop.global_step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if "Save" in events_now:
            save(path, loop, model)
    return model


def to_the_best(path: Path, dies_at: int) -> dict[str, Any]:
    """It keeps its best weights, and stops after three epochs without better ones."""
    loop = Loop(
        sentences(), {"Save": Event(every_n_steps=40) | LoopEvents.TRAINING_END}, max_epochs=99
    )
    model: dict[str, Any] = {"weight": 0.5, "best": None, "loss": math.inf, "waited": 0}
    load(path, loop, model)
    for batch, events in loop:
        model["weight"] -= 0.05 * (model["weight"] - sum(batch) / len(batch))
        if loop.global_step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if LoopEvents.EPOCH_END in events:
            loss = abs(math.sin(7 * model["weight"] + loop.epoch))
            model["waited"] += 1
            if loss < model["loss"]:
                model.update(best=model["weight"], loss=loss, waited=0)
            if model["waited"] == 3:
                events = loop.finish()
        if "Save" in events:
            save(path, loop, model)
    return {**model, "steps": loop.steps_done, "stop_reason": loop.stop_reason}


TRAININGS = {"by_tokens": by_tokens, "to_the_best": to_the_best}

if __name__ == "__main__":
    name, folder, dies_at = sys.argv[1:]
    print(json.dumps(TRAININGS[name](Path(folder) / "run.json", int(dies_at))))

"""Learn to balance a pole by deep Q-learning: an environment is the dataloader.

    pip install dloop torch gymnasium
    python -m dloop.demo.dqn

Kill it at any time: the same command resumes, and ends with the same weights.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import copy
import hashlib
import random
from collections import deque
from pathlib import Path
from typing import Any

from dloop import Event, Loop

try:
    import gymnasium
    import torch
except ImportError as error:
    raise SystemExit(f"this demo needs PyTorch and gymnasium ({error})") from error


def train(episodes: int, checkpoint: Path) -> str:
    """Play so many episodes, from the checkpoint on if there is one; return a summary."""
    torch.manual_seed(0)
    chance = random.Random(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    target = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    modules = model, target, optimizer
    memory: deque[Any] = deque(maxlen=10_000)
    environment = gymnasium.make("CartPole-v1", max_episode_steps=200)

    def play() -> Any:
        while True:
            state, _ = environment.reset(seed=loop.counts.get("episodes", 0))
            ends = cut = False
            while not (ends or cut):
                action = int(model(torch.from_numpy(state)).argmax())
                if chance.random() < max(0.05, 1 - loop.steps_done / 3000):
                    action = chance.randrange(2)
                following, reward, ends, cut, _ = environment.step(action)
                yield (state.tolist(), action, reward, following.tolist(), float(ends)), ends or cut
                state = following

    loop = Loop(
        play(),
        events={
            "Learn": Event(every_n_steps=4, from_step=500),
            "Target": Event(every_n_steps=500),
            "Log": Event(every_n=20, of="episodes"),
            "Checkpoint": Event(every_n=10, of="episodes"),  # between two episodes
        },
        stop_when=Event(at=episodes, of="episodes"),
        fast_forward=False,  # the environment begins a new episode after a resume
    )
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        for module, state_of in zip(modules, saved["states"]):
            module.load_state_dict(state_of)
        chance, memory = saved["chance"], saved["memory"]
        loop.load_state_dict(saved["loop"])
    for (made, is_over), fired in loop:
        memory.append(made)
        if "Learn" in fired:
            chosen = zip(*chance.choices(memory, k=64))
            states, actions, rewards, nexts, final = map(torch.tensor, chosen)
            wanted = rewards + 0.99 * (1 - final) * target(nexts).max(1).values.detach()
            values = model(states).gather(1, actions[:, None])[:, 0]
            optimizer.zero_grad()
            torch.nn.functional.smooth_l1_loss(values, wanted).backward()
            optimizer.step()
        if "Target" in fired:
            target.load_state_dict(model.state_dict())
        fired = loop.count("episodes", int(is_over))
        if "Log" in fired:
            lap = loop.lap("Log")
            length = lap.steps / lap.counts["episodes"]
            print(f"{loop.counts['episodes']} episodes, the latest of {length:.0f} steps")
        if "Checkpoint" in fired:
            saved = {"states": [each.state_dict() for each in modules], "loop": loop.state_dict()}
            torch.save({**saved, "chance": chance, "memory": memory}, f"{checkpoint}.new")
            Path(f"{checkpoint}.new").replace(checkpoint)
            print("checkpoint", flush=True)
    weights = b"".join(each.numpy().tobytes() for each in model.state_dict().values())
    return f"done: {loop.steps_done} steps, weights {hashlib.sha256(weights).hexdigest()[:12]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--checkpoint", type=Path, default=Path("dqn.pt"))
    print(train(**vars(parser.parse_args())))

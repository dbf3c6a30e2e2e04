"""The time per step of dloop, compared with alternatives.

dloop and the alternative run in turns over the same items, in one process. Medians are printed,
each with half the interquartile range in percent; the ratio is the median of all turns' ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import dloop

from .floor import compiled
from .peers import PEERS
from .rows import COSTS, FLOOR_ROWS, ROWS, Cost, Row, Side


def timed(side: Side, data: list[int]) -> float:
    """Nanoseconds per item."""
    made = side.make(data)
    gc.collect()
    began = time.perf_counter_ns()
    side.run(made)
    return (time.perf_counter_ns() - began) / len(data)


def summary(values: list[float]) -> dict[str, float]:
    """The median, and half the interquartile range in percent of it."""
    if len(values) == 1:
        return {"median": values[0], "spread": 0.0}
    low, _, high = quantiles(values, n=4, method="inclusive")
    middle = median(values)
    return {"median": middle, "spread": 50 * (high - low) / abs(middle) if middle else 0.0}


def compare(row: Row, rounds: int) -> dict[str, Any]:
    """Run both in turns; every second turn begins with the other one."""
    result = {"name": row.name, "target": row.target, "stretch": row.stretch, "unit": "ns per step"}
    if row.needs is not None and find_spec(row.needs) is None:
        return {**result, "missing": row.needs}
    data = list(range(row.steps))
    timed(row.ours, data)
    timed(row.rival, data)
    ours: list[float] = []
    rival: list[float] = []
    for number in range(rounds):
        both = [(ours, row.ours), (rival, row.rival)]
        for times, side in both if number % 2 else reversed(both):
            times.append(timed(side, data))
    ratios = [mine / other for mine, other in zip(ours, rival)]
    return {
        **result,
        "steps": row.steps,
        "ours": summary(ours),
        "rival": summary(rival),
        "ratio": summary(ratios),
    }


def cost(row: Cost, rounds: int) -> dict[str, Any]:
    values = [row.measure() for _ in range(1 if row.once else rounds)]
    wanted = {"target": row.target, "stretch": row.stretch}
    return {"name": row.name, **wanted, "unit": row.unit, "ours": summary(values)}


def processor() -> str:
    """The processor's name, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": platform.python_compiler(),
        "dloop": str(Path(dloop.__file__).parent),
        "backend": dloop.BACKEND,
        "backend_reason": dloop.BACKEND_REASON,
    }


def reached(row: dict[str, Any]) -> str:
    """Which of its targets the row has reached."""
    if row["target"] is None:
        return ""
    value = row["ratio" if "ratio" in row else "ours"]["median"]
    if row["stretch"] is not None and value <= row["stretch"]:
        return "stretch"
    return "target" if value <= row["target"] else "missed"


def shown(value: dict[str, float] | None, unit: str, number: str = ",.1f") -> str:
    return "" if value is None else f"{value['median']:{number}}{unit} ±{value['spread']:2.0f}%"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "missing" in row:
        return f"{row['name']:58}{'not installed':>18}"
    short = {"ns per step": " ns", "bytes": " B"}.get(row["unit"], f" {row['unit']}")
    cells = [
        f"{shown(row['ours'], short):>18}",
        f"{shown(row.get('rival'), short):>20}",
        f"{shown(row.get('ratio'), '', '.3g'):>13}",
        *[f"{'' if row[aim] is None else row[aim]:>8}" for aim in ("target", "stretch")],
        f"  {reached(row)}",
    ]
    return f"{row['name']:58}{''.join(cells)}".rstrip()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=15, help="how often to run each")
    parser.add_argument("--rows", default="", metavar="WORD", help="rows with this in their names")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds}: at least one is needed")
    # Peers come last, since the modules that they import stay loaded and could affect the others.
    every: list[Row | Cost] = [*ROWS, *COSTS, *PEERS]
    rows = [row for row in every if asked.rows.lower() in row.name.lower()]
    if not rows:
        parser.error(f"--rows {asked.rows}: no row has this in its name")

    if any(row in FLOOR_ROWS for row in rows):
        compiled()  # if this fails, then before the table

    about = machine()
    if not asked.json:
        print(f"{about['processor']}, {about['cores']} cores, {about['system']}")
        print(f"{about['python']} ({about['compiler']}), {about['backend']} core, {about['dloop']}")
        print(f"medians of {asked.rounds} rounds\n")
        print(f"{'':58}{'dloop':>18}{'rival':>20}{'ratio':>13}{'target':>8}{'stretch':>8}  reached")
    results = []
    for row in rows:
        result = compare(row, asked.rounds) if isinstance(row, Row) else cost(row, asked.rounds)
        results.append(result)
        if not asked.json:
            print(line(result), flush=True)
    if asked.json:
        print(json.dumps({"machine": about, "rounds": asked.rounds, "rows": results}, indent=1))


if __name__ == "__main__":
    main()

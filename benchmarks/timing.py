# Copyright 2026 The ChatGLM Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How the benchmarks time: in turns, medians with quartiles, and what others took of the machine meanwhile.

What is compared takes turns, so that a machine that slows down slows all of it, and a ratio is the median of the ratios
of turns that stood beside each other. A turn of some steps counts with its median step.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


# /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
IDLE_FIELDS = (3, 4)
# Where others take more of the machine than this, a turn is taken again if there is patience.
NOISE = 0.1


def count_cores() -> int:
    return os.cpu_count() or 1


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked, for this machine or, if it is virtual, for others on its host."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    except OSError:  # not Linux
        return None
    ticks = sum(int(value) for place, value in enumerate(fields) if place not in IDLE_FIELDS)
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """Seconds that pass in its block, and the seconds of cores that others take meanwhile (Linux; `None` elsewhere)."""

    seconds = 0.0
    others: float | None = None

    def __enter__(self) -> "Watch":
        self.busy, self.own, self.start = busy_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self.start
        busy = busy_seconds()
        if busy is not None and self.busy is not None:
            self.others = max(0.0, busy - self.busy - (time.process_time() - self.own))


@dataclass(frozen=True)
class Turn:
    """One turn: its median step, how long all of it took, and the seconds of cores that others took meanwhile."""

    seconds: float
    total: float
    others: float | None = None

    @property
    def disturbance(self) -> float:
        """Which part of the machine others took; 0 where that is not known."""
        return (self.others or 0.0) / (self.total * count_cores())


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_steps(step: Callable[[], Any], steps: int = 1, untimed: int = 0, device: str = "cpu") -> Turn:
    """One turn of `steps`; what comes first may be left out, as it wakes threads and finds cold caches."""
    for _ in range(untimed):
        step()
    seconds = []
    with Watch() as watch:
        for _ in range(steps):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return Turn(statistics.median(seconds), watch.seconds, watch.others)


@dataclass
class Series:
    """The turns of one of those that are compared."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        return quartiles([turn.seconds for turn in self.turns])

    @property
    def median(self) -> float:
        return self.quartiles[1]

    def ratios_to(self, other: "Series") -> tuple[float, float, float]:
        """How many times as fast as the other: lower quartile, median, upper quartile over the rounds."""
        return quartiles([theirs.seconds / own.seconds for own, theirs in zip(self.turns, other.turns)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def share_of_others(series: Sequence[Series]) -> float | None:
    """Which part of the machine others took while these turns ran."""
    turns = [turn for one in series for turn in one.turns]
    others = [turn.others for turn in turns if turn.others is not None]
    if len(others) < len(turns):
        return None
    return sum(others) / (sum(turn.total for turn in turns) * count_cores())


def take_turns(
    runs: Mapping[str, Callable[[], Turn]], rounds: int, warm_ups: int = 1, patience: int = 0
) -> dict[str, Series]:
    """Let each run in every round, there and back again by turns, so that nobody is always behind the same one.

    Args:
        patience: how often a turn is taken again that others disturbed; the least disturbed one counts.
    """
    series = {name: Series() for name in runs}
    for number in range(warm_ups + rounds):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            turns = [runs[name]()]
            while number >= warm_ups and len(turns) <= patience and turns[-1].disturbance > NOISE:
                turns.append(runs[name]())
            if number >= warm_ups:
                series[name].turns.append(min(turns, key=lambda turn: turn.disturbance))
    return series


def median_seconds(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", repeats: int = 1
) -> dict[str, float]:
    """Median seconds of each run, in turns."""

    def repeat(run: Callable[[], Any]) -> None:
        for _ in range(repeats):
            run()

    timed = {name: lambda run=run: time_steps(lambda: repeat(run), device=device) for name, run in runs.items()}
    return {name: series.median / repeats for name, series in take_turns(timed, rounds).items()}


def read_bandwidth(threads: int, megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes that this many threads read per second from memory: the best of several ways and rounds, as a limit is."""
    numbers = torch.ones(megabytes * 2**20 // 4, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(rounds):
        for read in (numbers.amax, numbers.view(torch.int64).amax, numbers.view(torch.float32).sum):
            start = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return numbers.nbytes / min(seconds)


def memory_bytes(name: str) -> int | None:
    """A line of /proc/self/status in bytes, such as RssAnon, the memory besides mapped files; `None` if not on Linux."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")), None)


def anonymous_bytes() -> int:
    """Memory of this process without mapped files (Linux)."""
    found = memory_bytes("RssAnon")
    if found is None:
        raise RuntimeError("This system does not report anonymous memory.")
    return found


def forget_peak() -> None:
    """Let VmHWM, the peak of the resident memory, start again from now (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}\n")
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |", flush=True)


def describe_machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": count_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Keep the figures, and on what they were measured, if there is a file to keep them in."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": describe_machine(), **report}
        path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


__all__ = [
    "Series",
    "Turn",
    "Watch",
    "anonymous_bytes",
    "busy_seconds",
    "count_cores",
    "describe_machine",
    "forget_peak",
    "median_seconds",
    "memory_bytes",
    "print_table",
    "quartiles",
    "read_bandwidth",
    "share_of_others",
    "synchronize",
    "take_turns",
    "time_steps",
    "write_report",
]

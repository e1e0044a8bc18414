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
"""Speed on a CPU beside what one would use instead: llama.cpp and Transformers' native `glm`, and the memory's limit.

`python benchmarks/peers.py` times a slice of ChatGLM3-6B (its width, four layers, random weights) in 16, 8 and 4 bits,
the output layer in the same width: decoding of 1, 4 and 16 sequences behind 32 tokens, and prefill of 256 and 2,048.

- Everybody has a process and a model of its own, with the same number of threads, and they take turns: one is timed
  while the others wait. The native model has our bfloat16 weights and shares the process with them.
- llama.cpp is timed where its packages are installed (requirements/peers.txt), on a file of the same shape that is
  written to a temporary folder.
- The limit is the bytes of the weights that a step has to read over the bandwidth that this run measures.
- Ratios say how many times as fast as the other we are, as medians and quartiles over the rounds. Beside each figure
  stands which part of the machine other processes took while it was measured.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import llama
import torch
from slices import build_native, build_slice, read_bytes
from timing import (
    Series,
    Turn,
    forget_peak,
    memory_bytes,
    print_table,
    read_bandwidth,
    share_of_others,
    take_turns,
    time_steps,
    write_report,
)


PROMPT = 32
# The first step of a turn wakes threads.
UNTIMED = 1
LONG_PROMPT = 1000
OURS, LLAMA, NATIVE = "ours", "llama.cpp", "native"
LABELS = {OURS: "this repository", LLAMA: "llama.cpp, same bits", NATIVE: "native glm, bfloat16"}


@dataclass(frozen=True)
class Weights:
    """A row of the tables: the width of our weights, and the dtype of what is not quantized."""

    name: str
    bits: int
    dtype: str = "bfloat16"


WEIGHTS = {
    weights.name: weights
    for weights in (Weights("bfloat16", 16), Weights("float16", 16, "float16"), Weights("int8", 8), Weights("int4", 4))
}


@dataclass(frozen=True)
class Work:
    """What is timed: one more token for each sequence of a batch, or a prompt of one sequence."""

    batch: int = 1
    prefill: int = 0

    @property
    def name(self) -> str:
        return f"prefill {self.prefill}" if self.prefill else f"batch {self.batch}"


class TorchEngine:
    """Our model, and the native one on the same weights where it has any."""

    def __init__(self, arguments: argparse.Namespace, weights: Weights) -> None:
        torch.set_num_threads(arguments.threads)
        before = memory_bytes("VmRSS") or 0
        model = build_slice(arguments.layers, getattr(torch, weights.dtype), vocab_size=arguments.vocab)
        self.models: dict[str, Any] = {OURS: model}
        if weights.bits < 16:
            model.quantize(bits=weights.bits, output_layer_bits=weights.bits)
        elif weights.dtype == "bfloat16":
            self.models[NATIVE] = build_native(model)
        self.vocab = arguments.vocab
        self.before = before
        self.steps: dict[str, Callable[[], Any]] = {}

    @torch.no_grad()
    def compare(self) -> float:
        """The greatest difference of the logits of both models over the greatest logit."""
        prompt = torch.randint(3, self.vocab, (1, PROMPT))
        ours, native = (self.models[name](prompt).logits.float() for name in (OURS, NATIVE))
        return ((ours - native).abs().max() / native.abs().max()).item()

    @torch.no_grad()
    def prepare(self, name: str, work: Work, steps: int) -> None:
        forget_peak()
        model = self.models[name]
        if work.prefill:
            prompt = torch.randint(3, self.vocab, (1, work.prefill))
            self.steps[name] = lambda: model(prompt, use_cache=True, logits_to_keep=1)
            return
        cache = model(torch.randint(3, self.vocab, (work.batch, PROMPT)), use_cache=True).past_key_values
        token = torch.randint(3, self.vocab, (work.batch, 1))
        self.steps[name] = lambda: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def take_turn(self, name: str, steps: int, untimed: int) -> Turn:
        return time_steps(self.steps[name], steps, untimed)

    def read_bytes(self) -> int:
        return read_bytes(self.models[OURS])

    def peak_bytes(self) -> int:
        """The peak of the resident memory since the last preparation, less what this process had without a model."""
        return (memory_bytes("VmHWM") or 0) - self.before


class LlamaEngine:
    """llama.cpp on a file that is written here."""

    def __init__(self, arguments: argparse.Namespace, weights: Weights, folder: str) -> None:
        model = build_slice(arguments.layers, torch.bfloat16, "meta", vocab_size=arguments.vocab)
        path = Path(folder) / f"{llama.TYPES[weights.bits]}.gguf"
        llama.write_model(path, model, weights.bits)
        self.before = memory_bytes("VmRSS") or 0
        self.model = llama.LlamaModel(path, arguments.threads)
        self.steps: dict[str, Callable[[], Any]] = {}

    def prepare(self, name: str, work: Work, steps: int) -> None:
        forget_peak()
        if work.prefill:
            self.steps[name] = self.model.prefill_step(work.prefill)
        else:
            self.steps[name] = self.model.decode_step(work.batch, PROMPT, steps)

    def take_turn(self, name: str, steps: int, untimed: int) -> Turn:
        return time_steps(self.steps[name], steps, untimed)

    def peak_bytes(self) -> int:
        return (memory_bytes("VmHWM") or 0) - self.before


ENGINES = {"torch": TorchEngine, "llama": LlamaEngine}


def serve(connection: Connection, engine: str, *settings: Any) -> None:
    """Make an engine in this process and answer calls of its methods; an error is the answer as well."""
    try:
        made = ENGINES[engine](*settings)
        connection.send(None)
        while True:
            method, values = connection.recv()
            connection.send(getattr(made, method)(*values))
    except EOFError:
        return
    except Exception as error:
        connection.send(error)


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: str, *settings: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, engine, *settings), daemon=True)
        self.process.start()
        other.close()
        self.receive()

    def receive(self) -> Any:
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, method: str, *values: Any) -> Any:
        self.connection.send((method, values))
        return self.receive()

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def rounds_of(work: Work, arguments: argparse.Namespace) -> int:
    """Fewer of what takes long."""
    return max(min(3, arguments.rounds), arguments.rounds * 128 // max(128, work.prefill))


def time_work(work: Work, runners: dict[str, tuple[Worker, str]], arguments: argparse.Namespace) -> dict[str, Series]:
    """The turns of everybody at one kind of work."""
    rounds = rounds_of(work, arguments)
    steps, untimed = (1, 0) if work.prefill else (arguments.steps, UNTIMED)
    is_long = work.prefill > LONG_PROMPT
    patience = 0 if is_long else arguments.patience
    for worker, name in runners.values():
        worker.call("prepare", name, work, (rounds + 1) * (patience + 1) * (steps + untimed))
    runs = {
        runner: lambda worker=worker, name=name: worker.call("take_turn", name, steps, untimed)
        for runner, (worker, name) in runners.items()
    }
    # A long prompt warms itself up.
    return take_turns(runs, rounds, warm_ups=0 if is_long else 1, patience=patience)


def describe(
    weights: Weights, work: Work, series: dict[str, Series], num_bytes: int, bandwidth: float
) -> dict[str, Any]:
    """Everything that is known of one row of the table."""
    ours = series[OURS]
    figure: dict[str, Any] = {"weights": weights.name, "work": work.name, "batch": work.batch, "prefill": work.prefill}
    figure["ratios"] = {name: ours.ratios_to(other) for name, other in series.items() if name != OURS}
    figure["seconds"] = {name: one.quartiles for name, one in series.items()}
    figure["others"] = {name: share_of_others([one]) for name, one in series.items()}
    figure["turns"] = {name: [turn.seconds for turn in one.turns] for name, one in series.items()}
    if not work.prefill:
        figure["limit"] = num_bytes / bandwidth
        figure["of_limit"] = figure["limit"] / ours.median
    figure["all_others"] = share_of_others(list(series.values()))
    return figure


HEADER = [
    "weights",
    "work",
    "× llama.cpp",
    "× native",
    "of limit",
    "ours, ms",
    "llama.cpp, ms",
    "native, ms",
    "limit, ms",
    "others took",
]


def row_of(figure: dict[str, Any]) -> list[str]:
    def ratio(name: str) -> str:
        if name not in figure["ratios"]:
            return ""
        low, middle, high = figure["ratios"][name]
        return f"{middle:.2f} ({low:.2f}–{high:.2f})"

    def milliseconds(name: str) -> str:
        if name not in figure["seconds"]:
            return ""
        return f"{1e3 * figure['seconds'][name][1]:.1f}" + (
            "" if figure["others"][name] is None else f" [{100 * figure['others'][name]:.0f} %]"
        )

    return [
        figure["weights"],
        figure["work"],
        ratio(LLAMA),
        ratio(NATIVE),
        f"{100 * figure['of_limit']:.0f} %" if "of_limit" in figure else "",
        *(milliseconds(name) for name in (OURS, LLAMA, NATIVE)),
        f"{1e3 * figure['limit']:.1f}" if "limit" in figure else "",
        "" if figure["all_others"] is None else f"{100 * figure['all_others']:.0f} %",
    ]


def measure_bandwidth(threads: int, known: dict[int, float]) -> None:
    """Measure again and keep the better figure, as a limit is."""
    for number in sorted({1, threads}):
        known[number] = max(known.get(number, 0.0), read_bandwidth(number))


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    bandwidth: dict[int, float] = {}
    measure_bandwidth(arguments.threads, bandwidth)
    works = [Work(batch=batch) for batch in arguments.batches] + [Work(prefill=tokens) for tokens in arguments.prefill]
    bfloat16 = Worker("torch", arguments, WEIGHTS["bfloat16"])
    print(f"largest difference from the native model's logits: {bfloat16.call('compare'):.1e} of the greatest")
    print("| " + " | ".join(HEADER) + " |")
    found: list[tuple[Weights, Work, dict[str, Series], int]] = []
    memory = []
    llama_worker: Worker | None = None
    llama_bits = 0
    for weights in (WEIGHTS[name] for name in arguments.weights):
        if llama.version() and llama_bits != weights.bits:
            if llama_worker is not None:
                llama_worker.close()
            llama_worker, llama_bits = Worker("llama", arguments, weights, folder), weights.bits
        own = bfloat16 if weights.name == "bfloat16" else Worker("torch", arguments, weights)
        runners = {OURS: (own, OURS), NATIVE: (bfloat16, NATIVE)}
        if llama_worker is not None:
            runners[LLAMA] = (llama_worker, LLAMA)
        peaks: dict[str, int] = {}
        for work in works:
            series = time_work(work, runners, arguments)
            found.append((weights, work, series, own.call("read_bytes")))
            measure_bandwidth(arguments.threads, bandwidth)
            figure = describe(weights, work, series, found[-1][-1], bandwidth[arguments.threads])
            print("| " + " | ".join(row_of(figure)) + " |", flush=True)
            for name, (worker, _) in runners.items():
                peaks[name] = max(peaks.get(name, 0), worker.call("peak_bytes"))
        memory.append({"weights": weights.name, "bytes": found[-1][-1], "peak": peaks})
        if own is not bfloat16:
            own.close()
    figures = [describe(*one, bandwidth[arguments.threads]) for one in found]
    return {"bandwidth": bandwidth, "figures": figures, "memory": memory, "llama.cpp": llama.version()}


def print_report(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    speeds = ", ".join(f"{value / 1e9:.1f} GB/s by {number}" for number, value in report["bandwidth"].items())
    print(f"\nread bandwidth: {speeds} threads; llama.cpp: {report['llama.cpp'] or 'not installed'}")
    title = f"{arguments.layers} layers, {arguments.threads} threads; in brackets what others took of the machine"
    print_table(title, HEADER, [row_of(figure) for figure in report["figures"]])
    rows = [
        [one["weights"], f"{one['bytes'] / 1e9:.2f}"]
        + [f"{one['peak'][name] / 1e9:.2f}" if one["peak"].get(name) else "" for name in (OURS, LLAMA, NATIVE)]
        for one in report["memory"]
    ]
    header = ["weights", "read for a token", "ours, peak", LLAMA, NATIVE]
    print_table("GB of resident memory while running, mapped files included", header, rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of all competitors for each kind of work, with the limit across them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    works = list(dict.fromkeys(figure["work"] for figure in report["figures"]))
    names = [name for name in (OURS, LLAMA, NATIVE) if any(name in one["seconds"] for one in report["figures"])]
    figure, panels = pyplot.subplots(1, len(works), figsize=(3.2 * len(works), 3.6), squeeze=False)
    for work, panel in zip(works, panels[0]):
        rows = [one for one in report["figures"] if one["work"] == work]
        for place, (name, color) in enumerate(zip(names, ("#1f77b4", "#ff7f0e", "#b0b0b0"))):
            heights = [1e3 * one["seconds"].get(name, (0, 0, 0))[1] for one in rows]
            panel.bar(
                [index + 0.27 * (place - 1) for index in range(len(rows))],
                heights,
                0.25,
                label=LABELS[name],
                color=color,
            )
        for index, one in enumerate(rows):
            if "limit" in one:
                label = "limit of the memory" if index == 0 else None
                panel.hlines(1e3 * one["limit"], index - 0.45, index + 0.45, colors="black", linewidth=2, label=label)
        panel.set_xticks(range(len(rows)), [one["weights"] for one in rows], rotation=30)
        panel.set_title(work + (" tokens" if work.startswith("prefill") else ", a step"), fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=100)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=65024, help="ids of the model; fewer take less memory")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), metavar="WIDTH")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, nargs="*", default=[256, 2048], help="tokens in the prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=4, help="tokens in each turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each; long prompts have fewer")
    parser.add_argument("--patience", type=int, default=2, help="how often a turn is repeated that others disturbed")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--picture", type=Path, help="draw them as bars to this file, PNG")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    # What reads it makes its threads when it is loaded, which is in the processes that are started from here.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, folder)
    print_report(report, arguments)
    write_report(arguments.json, report)
    if arguments.picture:
        draw(report, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
"""Runs every benchmark of this folder: `python benchmarks/run.py [NAME ...]`, or `make bench`.

By default each one is small enough for a laptop, which shows that it works rather than how fast the code is. `--full`
runs them as the figures in `docs/` were made. The figures are kept as JSON in `output/benchmarks/`.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
FIGURES = FOLDER.parent / "output" / "benchmarks"
# One layer at the width of ChatGLM3-6B, a few rounds.
QUICK = {
    "family": ["--layers=2", "--vocab=8192", "--contexts=64", "--steps=1", "--rounds=3"],
    "finetune": ["--layers=1", "--length=16", "--rounds=1"],
    "finetune_memory": ["--layers=2", "--lengths=1024"],
    "peers": ["--layers=1", "--vocab=8192", "--batches", "1", "4", "--prefill=64", "--steps=2", "--rounds=3"],
    "pictures": ["--layers=1", "--vision-layers=1", "--vocab=8192", "--image-size=280", "--tokens=3"],
    "prefill_memory": ["--lengths", "2048", "4096"],
    "quantized": ["--layers=1", "--vocab=8192", "--rows=1", "--prompt=32", "--tokens=8", "--rounds=2"],
    "revisions": ["--layers=1", "--weights", "int4", "--dtypes", "float16", "--batches=1", "--tokens=4", "--loads=1"],
    "serving": ["--timed=2", "--tokens=16", "--requests=0"],
    "tokenizers_speed": ["--characters=20000", "--rounds=2"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(QUICK), help=", ".join(QUICK))
    parser.add_argument("--full", action="store_true", help="as the figures in docs/ were made")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in QUICK]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(QUICK)}")
    failed = []
    for name in arguments.names:
        settings = [] if arguments.full else QUICK[name]
        settings = [*settings, f"--json={FIGURES / name}.json"]
        print(f"== {name}.py {' '.join(settings)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *settings], check=False).returncode
        if code:
            failed.append(f"{name} (exit code {code})")
        print(f"== {time.perf_counter() - start:.0f} s\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

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
"""Arguments of the command line that several of these programs have, so that they are called and explained alike."""

from argparse import ArgumentParser
from pathlib import Path


BUNDLED = Path(__file__).resolve().parent / "tiny-chatglm3"
DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_device_argument(parser: ArgumentParser) -> None:
    """Add where a model is put."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")


def add_loading_arguments(parser: ArgumentParser) -> None:
    """Add how a model is loaded."""
    add_device_argument(parser)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)


def add_server_arguments(parser: ArgumentParser, port: int) -> None:
    """Add which model a server has, and who reaches it."""
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for everybody on the network (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=port, help="(default: %(default)s)")
    add_loading_arguments(parser)
    parser.add_argument("--quantize", type=int, default=0, choices=(0, 4, 8), metavar="BITS", help="4 or 8")


def add_terminal_arguments(parser: ArgumentParser, history_file: Path) -> None:
    """Add which model answers in the terminal, and how."""
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED, help="a checkpoint folder")
    parser.add_argument("--once", metavar="TEXT", help="print the answer to TEXT and end")
    add_loading_arguments(parser)
    parser.add_argument("--max-length", type=int, help="tokens of a conversation at most, the question included")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--history-file", type=Path, default=history_file, help="where the lines you type are kept")

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
"""A chat in the browser: `python examples/web_demo.py FOLDER`, then open the address it prints.

The page is up at once and shows how far the model is. It is for this machine alone unless `--host` says otherwise, and
it asks no other host for anything. `pip install -r requirements/serving.txt` brings what it needs.
"""

import argparse
import sys
from pathlib import Path

from arguments import add_server_arguments


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, port=7860)
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="a Python file with functions that the model may call, such as examples/demo_tools.py",
    )
    parser.add_argument(
        "--concurrency", type=int, default=2, help="answers that are written at the same time (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    try:
        from agent_tools import load_tools
        from serving.models import LoadSettings
        from serving.web_loading import LoadingModel
        from serving.web_page import PageSettings, start
    except ImportError as error:
        print(f"error: {error}; pip install -r requirements/serving.txt", file=sys.stderr)
        return 1
    loading = LoadingModel()
    try:
        tools = load_tools(arguments.tools) if arguments.tools else []
        functions = {tool.name: tool for tool in tools}
        settings = PageSettings.of_folder(arguments.folder, functions, max(1, arguments.concurrency))
        blocks, address = start(settings, loading, arguments.host, arguments.port)
        print(f"the page is at {address}", flush=True)
        loading.load(
            LoadSettings(
                folder=arguments.folder,
                device=arguments.device,
                dtype=arguments.dtype,
                bits=arguments.quantize,
            )
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    blocks.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())

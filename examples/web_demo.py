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
from typing import Any

import torch
from chat import BUNDLED, DTYPES, pick_device
from local_code import check_model_type, load_module, register
from serving.web_answers import LoadingModel
from serving.web_page import CSS, MAX_WAITING, OwnHostOnly, Page, PageSettings, make_theme
from serving.web_tools import FUNCTIONS
from starlette.middleware import Middleware
from transformers import AutoConfig, GenerationConfig


def describe_page(folder: Path, concurrency: int) -> PageSettings:
    """What the page offers for a checkpoint folder, before its weights are there.

    Raises:
        OSError, ValueError: if the folder is not a ChatGLM checkpoint.
    """
    check_model_type(folder)
    register()
    config = AutoConfig.from_pretrained(folder)
    chat_format = load_module("conversation_chatglm").conversation_format(config.model_version)
    positions = config.max_position_embeddings
    defaults = {"max_length": positions, **chat_format.chat_defaults}
    is_greedy = (
        folder / "generation_config.json"
    ).is_file() and GenerationConfig.from_pretrained(folder).do_sample is False
    return PageSettings(
        name=folder.resolve().name,
        max_length=(positions, min(positions, defaults["max_length"])),
        generation={"temperature": 0 if is_greedy else defaults["temperature"], "top_p": defaults["top_p"]},
        # CODEPATH: chatglm-6b and chatglm2-6b answer with text alone; chatglm3-6b and glm-4-9b call tools.
        functions=None if chat_format.response_template is None else FUNCTIONS,
        concurrency=concurrency,
    )


def start(settings: PageSettings, loading: LoadingModel, host: str, port: int) -> tuple[Any, str]:
    """Serve the page in the background.

    Returns:
        Gradio's blocks, to be closed at the end, and the address of the page.
    """
    blocks = Page(settings, loading).build()
    blocks.queue(max_size=MAX_WAITING)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=True,
        quiet=True,
        theme=make_theme(),
        css=CSS,
        app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
    )
    return blocks, address


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED, metavar="FOLDER", help="a checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--quantize", type=int, choices=(8, 4), metavar="BITS", help="8 or 4 bits for the weights")
    parser.add_argument("--concurrency", type=int, default=2, help="answers that are written at the same time")
    return parser.parse_args()


def pick_dtype(folder: Path, name: str, device: str) -> Any:
    """The dtype of the checkpoint for `auto`, unless a processor would be slow in it."""
    if name != "auto":
        return name
    dtype = AutoConfig.from_pretrained(folder).dtype or "float32"
    return "bfloat16" if device == "cpu" and dtype == torch.float16 else dtype


def main() -> int:
    arguments = read_arguments()
    loading = LoadingModel()
    try:
        settings = describe_page(arguments.model, arguments.concurrency)
        device = pick_device(arguments.device)
        blocks, address = start(settings, loading, arguments.host, arguments.port)
        print(f"The page is at {address}", flush=True)
        dtype = pick_dtype(arguments.model, arguments.dtype, device)
        loading.load(arguments.model, device, dtype, arguments.quantize)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    blocks.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())

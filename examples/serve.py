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
"""Serve a checkpoint: `python examples/serve.py FOLDER`, then ask http://127.0.0.1:8000 in one of three ways.

    /v1           OpenAI's API: chat completions, completions, models
    POST /        the API of the tutorials, and POST /stream for the same in pieces
    /health, /metrics

It needs `pip install -r requirements/serving.txt`; docs/serving.md shows every door.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from arguments import add_server_arguments


# Bytes of a body that may hold a picture.
PICTURE_BODY = 16 << 20
EPILOG = "Keys may also stand in $CHATGLM_API_KEYS, one behind the other with commas."


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_arguments(parser, port=8000)
    parser.add_argument("--name", help="what requests call the model (default: the name of the folder)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter of PEFT, asked for as model 'FOLDER:NAME'; may be given several times",
    )
    parser.add_argument("--prefix", type=Path, help="a prefix of P-tuning v2, for the folder's model")
    parser.add_argument(
        "--api-key", action="append", default=[], help="a key that clients have to send; may be given several times"
    )
    parser.add_argument("--max-requests", type=int, default=64, help="at once, waiting ones included (%(default)s)")
    parser.add_argument("--max-prompt", type=int, help="tokens of a prompt (default: what the model takes)")
    parser.add_argument("--max-body", type=int, help="bytes of a body (1 MiB; 16 MiB for a model that sees)")
    parser.add_argument(
        "--allowed-local-media-path",
        type=Path,
        metavar="FOLDER",
        help="let requests name pictures in this folder, as file:///FOLDER/picture.png (default: none)",
    )
    parser.add_argument("--max-seconds", type=float, default=600, help="an answer may take (%(default)s)")
    parser.add_argument(
        "--cache-tokens", type=int, default=32768, help="tokens of all running requests together (%(default)s)"
    )
    return parser.parse_args()


def read_adapters(words: list[str]) -> dict[str, Path]:
    """The folders of adapters by their names."""
    adapters = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not name.isidentifier() or not folder or name in adapters:
            raise ValueError(f"--adapter takes NAME=FOLDER, each name once, not {word!r}")
        adapters[name] = Path(folder)
    return adapters


def read_keys(words: list[str], variable: str) -> tuple[str, ...]:
    """The keys of the command line and of the environment. Empty ones open no server to everybody."""
    keys = [key.strip() for key in [*words, *(variable.split(",") if variable else ())]]
    if not all(keys):
        raise ValueError("a key of --api-key or $CHATGLM_API_KEYS is empty")
    return tuple(keys)


def check_limits(arguments: argparse.Namespace) -> None:
    for name in ("max_requests", "max_prompt", "max_body", "max_seconds", "cache_tokens"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, not {value}")
    folder = arguments.allowed_local_media_path
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--allowed-local-media-path: there is no folder {folder}")


def main() -> int:
    arguments = read_arguments()
    try:
        import uvicorn  # noqa: F401
        from serving.app import build_app
        from serving.guard import Limits
        from serving.metrics import Metrics
        from serving.models import LoadSettings, load_models
        from transformers.utils import logging
    except ImportError as error:
        print(f"error: {error}; pip install -r requirements/serving.txt", file=sys.stderr)
        return 1
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    metrics = Metrics()
    try:
        check_limits(arguments)
        keys = read_keys(arguments.api_key, os.environ.get("CHATGLM_API_KEYS", ""))
        settings = LoadSettings(
            folder=arguments.folder,
            name=arguments.name,
            device=arguments.device,
            dtype=arguments.dtype,
            bits=arguments.quantize,
            prefix=arguments.prefix,
            adapters=read_adapters(arguments.adapter),
            cache_tokens=arguments.cache_tokens,
        )
        models = load_models(
            settings,
            metrics,
            longest_prompt=arguments.max_prompt,
            seconds=arguments.max_seconds,
            media_folder=arguments.allowed_local_media_path,
        )
        limits = Limits(
            requests=arguments.max_requests,
            body_bytes=arguments.max_body or (PICTURE_BODY if models.default.sees else Limits.body_bytes),
            prompt_tokens=arguments.max_prompt,
            seconds=arguments.max_seconds,
        )
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        serve(build_app(models, metrics, limits, keys), arguments, ", ".join(models.by_name))
    finally:
        models.stop()
    return 0


def serve(app: Any, arguments: argparse.Namespace, names: str) -> None:
    """Answer until a signal ends the process."""
    import uvicorn  # As in `main`.

    print(f"serving {names} on http://{arguments.host}:{arguments.port}", flush=True)
    # Its SIGTERM and SIGINT let running answers finish. The path of a request is in no log: neither is its text.
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(arguments.max_seconds),
    )


if __name__ == "__main__":
    sys.exit(main())

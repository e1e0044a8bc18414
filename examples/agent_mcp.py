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
"""Tools of MCP servers, through the official package `mcp` (version 2), which only this file needs.

A server is a program that is started here and talks over its standard input and output. It gets none of this process's
environment variables but a few harmless ones (`HOME`, `PATH`, ...), so no keys.
"""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from agent_tools import Tool
from anyio.from_thread import start_blocking_portal
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult


# Of a call, and of a server that starts.
TIMEOUT_SECONDS = 60.0


@contextmanager
def mcp_tools(commands: Sequence[str]) -> Iterator[list[Tool]]:
    """Start MCP servers, one for each command line, and give their tools; the servers end with the context.

    Raises:
        ValueError: if a server does not start.
    """
    tools: list[Tool] = []
    with ExitStack() as stack:
        # The package is asynchronous; its loop runs in a thread of its own.
        portal = stack.enter_context(start_blocking_portal())
        for command in commands:
            program, *arguments = shlex.split(command)
            server = StdioServerParameters(command=program, args=arguments)
            client = Client(server, read_timeout_seconds=TIMEOUT_SECONDS)
            try:
                stack.enter_context(portal.wrap_async_context_manager(client))
            except Exception as error:  # Of many kinds, some in groups.
                raise ValueError(f"the MCP server {command} does not start: {error}") from error
            cursor: str | None = None
            while True:
                page = portal.call(partial(client.list_tools, cursor=cursor))
                for found in page.tools:
                    function = {
                        "name": found.name,
                        "description": found.description or "",
                        "parameters": found.input_schema,
                    }
                    call = partial(_call, portal, client, found.name)
                    tools.append(Tool({"type": "function", "function": function}, call))
                cursor = page.next_cursor
                if not cursor:
                    break
        yield tools


def _call(portal: Any, client: Client, name: str, /, **arguments: Any) -> str:
    result: CallToolResult = portal.call(client.call_tool, name, arguments)
    texts = [getattr(part, "text", f"({part.type})") for part in result.content]
    if result.is_error:
        raise RuntimeError("\n".join(texts))
    return "\n".join(texts)

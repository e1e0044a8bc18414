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
"""An agent in the terminal: a model that calls functions until it can answer.

`python examples/agent.py [MODEL]` runs a checkpoint here, the small one of this folder by default, which was taught the
two functions of `demo_tools.py`; `--api URL` asks one behind an API in OpenAI's form. `--tools FILE` brings functions
of your own, `--mcp COMMAND` those of an MCP server, `--allow-code` lets the model run Python code in a sandbox.

Nothing here trusts the model: a call runs only what was offered, with arguments that fit, code only after you have seen
it, and what goes wrong goes back to the model as the result.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from agent_models import INTERPRETER, INTERPRETER_PROMPT, PYTHON, ApiModel, Asked, LocalModel
from agent_sandbox import CodeInterpreter, SandboxError
from agent_tools import Call, Tool, Toolbox, load_tools
from arguments import add_terminal_arguments
from chat import generation_arguments, load
from local_code import pick_device
from terminal import LineReader, default_history_file, harmless, note, use_utf8, visible
from transformers.utils import logging


DEMO_TOOLS = Path(__file__).with_name("demo_tools.py")


class TooManyRounds(Exception):
    """A model only calls and never answers."""


class Agent:
    """A model and its tools: asks, runs what it calls, gives it the results, until it answers.

    Args:
        max_rounds: how often it may call before it has to answer.
        show: is given every call and every result, as text.
    """

    def __init__(
        self, model: Asked, toolbox: Toolbox, max_rounds: int = 5, show: Callable[[str], None] = lambda text: None
    ) -> None:
        self.model, self.toolbox, self.max_rounds, self.show = model, toolbox, max_rounds, show

    def ask(self, question: str) -> str:
        """The answer to a question. If there is none, the conversation is as if it had not been asked.

        Raises:
            TooManyRounds: after `max_rounds` rounds of calls.
        """
        messages = list(self.model.messages)
        try:
            answer = self.model.ask(question)
            for _ in range(self.max_rounds):
                if not answer.calls:
                    return answer.text
                if answer.text:
                    self.show(answer.text)
                answer = self.model.observe(answer.calls, [self._run(call) for call in answer.calls])
            if answer.calls:
                raise TooManyRounds(f"no answer after {self.max_rounds} rounds of calls; --max-rounds allows more")
            return answer.text
        except BaseException:
            # Also Ctrl-C: a call without its result could not be followed by another question.
            self.model.messages = messages
            raise

    def _run(self, call: Call) -> str:
        self.show(f"-> {call}")
        result = self.toolbox.run(call)
        self.show(f"<- {result}")
        return result


def code_tool(interpreter: CodeInterpreter, builtin_tools: tuple[str, ...] | None, has_functions: bool) -> Tool:
    """The code interpreter in the form that a model knows it in.

    Args:
        builtin_tools: those of the generation; `None` behind an API, where nobody knows which it is.
        has_functions: whether functions are offered too.
    """
    # CODEPATH: glm4 has a built-in tool; chatglm3 has one too where no functions are offered.
    if builtin_tools is not None and PYTHON in builtin_tools:
        return Tool({"type": PYTHON}, interpreter, takes_text=True)
    if builtin_tools is not None and not has_functions:
        return Tool({"type": INTERPRETER}, interpreter, takes_text=True)
    code = {"type": "string", "description": "The code; what it prints is the result"}
    function = {
        "name": PYTHON,
        "description": "Run Python code",
        "parameters": {"type": "object", "properties": {"code": code}, "required": ["code"]},
    }
    return Tool({"type": "function", "function": function}, interpreter, takes_text=True)


def confirm_code(reader: LineReader) -> Callable[[str], bool]:
    """Shows code as it is, and asks whether it may run."""

    def confirm(code: str) -> bool:
        note(f"The model wants to run:\n{visible(code)}")
        return reader.confirm("Run it?")

    return confirm


def build_local(arguments: argparse.Namespace, tools: list[Tool], interpreter: CodeInterpreter | None) -> Agent:
    """An agent with a checkpoint in this process.

    Raises:
        OSError, ValueError: for a folder that cannot be loaded, and a generation that knows no tools.
    """
    model, tokenizer = load(arguments.model, pick_device(arguments.device), arguments.dtype)
    system = arguments.system
    if interpreter is not None:
        tools = [*tools, code_tool(interpreter, getattr(model.chat_format, "builtin_tools", ()), bool(tools))]
        system = system or (INTERPRETER_PROMPT if tools[-1].name == INTERPRETER else "")
    toolbox = Toolbox(tools)
    offered = [item for item in toolbox.descriptions if item["type"] != INTERPRETER]
    local = LocalModel(model, tokenizer, offered, system, **generation_arguments(arguments, model))
    return Agent(local, toolbox, arguments.max_rounds, lambda text: note(harmless(text)))


def build_remote(arguments: argparse.Namespace, tools: list[Tool], interpreter: CodeInterpreter | None) -> Agent:
    """An agent with a model behind an API.

    Raises:
        OSError: if the API cannot be reached.
        ValueError: if the package `openai` is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise ValueError("--api needs the package openai: pip install -r requirements/agent.txt") from error
    # Servers without a key take any.
    client = openai.OpenAI(base_url=arguments.api, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        name = arguments.api_model or next(iter(client.models.list())).id
    except (openai.OpenAIError, StopIteration) as error:
        raise OSError(f"no model at {arguments.api}: {error}") from error
    if interpreter is not None:
        tools = [*tools, code_tool(interpreter, None, bool(tools))]
    toolbox = Toolbox(tools)
    given = {name: getattr(arguments, name) for name in ("temperature", "top_p")}
    settings = {name: value for name, value in given.items() if value is not None}
    remote = ApiModel(client, name, toolbox.descriptions, arguments.system, **settings)
    return Agent(remote, toolbox, arguments.max_rounds, lambda text: note(harmless(text)))


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_terminal_arguments(parser, default_history_file())
    parser.add_argument("--api", metavar="URL", help="ask a model there instead, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api-model", metavar="NAME", help="its name there; the first one by default")
    parser.add_argument(
        "--tools", type=Path, action="append", metavar="FILE", help="a Python file with functions under @tool"
    )
    parser.add_argument(
        "--mcp", action="append", default=[], metavar="COMMAND", help="the command line of an MCP server"
    )
    parser.add_argument("--allow-code", action="store_true", help="let it run Python code in a sandbox, if you agree")
    parser.add_argument("--max-rounds", type=int, default=5, help="rounds of calls before it has to answer")
    parser.add_argument("--system", default="", metavar="TEXT", help="what is said before the conversation")
    return parser.parse_args(words)


def collect_tools(arguments: argparse.Namespace, stack: ExitStack) -> list[Tool]:
    """The functions that were asked for; those of the demonstration where nothing was.

    Raises:
        OSError, ValueError: for a file without tools, a server that does not start, a missing package.
    """
    files = arguments.tools or []
    if not (files or arguments.mcp or arguments.allow_code):
        files = [DEMO_TOOLS]
    tools = [item for file in files for item in load_tools(file)]
    if arguments.mcp:
        try:
            from agent_mcp import mcp_tools
        except ImportError as error:
            raise ValueError("--mcp needs the package mcp: pip install -r requirements/agent.txt") from error
        tools += stack.enter_context(mcp_tools(arguments.mcp))
    return tools


def converse(agent: Agent, reader: LineReader) -> None:
    """Answer until the end of the input; Ctrl-C ends an answer and not the program."""
    if reader.is_terminal:
        note(f"Ask something. Tools: {', '.join(agent.toolbox.tools)}. Ctrl-C: stop an answer, Ctrl-D: end.")
    while True:
        try:
            question = reader.read("\n> ")
            if question == "stop":
                return
            if question:
                print(harmless(agent.ask(question)), flush=True)
        except EOFError:
            return
        except KeyboardInterrupt:
            note("(stopped)")
        except Exception as error:  # What an API, a server or a model did wrong ends one answer.
            note(f"error: {error}")


def main(words: list[str] | None = None) -> int:
    use_utf8()
    arguments = read_arguments(words)
    if arguments.once is not None or not sys.stderr.isatty():
        logging.disable_progress_bar()
    reader = LineReader(arguments.history_file)
    try:
        if arguments.allow_code and not reader.is_terminal:
            raise ValueError("--allow-code needs a terminal, where you can see the code and agree")
        interpreter = CodeInterpreter(confirm_code(reader)) if arguments.allow_code else None
        with ExitStack() as stack:
            tools = collect_tools(arguments, stack)
            agent = (build_remote if arguments.api else build_local)(arguments, tools, interpreter)
            if arguments.once is None:
                converse(agent, reader)
            else:
                print(harmless(agent.ask(arguments.once)), flush=True)
    except (OSError, ValueError, SandboxError, TooManyRounds) as error:
        note(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

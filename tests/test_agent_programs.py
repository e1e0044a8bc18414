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
"""The agent with programs of others: a model behind our server asked by the `openai` client, and tools of MCP servers."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundled_tools import DIALOGUES


pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("leave_the_auto_classes_alone")]
# Collected everywhere, they are installed in one environment only.
openai = pytest.importorskip("openai", reason="needs requirements/programs.txt: make test-programs")
pytest.importorskip("mcp", reason="needs requirements/programs.txt: make test-programs")

from serving_help import BUNDLED, serving_folder  # noqa: E402


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

sys.path.insert(0, str(EXAMPLES))

import agent  # noqa: E402
import demo_tools  # noqa: E402
from agent import Agent  # noqa: E402
from agent_mcp import mcp_tools  # noqa: E402
from agent_models import ApiModel  # noqa: E402
from agent_tools import Call, Toolbox  # noqa: E402


@pytest.fixture(scope="module")
def url(leave_the_auto_classes_alone: None) -> Iterator[str]:
    with serving_folder(BUNDLED) as (url, _):
        yield f"{url}/v1"


# Over the API.


@pytest.mark.parametrize(("question", "steps", "answer"), DIALOGUES)
def test_the_loop_over_the_api(url: str, question: str, steps: list[str], answer: str) -> None:
    toolbox = Toolbox([demo_tools.get_weather, demo_tools.multiply])
    shown: list[str] = []
    client = openai.OpenAI(base_url=url, api_key="none")
    model = ApiModel(client, "tiny-chatglm3", toolbox.descriptions, temperature=0)
    talking = Agent(model, toolbox, show=shown.append)
    assert talking.ask(question) == answer
    assert shown == steps
    assert all(message.get("tool_call_id") for message in model.messages if message["role"] == "tool")
    # What came before is part of the conversation.
    assert talking.ask("谢谢") == "不客气！"


def test_the_program_asks_the_first_model_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(["--api", url, "--once", "What is 34 times 17?", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("34 times 17 is 578.\n", "-> multiply(a=34, b=17)\n<- 578\n")


def test_an_api_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai.OpenAI, "max_retries", 0, raising=False)
    assert agent.main(["--api", "http://127.0.0.1:1/v1", "--once", "Hello!"]) == 1
    assert capsys.readouterr().err.startswith("error: no model at http://127.0.0.1:1/v1: ")


# MCP.


SERVER = '''
import os

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError


server = MCPServer("weather")


@server.tool()
def get_weather(city: str) -> str:
    """Get the current weather in a city"""
    if city == "Atlantis":
        raise ToolError("no weather is known for Atlantis")
    return '{"temperature": 18, "condition": "cloudy"}'


@server.tool()
def environment() -> str:
    """What the server can see"""
    return " ".join(sorted(os.environ))


server.run()
'''


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("mcp") / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    return shlex.join([sys.executable, str(script)])


def test_tools_of_a_server(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with mcp_tools([command]) as tools:
        toolbox = Toolbox(tools)
        assert list(toolbox.tools) == ["get_weather", "environment"]
        function = toolbox.descriptions[0]["function"]
        assert function["description"] == "Get the current weather in a city"
        assert function["parameters"]["properties"]["city"]["type"] == "string"
        assert toolbox.run(Call("get_weather", {"city": "Paris"})) == '{"temperature": 18, "condition": "cloudy"}'
        error = toolbox.run(Call("get_weather", {"city": "Atlantis"}))
        assert error.startswith("Error: ") and "no weather is known for Atlantis" in error
        assert toolbox.run(Call("get_weather", {"city": 1})) == "Error: the argument city must be string, got 1"
        assert toolbox.run(Call("get_weather", {})).startswith("Error: ")
        assert "OPENAI_API_KEY" not in toolbox.run(Call("environment", {}))


@pytest.mark.parametrize("is_remote", [False, True])
def test_the_bundled_model_calls_a_server(
    url: str, command: str, capsys: pytest.CaptureFixture[str], is_remote: bool
) -> None:
    words = ["--api", url] if is_remote else []
    question = "What is the weather like in Paris?"
    assert agent.main([*words, "--mcp", command, "--once", question, "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "It is cloudy in Paris, and the temperature is 18 degrees.\n"
    assert captured.err == '-> get_weather(city=\'Paris\')\n<- {"temperature": 18, "condition": "cloudy"}\n'


def test_a_server_that_does_not_start_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("/no/such/program", shlex.join([sys.executable, "-c", "1"])):
        assert agent.main(["--mcp", command, "--once", "Hello!"]) == 1
        assert f"error: the MCP server {command}" in capfd.readouterr().err

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
"""How each generation writes a conversation down, and how its answer is read back.

What is unusual here:

- A conversation is not one string. The published code tokenizes every piece of text on its own (a role token, then
  `metadata` and a newline, then the content), and each piece starts with SentencePiece's leading space. So a
  conversation is a list of `Segment`s here, and the tokenizer encodes one after the other.
- ChatGLM-6B and ChatGLM2 have no role tokens: their rounds are plain text, encoded as a whole up to the answer that is
  to be learnt. ChatGLM-6B sees them as context in both directions, so only the last answer can be learnt.
- An answer of ChatGLM3 or GLM-4 starts with its `metadata`: empty for text, else the name of the tool it calls. A call
  is Python source, `tool_call(name=value, ...)`, or JSON. It is read as literals and never evaluated.
- Messages come in three forms (pairs, the published dicts, OpenAI's dicts). `normalize_messages` turns them into the
  published dicts, the only form the rest of this file knows.

Nothing here needs torch or transformers.
"""

import ast
import copy
import io
import json
import re
import reprlib
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "observation")

# The tokens that end an answer, per generation: the keys are the generations this file knows.
STOP_TOKENS: dict[str, tuple[str, ...]] = {
    "chatglm": ("<eop>",),
    "chatglm2": ("</s>",),
    "chatglm3": ("</s>", "<|user|>", "<|observation|>"),
    "glm4": ("<|endoftext|>", "<|user|>", "<|observation|>"),
}

# The generations that write rounds of text: the number of the first one, and what ends a line.
ROUND_FORMS = {"chatglm": (0, "\n"), "chatglm2": (1, "\n\n")}

# The system text that the demos of ChatGLM3 and of GLM-4 write above a list of tools.
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
GLM4_TOOLS_PROMPT = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
# What GLM-4 writes between its system text and the tools, and below each of them.
GLM4_TOOLS_HEADING = "\n\n# 可用工具"
GLM4_TOOL_NOTE = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"

# A placeholder the models were trained to write for the date of their training, and what `chat` shows instead.
TRAINING_TIME = ("[[训练时间]]", "2023年")

# Limits of what is taken for a tool call; anything larger is an answer in plain text.
MAX_CALL_LENGTH = 100_000
MAX_CALL_DEPTH = 32

# ChatGLM-6B's ASCII punctuation next to Chinese characters, which its `chat` makes full-width.
CHINESE_PUNCTUATION = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
FULL_WIDTH = dict(zip(",!:;?", "，！：；？"))


# How each generation's conversation reads as one string, for other programs and for people. Tags strip the white space
# around them, so only what is inside `{{ }}` is written.
CHAT_TEMPLATES = {
    "chatglm": """{%- if tools %}
    {{- raise_exception('ChatGLM-6B knows no tools') }}
{%- endif %}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- set is_single = messages | length - first <= 2 %}
{%- for message in messages %}
    {%- set turn = loop.index0 - first %}
    {%- set content = message['content'] or '' %}
    {%- if turn < 0 %}
        {{- content + '\\n' if content }}
    {%- elif message['role'] != ['user', 'assistant'][turn % 2] %}
        {{- raise_exception('ChatGLM-6B writes rounds of one question and one answer') }}
    {%- elif turn % 2 == 0 %}
        {{- content if is_single else '[Round ' ~ (turn // 2) ~ ']\\n问：' ~ content ~ '\\n' }}
        {{- '答：' if not is_single and (add_generation_prompt or not loop.last) }}
        {{- '[gMASK]<sop>' if loop.last and add_generation_prompt }}
    {%- elif not loop.last %}
        {{- content + '\\n' }}
    {%- elif add_generation_prompt %}
        {{- raise_exception('The conversation ends with an answer, so there is nothing to answer') }}
    {%- else %}
        {{- '[gMASK]' }}
        {%- generation %}{{ '<sop>' + content + '<eop>' }}{% endgeneration %}
    {%- endif %}
{%- endfor %}""",
    "chatglm2": """[gMASK]sop
{%- if tools %}
    {{- raise_exception('ChatGLM2 knows no tools') }}
{%- endif %}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- for message in messages %}
    {%- set turn = loop.index0 - first %}
    {%- set content = message['content'] or '' %}
    {%- if turn < 0 %}
        {{- content + '\\n\\n' if content }}
    {%- elif message['role'] != ['user', 'assistant'][turn % 2] %}
        {{- raise_exception('ChatGLM2 writes rounds of one question and one answer') }}
    {%- elif turn % 2 == 0 %}
        {{- '[Round ' ~ (turn // 2 + 1) ~ ']\\n\\n问：' ~ content ~ '\\n\\n' }}
        {{- '答：' if add_generation_prompt or not loop.last }}
    {%- elif not loop.last %}
        {%- generation %}{{ content }}{% endgeneration %}
        {{- '\\n\\n' }}
    {%- elif add_generation_prompt %}
        {{- raise_exception('The conversation ends with an answer, so there is nothing to answer') }}
    {%- else %}
        {%- generation %}{{ content + '</s>' }}{% endgeneration %}
    {%- endif %}
{%- endfor %}""",
    "chatglm3": """[gMASK]sop
{%- if tools and tools[0]['function'] %}
    {%- set tools = tools | map(attribute='function') | list %}
{%- endif %}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>\\n"""
    + TOOLS_PROMPT
    + """\\n' + tools | tojson(indent=4) }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] %}
    {%- set content = message['content'] or '' %}
    {%- if role not in ['system', 'user', 'assistant', 'observation'] %}
        {{- raise_exception('Unknown role ' ~ role) }}
    {%- elif role != 'assistant' %}
        {%- set offered = message['tools'] if message['tools'] is defined else (tools if loop.first else none) %}
        {{- '<|' + role + '|>' + (message['metadata'] or '') + '\\n' + content }}
        {{- '\\n' + offered | tojson(indent=4) if role == 'system' and offered is not none }}
    {%- else %}
        {%- if content or not message['tool_calls'] %}
            {{- '<|assistant|>' }}
            {%- generation %}{{ (message['metadata'] or '') + '\\n' + content }}{% endgeneration %}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {{- '<|assistant|>' }}
            {%- generation %}
                {{- function['name'] + '\\n```python\\ntool_call(' }}
                {%- for name, value in function['arguments'].items() %}
                    {{- name + '=' + '%r' | format(value) }}
                    {{- ', ' if not loop.last }}
                {%- endfor %}
                {{- ')\\n```' }}
            {%- endgeneration %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- elif messages[-1]['role'] == 'assistant' %}
    {%- generation %}{{ '</s>' }}{% endgeneration %}
{%- endif %}""",
    "glm4": """[gMASK]<sop>
{%- macro sections(offered) %}
    {%- for tool in offered %}
        {{- '\\n\\n## ' + tool['name'] + '\\n\\n' + tool | tojson(indent=4) + '"""
    + GLM4_TOOL_NOTE.replace("\n", "\\n")
    + """' }}
    {%- endfor %}
{%- endmacro %}
{%- if tools and tools[0]['function'] %}
    {%- set tools = tools | map(attribute='function') | list %}
{%- endif %}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>\\n"""
    + (GLM4_TOOLS_PROMPT + GLM4_TOOLS_HEADING).replace("\n", "\\n")
    + """' + sections(tools) }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] %}
    {%- set content = message['content'] or '' %}
    {%- if role not in ['system', 'user', 'assistant', 'observation'] %}
        {{- raise_exception('Unknown role ' ~ role) }}
    {%- elif role != 'assistant' %}
        {{- '<|' + role + '|>' + (message['metadata'] or '') + '\\n' + content }}
        {%- if role == 'system' and message['tools'] is defined %}
            {{- sections(message['tools']) }}
        {%- elif role == 'system' and loop.first and tools %}
            {{- '"""
    + GLM4_TOOLS_HEADING.replace("\n", "\\n")
    + """' + sections(tools) }}
        {%- endif %}
    {%- else %}
        {%- if content or not message['tool_calls'] %}
            {{- '<|assistant|>' }}
            {%- generation %}{{ (message['metadata'] or '') + '\\n' + content }}{% endgeneration %}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {%- set arguments = function['arguments'] %}
            {{- '<|assistant|>' }}
            {%- generation %}
                {{- function['name'] + '\\n' + (arguments if arguments is string else arguments | tojson) }}
            {%- endgeneration %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- elif messages[-1]['role'] == 'assistant' %}
    {%- generation %}{{ '<|endoftext|>' }}{% endgeneration %}
{%- endif %}""",
}

# How the library's `parse_response` and its server read an answer; `read_answer` is the exact way.
RESPONSE_TEMPLATES = {
    "chatglm3": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {
            "tool_calls": {
                # No lookahead: the streaming parser would miss a delimiter that arrives in pieces.
                "open_pattern": r"(?:^|<\|assistant\|>)\s*(?P<name>[^\s<`]+)[ ]*\n```\w*\n\s*tool_call\(",
                "close_pattern": r"\s*```\s*",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    # Python writes 'text' where JSON writes "text": `string_delims` reads both.
                    "tag_pattern": r"(?:^|,)\s*(?P<key>\w+)\s*=\s*(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
                    r"|\[[^\]]*\]|\{[^}]*\}|[^,()]+)",
                    "value_parser": {
                        "name": "json",
                        "args": {"string_delims": [["'", "'"]], "allow_non_json": True},
                    },
                },
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close": ["<|user|>", "<|observation|>", "</s>"], "content": "text"},
        },
    },
    "glm4": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {
            "tool_calls": {
                "open_pattern": r"(?:^|<\|assistant\|>|(?<=<\|assistant\|>))\s*(?P<name>[^\s<{]+)[ ]*\n\s*\{",
                "close_pattern": r"\s*(?:<\|assistant\|>|<\|user\|>|<\|observation\|>|<\|endoftext\|>)",
                "repeats": True,
                # The brace that told a call from a text is gone, so what is in it is read pair by pair.
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"\"(?P<key>(?:[^\"\\]|\\.)*)\"\s*:\s*(?P<value>\"(?:[^\"\\]|\\.)*\""
                    r"|(?P<nest>[\[{](?:[^\[\]{}\"]|\"(?:[^\"\\]|\\.)*\"|(?&nest))*[\]}])|[^\s,}]+)",
                    "value_parser": {"name": "json", "args": {"allow_non_json": True}},
                },
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close": ["<|user|>", "<|observation|>", "<|endoftext|>"], "content": "text"},
        },
    },
}


class Segment(NamedTuple):
    """A piece of a conversation that is encoded on its own.

    Attributes:
        text: the text, or the name of one special token.
        is_special: whether `text` names a special token.
        is_answer: whether the piece counts for the loss: what the model has to write, closing token included.
        answer_spans: `(start, end)` of the answers inside `text`, for a text that holds several turns (ChatGLM2).
    """

    text: str
    is_special: bool
    is_answer: bool = False
    answer_spans: tuple[tuple[int, int], ...] = ()


def normalize_messages(history: Sequence[Any] | None, model_version: str) -> list[Message]:
    """Bring a history of any form into the published message dicts.

    Args:
        history: `None`, or a sequence of `(question, answer)` pairs and message dicts. A dict has `role` and
            `content`, and may have `metadata` (assistant) and `tools` (system). OpenAI's form is understood: the role
            `tool`, `tool_calls`, a `content` that is `None` or a list of text parts, tools wrapped in `function`.
        model_version: the generation.

    Returns:
        New dicts, with roles out of `ROLES`; nothing of the caller's is changed or shared.

    Raises:
        TypeError, ValueError: for anything else, with the value and the form that is expected.
    """
    _check_model_version(model_version)
    if history is None:
        return []
    if not isinstance(history, (list, tuple)):
        raise TypeError(f"The history must be a list of messages or of pairs, got {reprlib.repr(history)}.")
    messages: list[Message] = []
    for index, item in enumerate(history):
        if isinstance(item, Mapping):
            messages += _normalize_message(item, f"messages[{index}]", model_version)
        elif isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item):
            messages.append({"role": "user", "content": item[0]})
            messages.append({"role": "assistant", "metadata": "", "content": item[1]})
        else:
            raise TypeError(
                f"messages[{index}] must be a dict with `role` and `content`, or a (question, answer) pair of "
                f"strings, got {reprlib.repr(item)}."
            )
    return messages


def add_tools(messages: Sequence[Message], tools: Sequence[Any] | None, model_version: str) -> list[Message]:
    """Offer `tools` in the system message of a normalized conversation, which is added where there is none.

    Args:
        messages: what `normalize_messages` returns; left as it is.
        tools: descriptions of functions, in OpenAI's form or bare; `None` for no tools.
        model_version: the generation, which has its own words for what comes next.

    Raises:
        TypeError: if `tools` is not a list of dicts.
        ValueError: if the system message offers tools already.
    """
    messages = list(messages)
    if tools is None:
        return messages
    # CODEPATH: glm4 has a heading above the tools; chatglm3 has none, the others refuse tools later.
    is_glm4 = model_version == "glm4"
    system = {"role": "system", "content": GLM4_TOOLS_PROMPT if is_glm4 else TOOLS_PROMPT}
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)
        if "tools" in system:
            raise ValueError("Tools were given twice: in the system message and as `tools`. Give them once.")
    content = system["content"] + (GLM4_TOOLS_HEADING if is_glm4 else "")
    return [{**system, "content": content, "tools": _normalize_tools(tools, "`tools`")}, *messages]


def conversation_segments(
    messages: Sequence[Message], model_version: str, add_generation_prompt: bool = True
) -> list[Segment]:
    """Write a conversation down, without the `[gMASK] sop` that every encoding but ChatGLM-6B's starts with.

    Args:
        messages: what `normalize_messages` returns.
        model_version: the generation.
        add_generation_prompt: end with what asks for an answer. Otherwise an answer at the end is closed by the end
            token of the generation.

    Raises:
        ValueError: for a conversation that the generation has no form for (ChatGLM-6B and ChatGLM2: tools, roles out
            of order; GLM-4: tools without a name).
    """
    _check_model_version(model_version)
    # CODEPATH: chatglm and chatglm2 have rounds; chatglm3 and glm4 have role tokens.
    if model_version in ROUND_FORMS:
        return _round_segments(messages, model_version, add_generation_prompt)
    return _role_segments(messages, model_version, add_generation_prompt)


def read_answer(
    text: str, messages: Sequence[Message], model_version: str
) -> tuple[str | dict[str, Any], list[Message]]:
    """Read what the model wrote. Never raises and never evaluates: what cannot be read as a call is text.

    Args:
        text: the decoded answer without its stop token.
        messages: the normalized conversation before it, which tells whether tools were offered.
        model_version: the generation.

    Returns:
        The response, and the assistant messages to append to the conversation. The response is a string, or for a
        call `{"name", "parameters"}` if tools were offered and `{"name", "content"}` if not (code interpreter). An
        answer of several parts gives one message each; the response is the last one's.
    """
    # CODEPATH: answers of chatglm and chatglm2 are text; those of chatglm3 and glm4 have metadata.
    if model_version in ROUND_FORMS:
        response = text.strip().replace(*TRAINING_TIME)
        # CODEPATH: chatglm mixes the punctuation of two scripts; the others take the answer as it is.
        if model_version == "chatglm":
            response = CHINESE_PUNCTUATION.sub(lambda match: FULL_WIDTH[match[0]], response)
        return response, [{"role": "assistant", "content": response}]
    has_tools = any(message["role"] == "system" and "tools" in message for message in messages)
    response: str | dict[str, Any] = ""
    answers = []
    for part in text.split("<|assistant|>"):
        metadata, newline, content = part.partition("\n")
        if not newline:
            metadata, content = "", part
        if not metadata.strip():
            content = content.strip()
            response = content.replace(*TRAINING_TIME)
        elif not has_tools:
            response = {"name": metadata.strip(), "content": content}
        elif (parameters := parse_tool_call(content)) is not None:
            response = {"name": metadata.strip(), "parameters": parameters}
        else:
            response = part.strip()
        answers.append({"role": "assistant", "metadata": metadata, "content": content})
    return response, answers


def native_history(messages: Sequence[Message], model_version: str) -> list[Any]:
    """Give a normalized conversation the form that the published `chat` of the generation returns.

    Returns:
        ChatGLM-6B and ChatGLM2: `(question, answer)` pairs, unless there is a system message or an open question,
        which pairs cannot hold. Otherwise message dicts.
    """
    roles = [message["role"] for message in messages]
    # CODEPATH: chatglm and chatglm2 have pairs; chatglm3 and glm4 have dicts.
    if model_version in ROUND_FORMS and roles == ["user", "assistant"] * (len(roles) // 2):
        return [(question["content"], answer["content"]) for question, answer in _pairs(messages)]
    return copy.deepcopy(list(messages))


def parse_tool_call(text: str) -> dict[str, Any] | None:
    """Read the arguments of a tool call, or return `None` if `text` is not one.

    Args:
        text: `tool_call(name=literal, ...)` or a JSON object, in a Markdown fence or bare. Python's keywords are fine
            as names (`from='Paris'`), as schemas have such parameters.
    """
    code = text.strip()
    if code.startswith("```"):
        code = code.partition("\n")[2].removesuffix("```")
    if len(code) > MAX_CALL_LENGTH:
        return None
    for read in (_read_python_call, json.loads):
        try:
            arguments = read(code.strip())
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(arguments, dict):
            return arguments
    return None


def format_tool_call(name: str, arguments: Mapping[str, Any] | str, model_version: str) -> Message:
    """Write a call as the assistant message that the generation was taught: the inverse of `parse_tool_call`.

    Args:
        name: the function.
        arguments: its arguments, as a dict or as the JSON text that OpenAI's API uses.
        model_version: `"glm4"` was taught JSON, ChatGLM3 Python.

    Raises:
        ValueError: if the JSON text is not an object.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The arguments of the tool call {name!r} are not JSON: {error}.") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"The arguments of the tool call {name!r} must be a dict, got {reprlib.repr(arguments)}.")
    # CODEPATH: glm4 has JSON; chatglm3 has Python, and the others refuse calls later.
    if model_version == "glm4":
        return {"role": "assistant", "metadata": name, "content": json.dumps(arguments, ensure_ascii=False)}
    source = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return {"role": "assistant", "metadata": name, "content": f"```python\ntool_call({source})\n```"}


def openai_tool_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The tool calls in assistant messages, in OpenAI's form (arguments as a dict); calls that do not parse are not.

    Args:
        messages: assistant messages, such as `read_answer` returns.
    """
    calls = []
    for message in messages:
        name = message.get("metadata", "").strip()
        if name and (arguments := parse_tool_call(message["content"])) is not None:
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _check_model_version(model_version: str) -> None:
    if model_version not in STOP_TOKENS:
        raise ValueError(f"`model_version` must be one of {tuple(STOP_TOKENS)}, got {model_version!r}.")


def _normalize_message(message: Mapping[str, Any], place: str, model_version: str) -> list[Message]:
    role = "observation" if message.get("role") == "tool" else message.get("role")
    if role not in ROLES:
        raise ValueError(f"{place} has the role {role!r}; the roles are {', '.join(ROLES)} and OpenAI's tool.")
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"{place} has no `content`: {reprlib.repr(dict(message))}.")
    normalized = {
        key: copy.deepcopy(value)
        for key, value in message.items()
        if key not in ("tool_calls", "tool_call_id") and value is not None
    }
    normalized |= {"role": role, "content": _content_text(message.get("content"), place)}
    if not isinstance(normalized.get("metadata", ""), str):
        raise TypeError(f"The metadata of {place} must be a string, got {reprlib.repr(normalized['metadata'])}.")
    if role == "system" and "tools" in normalized:
        normalized["tools"] = _normalize_tools(normalized["tools"], f"`tools` of {place}")
    calls = message.get("tool_calls") if role == "assistant" else None
    if not calls:
        return [normalized]
    if not isinstance(calls, (list, tuple)):
        raise TypeError(f"`tool_calls` of {place} must be a list, got {reprlib.repr(calls)}.")
    written = [normalized] if normalized["content"] else []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"A tool call of {place} has no function name: {reprlib.repr(call)}.")
        written.append(format_tool_call(function["name"], function.get("arguments") or {}, model_version))
    return written


def _content_text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise TypeError(
            f"The content of {place} must be a string, got {reprlib.repr(content)}. Write structured data as text, "
            "for example with json.dumps."
        )
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'The content of {place} may hold parts {{"type": "text", "text": ...}} only, got {reprlib.repr(part)}.'
            )
        texts.append(part["text"])
    return "".join(texts)


def _normalize_tools(tools: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise TypeError(f"{place} must be a list of function descriptions (dicts), got {reprlib.repr(tools)}.")
    return [copy.deepcopy(dict(tool.get("function", tool))) for tool in tools]


def _role_segments(messages: Sequence[Message], model_version: str, add_generation_prompt: bool) -> list[Segment]:
    segments = []
    was_answer = False
    for message in messages:
        content = message["content"]
        if message["role"] == "system" and "tools" in message:
            content += _tools_text(message["tools"], model_version)
        is_answer = message["role"] == "assistant"
        # The model itself writes the role token that ends its answer, so that token belongs to the answer.
        segments.append(Segment(f"<|{message['role']}|>", True, was_answer))
        segments.append(Segment(f"{message.get('metadata', '')}\n", False, is_answer))
        segments.append(Segment(content, False, is_answer))
        was_answer = is_answer
    if add_generation_prompt:
        segments.append(Segment("<|assistant|>", True, was_answer))
    elif was_answer:
        segments.append(Segment(STOP_TOKENS[model_version][0], True, True))
    return segments


def _tools_text(tools: Sequence[dict[str, Any]], model_version: str) -> str:
    # CODEPATH: chatglm3 has one list; glm4 has a section for each tool.
    if model_version == "chatglm3":
        return "\n" + json.dumps(tools, indent=4, ensure_ascii=False)
    text = ""
    for tool in tools:
        if not isinstance(tool.get("name"), str):
            raise ValueError(f"GLM-4 writes the name of a tool above it, and this one has none: {reprlib.repr(tool)}.")
        text += f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}{GLM4_TOOL_NOTE}"
    return text


def _round_segments(messages: Sequence[Message], model_version: str, add_generation_prompt: bool) -> list[Segment]:
    first, newline = ROUND_FORMS[model_version]
    is_chatglm_6b = model_version == "chatglm"
    system, rounds = _rounds(messages)
    text = f"{system}{newline}" if system else ""
    spans = []
    for number, (question, answer) in enumerate(rounds, start=first):
        is_last = number - first == len(rounds) - 1
        # CODEPATH: chatglm asks its first question as it is; chatglm2 numbers it too.
        if is_chatglm_6b and len(rounds) == 1:
            text += question
            continue
        text += f"[Round {number}]{newline}问：{question}{newline}"
        if answer is not None or add_generation_prompt:
            text += "答："
        if answer is not None and not is_last:
            spans.append((len(text), len(text) + len(answer)))
            text += f"{answer}{newline}"
    answer = rounds[-1][1] if rounds else None
    if answer is not None and add_generation_prompt:
        raise ValueError(
            "The conversation ends with an answer, so there is nothing to answer: end it with a user message, or "
            "pass add_generation_prompt=False."
        )
    # CODEPATH: chatglm2 can learn every answer; chatglm sees those in its context from both sides.
    segments = [Segment(text, False, False, () if is_chatglm_6b else tuple(spans))]
    if is_chatglm_6b and (answer is not None or add_generation_prompt):
        # The model learns to write `<sop>` as well, as the published fine-tuning script has it.
        segments += [Segment("[gMASK]", True), Segment("<sop>", True, answer is not None)]
    if answer is not None:
        # The published fine-tuning script encodes the answer to learn on its own, behind the prompt.
        segments += [Segment(answer, False, True), Segment(STOP_TOKENS[model_version][0], True, True)]
    return segments


def _rounds(messages: Sequence[Message]) -> tuple[str, list[tuple[str, str | None]]]:
    """Split a conversation without roles into the system text and `(question, answer)` rounds, the last maybe open."""
    messages = list(messages)
    system = messages.pop(0) if messages and messages[0]["role"] == "system" else {"content": ""}
    for index, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") or message.get("metadata") or "tools" in system:
            raise ValueError(
                "This generation knows no tools: neither `tools`, nor observations, nor answers with metadata. "
                f"Got {reprlib.repr(message if 'tools' not in system else system)}."
            )
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise ValueError(
                f"This generation writes rounds of one question and one answer, so {expected!r} must come where the "
                f"role {message['role']!r} stands: {reprlib.repr(message['content'])}. Join neighbours into one message."
            )
    return system["content"], [
        (question["content"], None if answer is None else answer["content"]) for question, answer in _pairs(messages)
    ]


def _pairs(messages: Sequence[Message]) -> list[tuple[Message, Message | None]]:
    answers: list[Message | None] = [*messages[1::2], None]
    return list(zip(messages[::2], answers))


def _read_python_call(code: str) -> Any:
    """Turn `tool_call(name=literal, ...)` into the dict it stands for.

    The source is rewritten, token by token, into the dict display `{'name': literal, ...}`. Only literals pass, and
    nesting is bounded before Python's own parser sees anything, since deep nesting can exhaust its stack.
    """
    layout = (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type not in layout]
    words = [token.string for token in tokens]
    if words[:2] != ["tool_call", "("] or words[-1] != ")":
        raise ValueError("not a call of tool_call")
    depth = 0
    display = []
    for index in range(2, len(words) - 1):
        kind, word = tokens[index].type, words[index]
        if depth == 0 and kind == tokenize.NAME and words[index + 1] == "=":
            word = repr(word)
        elif depth == 0 and word == "=" and tokens[index - 1].type == tokenize.NAME:
            word = ":"
        elif not _is_literal(kind, word, words[index - 1], depth):
            raise ValueError(f"not a literal: {word}")
        depth += (word in "([{") - (word in ")]}")
        if not 0 <= depth <= MAX_CALL_DEPTH:
            raise ValueError("unbalanced or too deep")
        display.append(word)
    return ast.literal_eval("{" + " ".join(display) + "}")


def _is_literal(kind: int, word: str, previous: str, depth: int) -> bool:
    if kind == tokenize.STRING:
        return word[0] in "'\"" or (word[0] in "rRuU" and word[1] in "'\"")
    if kind == tokenize.NUMBER:
        return True
    if kind == tokenize.NAME:
        return word in ("True", "False", "None")
    # A minus must be a sign: chains of operators nest as deeply as brackets do.
    return (
        word in ("(", "[", "{", ")", "]", "}", ",")
        or (word == ":" and depth > 0)
        or (word == "-" and previous in "=,([{:")
    )


__all__ = [
    "CHAT_TEMPLATES",
    "RESPONSE_TEMPLATES",
    "ROLES",
    "STOP_TOKENS",
    "TOOLS_PROMPT",
    "Message",
    "Segment",
    "add_tools",
    "conversation_segments",
    "format_tool_call",
    "native_history",
    "normalize_messages",
    "openai_tool_calls",
    "parse_tool_call",
    "read_answer",
]

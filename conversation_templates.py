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
"""The Jinja and response templates of the four generations and the texts about tools in them, as data.

A chat template shows how a conversation reads as one string, for other programs and for people; this repository's own
ids come from `ConversationFormat.segments`. The tags strip the white space around them, so only what stands inside
`{{ }}` is written. A response template teaches the library's `parse_response` and its server to read an answer;
`ConversationFormat.read_answer` is the exact way.

What looks like a control token in a message is marked: a word joiner (U+2060, which has no width) stands behind its
first character. So whoever reads the text finds the control tokens of the template and no others, and
`conversation_rendering` takes the joiners out again. Where one stands there already, one more is put in, so that
nothing gets lost.
"""

import json
from collections.abc import Sequence
from typing import Any


# The system text that the demos of ChatGLM3 and of GLM-4 write above a list of tools.
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
GLM4_TOOLS_PROMPT = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
# What GLM-4 writes between its system text and the tools, and below each of them.
GLM4_TOOLS_HEADING = "\n\n# 可用工具"
GLM4_TOOL_NOTE = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
# What GLM-4 was taught to read about the tools that it knows by their `type` alone.
GLM4_BUILTIN_TOOLS = {
    "python": (
        "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n"
        "`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\n"
        "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
        "不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。"
    ),
    "simple_browser": (
        "你可以使用 `simple_browser` 工具。该工具支持以下函数：\n"
        "`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，"
        "可以使用 `recency_days` 参数控制搜索内容的时效性。\n"
        "`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。选择多个角度的页面，"
        "同时尽可能选择可信任的信息来源。考虑到部分页面是无法加载的，你也可以多打开一些可能有用的页面而不用担心内容过多。\n"
        "`open_url(url: str)`：打开指定的 URL。\n"
        "\n"
        "使用 `【{引用 id}†{引用文本}】` 来引用内容。\n"
        "\n"
        "操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; 3. 根据获得的内容进行回复。"
        "在回复中应当引用信息来源。\n"
        " 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\n"
        "如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。"
    ),
    "cogview": (
        "如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。你需要向 `cogview` 发送图像描述，规则：\n"
        "- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。\n"
        "- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。\n"
        "- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\n"
        "- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。"
    ),
}

JOINER = "\u2060"

# The special tokens that are marked in messages: all of each generation, without `sop` and `eop`, which are words.
CHATGLM_6B_TOKENS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
    *("<unk>", "<pad>", "</s>"),
)
CHATGLM2_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unk>", "<s>", "</s>")
CHATGLM3_TOKENS = (*CHATGLM2_TOKENS, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
# What stands for a picture: begin, placeholder, end.
GLM4_PICTURE_TOKENS = ("<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>")
# What stands before an answer of ChatGLM2. In the answer itself it is marked too, so that the two can be told apart.
CHATGLM2_ANSWER_HEADING = "\n\n答："

# SHA-256, white space left out, of templates that are replaced when a tokenizer loads: those that version 0.1.0 of these
# files saved, in the order of the generations,
EARLIER_TEMPLATES = (
    "c73d0339ca6a1f604160e2daeb66b9f4f84cdf96bc4bead8ff219ca381d5a372",
    "1e74cc7693d22defdbc92cce40d88ad4f4093880c3bc0c1dae7cf8c91ef77b8e",
    "985fe5a6844fe3cc38aeb339f2b5948c8c44c615005f44d2becf4ab2bf5d8367",
    "01f9ed5cfd47afb7974bb8f9ac8ea91b337917972bc62a87d5aeada7775fc105",
)
# and those of the published folders: ChatGLM3-6B from revision 103caa4 on, GLM-4-9B's first revisions and its later ones.
PUBLISHED_TEMPLATES = (
    "3c0be383fbfffae79183c26a8e4612687a5c7a48f8878d4cef48959272a33196",
    "17508a206ec9562cfc9cac0c43398c99fa85f28dac0ab8b7d09d742c7b09635d",
    "5a7b85cc09484d87cefb8073540ceeb1b74c21a2610a4c62da3a1e23a17273c3",
)
# And of the response templates of version 0.1.0, as JSON with sorted keys.
EARLIER_RESPONSE_TEMPLATES = (
    "5db0c450b55ca0c8af576968bd1cfae193057f55ac62265006ae63f8efd4208a",
    "85fad4887574a7543c9006de3ebf53337919bc6937617580521ee5e367da192c",
)


def _marking(tokens: Sequence[str]) -> str:
    """Jinja filters that mark `tokens`; the joiners that stand in their way are doubled first."""
    filters = ""
    for token in tokens:
        first, rest = token[0].replace("\n", "\\n"), token[1:].replace("\n", "\\n")
        filters += f" | replace('{JOINER}{rest}', '{JOINER}{JOINER}{rest}')"
        filters += f" | replace('{first}{rest}', '{first}{JOINER}{rest}')"
    return filters


def plain_macro(tokens: Sequence[str]) -> str:
    """The macro `plain`, which writes the text of a message; what is no string fails at the `+`."""
    return (
        "{#- What looks like a control token in a message gets a word joiner, U+2060, which cannot be seen here. -#}\n"
        "{%- macro plain(text) %}\n"
        "    {%- set text = text + '' %}\n"
        + "".join(f"    {{%- set text = text{_marking([token])} %}}\n" for token in tokens)
        + "    {{- text }}\n{%- endmacro -%}\n"
    )


# Writes metadata, which a newline ends: those within it are marked too.
METADATA_MACRO = f"""{{%- macro heading(metadata) %}}
    {{{{- plain(metadata | replace('{JOINER}', '{JOINER}{JOINER}') | replace('\\n', '{JOINER}\\n')) }}}}
{{%- endmacro -%}}
"""

CHATGLM_6B_TEMPLATE = (
    plain_macro(CHATGLM_6B_TOKENS)
    + """{%- if tools %}
    {{- raise_exception('ChatGLM-6B knows no tools') }}
{%- endif %}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- set is_single = messages | length - first <= 2 %}
{%- for message in messages %}
    {%- set turn = loop.index0 - first %}
    {%- set content = plain(message['content'] or '') %}
    {%- if message['tools'] is defined or message['tool_calls'] or message['metadata'] %}
        {{- raise_exception('ChatGLM-6B knows no tools') }}
    {%- elif turn < 0 %}
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
{%- endfor %}"""
)

CHATGLM2_TEMPLATE = (
    plain_macro(CHATGLM2_TOKENS)
    + """[gMASK]sop
{%- if tools %}
    {{- raise_exception('ChatGLM2 knows no tools') }}
{%- endif %}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- for message in messages %}
    {%- set turn = loop.index0 - first %}
    {%- set content = plain(message['content'] or '') %}
    {%- if message['tools'] is defined or message['tool_calls'] or message['metadata'] %}
        {{- raise_exception('ChatGLM2 knows no tools') }}
    {%- elif turn < 0 %}
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
        {%- set content = content"""
    + _marking([CHATGLM2_ANSWER_HEADING])
    + """ %}
        {%- generation %}{{ content + '</s>' }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
)

CHATGLM3_TEMPLATE = (
    plain_macro(CHATGLM3_TOKENS)
    + METADATA_MACRO
    + """[gMASK]sop
{%- macro listed(offered) %}
    {%- set written = namespace(tools=[]) %}
    {%- for item in offered if offered is not mapping %}
        {%- if not item['function'] and not item['name'] and item['type'] %}
            {{- raise_exception('ChatGLM3 knows no built-in tool ' ~ item['type']) }}
        {%- endif %}
        {%- set written.tools = written.tools + [item['function'] or item] %}
    {%- endfor %}
    {{- '\\n' + plain((offered if offered is mapping else written.tools) | tojson(indent=4)) }}
{%- endmacro %}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>\\n"""
    + TOOLS_PROMPT
    + """' + listed(tools) }}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] %}
    {%- set metadata = heading(message['metadata'] or '') %}
    {%- set content = plain(message['content'] or '') %}
    {%- if role not in ['system', 'user', 'assistant', 'observation'] %}
        {{- raise_exception('Unknown role ' ~ role) }}
    {%- elif role != 'assistant' %}
        {%- set offered = message['tools'] if message['tools'] is defined else (tools if loop.first and tools else none) %}
        {{- '<|' + role + '|>' + metadata + '\\n' + content }}
        {{- listed(offered) if role == 'system' and offered is not none }}
    {%- else %}
        {%- if content or not message['tool_calls'] %}
            {{- '<|assistant|>' }}
            {%- generation %}{{ metadata + '\\n' + content }}{% endgeneration %}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {{- '<|assistant|>' }}
            {%- generation %}
                {{- heading(function['name']) + '\\n```python\\ntool_call(' }}
                {%- for name, value in function['arguments'].items() %}
                    {{- plain(name + '=' + '%r' | format(value)) }}
                    {{- ', ' if not loop.last }}
                {%- endfor %}
                {{- ')\\n```' }}
            {%- endgeneration %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- elif messages[-1]['role'] == 'assistant' and (tools or messages | rejectattr('role', 'equalto', 'assistant') | list) %}
    {%- generation %}{{ '</s>' }}{% endgeneration %}
{%- endif %}"""
)

# How the templates of GLM-4 and GLM-4V begin, what they know of each message, and how they write its calls.
GLM4_HEAD = (
    plain_macro(GLM4_TOKENS)
    + METADATA_MACRO
    + """[gMASK]<sop>
{%- set builtin_tools = """
    + json.dumps(GLM4_BUILTIN_TOOLS, ensure_ascii=False)
    + """ %}
{%- macro sections(offered) %}
    {%- for item in (offered.values() if offered is mapping else offered) %}
        {%- set tool = item['function'] or item %}
        {%- if tool['name'] is string %}
            {{- '\\n\\n## ' + plain(tool['name'] + '\\n\\n' + tool | tojson(indent=4)) + '"""
    + GLM4_TOOL_NOTE.replace("\n", "\\n")
    + """' }}
        {%- elif tool['type'] in builtin_tools %}
            {{- '\\n\\n## ' + tool['type'] + '\\n\\n' + builtin_tools[tool['type']] }}
        {%- else %}
            {{- raise_exception('GLM-4 writes the name of a tool above it, and this one has none') }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
"""
)
GLM4_MESSAGE = (
    """
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] %}
    {%- set metadata = heading(message['metadata'] or '') %}
    {%- set picture = '"""
    + "".join(GLM4_PICTURE_TOKENS)
    + """' if message['image'] is defined and message['image'] is not none else '' %}
    {%- set content = picture + plain(message['content'] or '') %}
    {%- if role not in ['system', 'user', 'assistant', 'observation'] %}
        {{- raise_exception('Unknown role ' ~ role) }}
"""
)
GLM4_CALLS = """
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {%- set arguments = function['arguments'] %}
            {{- '<|assistant|>' }}
            {%- generation %}
                {{- heading(function['name']) + '\\n' + plain(arguments if arguments is string else arguments | tojson) }}
            {%- endgeneration %}
        {%- endfor %}
"""

GLM4_TEMPLATE = (
    GLM4_HEAD
    + """
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>\\n"""
    + (GLM4_TOOLS_PROMPT + GLM4_TOOLS_HEADING).replace("\n", "\\n")
    + """' + sections(tools) }}
{%- endif %}
{%- for message in messages %}
"""
    + GLM4_MESSAGE
    + """
    {%- elif role != 'assistant' %}
        {{- '<|' + role + '|>' + metadata + '\\n' + content }}
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
            {%- generation %}{{ metadata + '\\n' + content }}{% endgeneration %}
        {%- endif %}
"""
    + GLM4_CALLS
    + """
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- elif messages[-1]['role'] == 'assistant' and (tools or messages | rejectattr('role', 'equalto', 'assistant') | list) %}
    {%- generation %}{{ '<|user|>' }}{% endgeneration %}
{%- endif %}"""
)

# Tools have a turn of their own here, without a heading, and a message without text and picture is left out.
GLM4V_TEMPLATE = (
    GLM4_HEAD
    + """
{%- macro tools_turn(offered) %}
    {{- '<|system|>\\n"""
    + GLM4_TOOLS_PROMPT.replace("\n", "\\n")
    + """' + sections(offered) }}
{%- endmacro %}
{%- set written = namespace(last='', has_others=false) %}
{%- if tools %}
    {{- tools_turn(tools) }}
    {%- set written.has_others = true %}
{%- endif %}
{%- for message in messages %}
"""
    + GLM4_MESSAGE
    + """
    {%- elif role != 'assistant' %}
        {%- if role == 'system' and message['tools'] is defined %}
            {{- tools_turn(message['tools']) }}
            {%- set written.last = role %}
            {%- set written.has_others = true %}
        {%- endif %}
        {%- if content %}
            {{- '<|' + role + '|>' + metadata + '\\n' + content }}
            {%- set written.last = role %}
            {%- set written.has_others = true %}
        {%- endif %}
    {%- else %}
        {%- if content %}
            {{- '<|assistant|>' }}
            {%- generation %}{{ metadata + '\\n' + content }}{% endgeneration %}
        {%- endif %}
        {%- if content or message['tool_calls'] %}
            {%- set written.last = role %}
        {%- endif %}
"""
    + GLM4_CALLS
    + """
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- elif written.last == 'assistant' and written.has_others %}
    {%- generation %}{{ '<|user|>' }}{% endgeneration %}
{%- endif %}"""
)

# The name of a tool that may be called, at the beginning of an answer or of its next part. A text begins with an empty
# line, and where a model leaves that out, its first punctuation or its length tells that it is no name.
TOOL_NAME = r"(?P<name>[\w.:/\-]{1,64}+)[ ]*\n"
# Ends a call that is nested deeper than one is read here; the library's JSON reader raises for a model that only opens.
TOO_DEEP = r"|(?=(?:[\[{][^\[\]{}]*+){33})"
# The same before a number with more digits than Python reads, for which that reader raises too.
TOO_LONG = r"|(?<![0-9])(?=[0-9]{4300})"

CHATGLM3_RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            # The vocabulary decodes with a space before the name and before the fence.
            "open_pattern": r"(?:^|<\|assistant\|>)[ ]*" + TOOL_NAME + r"[ ]*```\w*\n\s*tool_call\(",
            "close_pattern": r"\s*```\s*" + TOO_DEEP + TOO_LONG,
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                # Python writes 'text' where JSON writes "text": `string_delims` reads both, but not "it's Tom's", nor the
                # two characters that the library keeps for itself there.
                "tag_pattern": r"(?:^|,)\s*(?P<key>\w+)\s*=\s*(?:\"(?P<value>[^\"\\\x01\x02]*'[^\"\\\x01\x02]*)\""
                r"|(?P<value>'(?:[^'\\\x01\x02]|\\[^\x01\x02])*+'|\"(?:[^\"\\\x01\x02]|\\[^\x01\x02])*+\""
                r"|(?P<nest>[\[{](?:[^\[\]{}'\"\x01\x02]|'(?:[^'\\\x01\x02]|\\[^\x01\x02])*+'|\"(?:[^\"\\\x01\x02]|\\[^\x01\x02])*+\"|(?&nest))*+[\]}])"
                r"|[^,()\[\]{}\x01\x02]+))",
                "value_parser": {
                    "name": "json",
                    "args": {"string_delims": [["'", "'"]], "allow_non_json": True},
                },
            },
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<|assistant|>", "<|user|>", "<|observation|>", "</s>"], "content": "text"},
    },
}

GLM4_RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            # A built-in tool takes any text, a function a JSON object.
            "open_pattern": r"(?:^|<\|assistant\|>|(?<=<\|assistant\|>))[ ]*(?:(?P<name>"
            + "|".join(GLM4_BUILTIN_TOOLS)
            + r")[ ]*\n|"
            + TOOL_NAME
            + r"\s*(?=\{))",
            "close_pattern": r"\s*(?:<\|assistant\|>|<\|user\|>|<\|observation\|>|<\|endoftext\|>)"
            + TOO_DEEP
            + TOO_LONG,
            "repeats": True,
            "content": "json",
            "content_args": {"allow_non_json": True},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<|assistant|>", "<|user|>", "<|observation|>", "<|endoftext|>"], "content": "text"},
    },
}


__all__ = [
    "CHATGLM2_ANSWER_HEADING",
    "CHATGLM2_TEMPLATE",
    "CHATGLM2_TOKENS",
    "CHATGLM3_RESPONSE_TEMPLATE",
    "CHATGLM3_TEMPLATE",
    "CHATGLM3_TOKENS",
    "CHATGLM_6B_TEMPLATE",
    "CHATGLM_6B_TOKENS",
    "EARLIER_RESPONSE_TEMPLATES",
    "EARLIER_TEMPLATES",
    "GLM4_BUILTIN_TOOLS",
    "GLM4_PICTURE_TOKENS",
    "GLM4_RESPONSE_TEMPLATE",
    "GLM4_TEMPLATE",
    "GLM4V_TEMPLATE",
    "GLM4_TOKENS",
    "GLM4_TOOLS_HEADING",
    "GLM4_TOOLS_PROMPT",
    "GLM4_TOOL_NOTE",
    "PUBLISHED_TEMPLATES",
    "JOINER",
    "TOOLS_PROMPT",
    "plain_macro",
]

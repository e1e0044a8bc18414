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
"""The Jinja and response templates of the four generations, as data.

A chat template shows how a conversation reads as one string, for other programs and for people; this repository's own
ids come from `ConversationFormat.segments`. The tags strip the white space around them, so only what stands inside
`{{ }}` is written. A response template teaches the library's `parse_response` and its server to read an answer;
`ConversationFormat.read_answer` is the exact way.
"""

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

# SHA-256 of templates that earlier versions of these files saved with a tokenizer. They are replaced when it loads.
EARLIER_TEMPLATES = (
    "979dd63fdb050def949249eff41340417480efe6e84233e954c7f0da3bbcc5c9",
    "fc89b400e6431f595b9ba7d36666746c2f2860d0214a86514d32b848e6ae5c5e",
)

CHATGLM_6B_TEMPLATE = """{%- if tools %}
    {{- raise_exception('ChatGLM-6B knows no tools') }}
{%- endif %}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- set is_single = messages | length - first <= 2 %}
{%- for message in messages %}
    {%- set turn = loop.index0 - first %}
    {%- set content = message['content'] or '' %}
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

CHATGLM2_TEMPLATE = """[gMASK]sop
{%- if tools %}
    {{- raise_exception('ChatGLM2 knows no tools') }}
{%- endif %}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- for message in messages %}
    {%- set turn = loop.index0 - first %}
    {%- set content = message['content'] or '' %}
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
        {%- generation %}{{ content + '</s>' }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""

CHATGLM3_TEMPLATE = (
    """[gMASK]sop
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
{%- endif %}"""
)

GLM4_TEMPLATE = (
    """[gMASK]<sop>
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
{%- endif %}"""
)

CHATGLM3_RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            # No lookahead: the streaming parser would miss a delimiter that arrives in pieces.
            "open_pattern": r"(?:^|<\|assistant\|>)\s*(?P<name>[^\s<`]+)[ ]*\n[ ]*```\w*\n\s*tool_call\(",
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
}

GLM4_RESPONSE_TEMPLATE: dict[str, Any] = {
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
}


__all__ = [
    "CHATGLM2_TEMPLATE",
    "CHATGLM3_RESPONSE_TEMPLATE",
    "CHATGLM3_TEMPLATE",
    "CHATGLM_6B_TEMPLATE",
    "EARLIER_TEMPLATES",
    "GLM4_RESPONSE_TEMPLATE",
    "GLM4_TEMPLATE",
    "GLM4_TOOLS_HEADING",
    "GLM4_TOOLS_PROMPT",
    "GLM4_TOOL_NOTE",
    "TOOLS_PROMPT",
]

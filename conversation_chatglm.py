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

- A generation is a `ConversationFormat`: data and a few methods. `RoundFormat` is for the generations that number
  questions and answers in plain text (ChatGLM-6B, ChatGLM2), `RoleFormat` for those with a token for each role
  (ChatGLM3, GLM-4). `CONVERSATION_FORMATS` holds them by name; another generation adds itself there.
- A conversation is not one string. The published code tokenizes every piece of text on its own (a role token, then
  `metadata` and a newline, then the content), and each piece starts with SentencePiece's leading space. So a
  conversation is a list of `Segment`s here, and the tokenizer encodes one after the other.
- ChatGLM-6B reads everything before its answer in both directions, so training can use only the last answer of a
  conversation. The other generations learn from all of them.
- An answer of ChatGLM3 or GLM-4 starts with its `metadata`: empty for text, else the name of the tool it calls. A call
  is Python source, `tool_call(name=value, ...)`, or JSON. It is read as literals and never evaluated.
- Messages come in three forms (pairs, the published dicts, OpenAI's dicts). `normalize_messages` turns them into the
  published dicts, the only form the rest of this file knows.

Nothing here needs torch or transformers.
"""

import copy
import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from .conversation_calls import (
    call_as_json,
    call_as_python,
    check_size,
    normalize_tools,
    parse_tool_call,
    tools_as_list,
    tools_as_sections,
    write_call,
)
from .conversation_messages import ROLES, Message, check_text, content_text, take_picture
from .conversation_templates import (
    CHATGLM2_TEMPLATE,
    CHATGLM2_TOKENS,
    CHATGLM3_RESPONSE_TEMPLATE,
    CHATGLM3_TEMPLATE,
    CHATGLM3_TOKENS,
    CHATGLM_6B_TEMPLATE,
    CHATGLM_6B_TOKENS,
    EARLIER_RESPONSE_TEMPLATES,
    EARLIER_TEMPLATES,
    GLM4_BUILTIN_TOOLS,
    GLM4_PICTURE_TOKENS,
    GLM4_RESPONSE_TEMPLATE,
    GLM4_TEMPLATE,
    GLM4_TOKENS,
    GLM4_TOOLS_HEADING,
    GLM4_TOOLS_PROMPT,
    GLM4V_TEMPLATE,
    PUBLISHED_TEMPLATES,
    TOOLS_PROMPT,
)


# A placeholder the models were trained to write for the date of their training, and what `chat` shows instead.
TRAINING_TIME = ("[[训练时间]]", "2023年")

# ChatGLM-6B's ASCII punctuation next to Chinese characters, which its `chat` makes full-width.
CHINESE_PUNCTUATION = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
FULL_WIDTH = dict(zip(",!:;?", "，！：；？"))


# How the published `chat` and `stream_chat` end the list of their arguments, in every generation.
SAMPLING_ARGUMENTS = ("do_sample", "top_p", "temperature", "logits_processor")


class Segment(NamedTuple):
    """A piece of a conversation that is encoded on its own.

    Attributes:
        text: the text, or the name of one special token.
        is_special: whether `text` names a special token.
        is_answer: whether the model learns to write the piece; true for the token that closes an answer, too.
        answer_spans: `(start, end)` of the answers inside `text`, for a text that holds several turns (ChatGLM2).
    """

    text: str
    is_special: bool
    is_answer: bool = False
    answer_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConversationFormat:
    """How one generation writes a conversation down and reads an answer back.

    Attributes:
        name: the generation, such as `"chatglm3"`.
        opening_tokens: the control tokens that every encoding starts with.
        marked_tokens: the special tokens that the template marks where a message holds their names.
        stop_tokens: the tokens that end an answer.
        closing_token: what the published fine-tuning puts behind the last answer of a conversation.
        chat_template: the Jinja template that renders a conversation as one string.
        response_template: how the library's `parse_response` reads an answer; `None` where an answer is plain text.
        chat_defaults: the published defaults of `chat`, as arguments of `generate`. `max_length` counts the prompt.
        chat_arguments: what the published `chat` takes by position after `tokenizer` and `query`.
        stream_chat_arguments: what the published `stream_chat` takes there.
        picture_tokens: the special tokens that stand for a picture; none where messages are text alone.
        uses_pairs: whether a history is natively a list of `(question, answer)` pairs instead of dicts.
    """

    name: str
    opening_tokens: tuple[str, ...] = ()
    marked_tokens: tuple[str, ...] = field(default=(), repr=False)
    picture_tokens: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...]
    closing_token: str
    chat_template: str = field(repr=False)
    response_template: Mapping[str, Any] | None = field(default=None, repr=False)
    chat_defaults: Mapping[str, Any]
    chat_arguments: tuple[str, ...] = ("history", "role", "max_length", "num_beams", *SAMPLING_ARGUMENTS)
    stream_chat_arguments: tuple[str, ...] = (
        *("history", "role", "past_key_values", "max_length"),
        *SAMPLING_ARGUMENTS,
        "return_past_key_values",
    )

    uses_pairs: ClassVar[bool]

    def normalize_messages(self, history: Sequence[Any] | None) -> list[Message]:
        """Bring a history of any form into the published message dicts.

        Args:
            history: `None`, or a sequence of `(question, answer)` pairs and message dicts. A dict has `role` and
                `content`, and may have `metadata` (assistant) and `tools` (system: a list of descriptions, or a dict
                of them by name). OpenAI's form is understood: the role `tool`, `tool_calls`, a `content` that is
                `None` or a list of parts, tools wrapped in `function`. GLM-4V: one message may have an `image`, or a
                part of the type `image` or `image_url`, which becomes it; nothing opens it here.

        Returns:
            New dicts, with roles out of `ROLES`; nothing of the caller's is changed or shared.

        Raises:
            TypeError, ValueError: for anything else, with the value and the form that is expected.
        """
        if history is None:
            return []
        if not isinstance(history, (list, tuple)):
            raise TypeError(f"The history must be a list of messages or of pairs, got {reprlib.repr(history)}.")
        messages: list[Message] = []
        for index, item in enumerate(history):
            if isinstance(item, Mapping):
                messages += self._normalize_message(item, f"messages[{index}]")
            elif isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item):
                messages.append({"role": "user", "content": item[0]})
                messages.append({"role": "assistant", "metadata": "", "content": item[1]})
            else:
                raise TypeError(
                    f"messages[{index}] must be a dict with `role` and `content`, or a (question, answer) pair of "
                    f"strings, got {reprlib.repr(item)}."
                )
        num_pictures = sum("image" in message for message in messages)
        if num_pictures > 1:
            raise ValueError(f"A conversation may hold one picture, as the model was trained; got {num_pictures}.")
        return messages

    def add_tools(self, messages: Sequence[Message], tools: Any) -> list[Message]:
        """Offer `tools` in the system message of a normalized conversation, which is added where there is none.

        Args:
            messages: what `normalize_messages` returns; left as it is.
            tools: descriptions of functions, in OpenAI's form or bare, in a list or in a dict by name; `None` for no
                tools.

        Raises:
            TypeError: if `tools` holds no descriptions.
            ValueError: if the system message offers tools already, or the generation knows no tools.
        """
        raise NotImplementedError

    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        """Write a conversation down, without the `opening_tokens`.

        Args:
            messages: what `normalize_messages` returns.
            add_generation_prompt: end with what asks for an answer. Otherwise the conversation is closed, if it
                `is_complete`.

        Raises:
            ValueError: for a conversation that the generation has no form for (ChatGLM-6B and ChatGLM2: tools, roles
                out of order; ChatGLM3: built-in tools; GLM-4: tools without a name), and for text that `check_text`
                refuses.
        """
        raise NotImplementedError

    def is_complete(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation ends with an answer to something before it, so that the `closing_token` follows.

        An answer alone is a piece of a conversation: the published fine-tuning of GLM-4 writes message by message.
        """
        roles = [message["role"] for message in messages]
        return roles[-1:] == ["assistant"] and set(roles) != {"assistant"}

    def current_template(self, saved: Any) -> Any:
        """What a tokenizer renders with: ours, unless a template of somebody's own was saved with it.

        Args:
            saved: a template, several by name (a dict, or a list as tokenizer_config.json has it), or nothing. Those
                of the published folders and of earlier versions of these files are known, whatever their white space.
        """
        if isinstance(saved, (list, tuple)) and all(isinstance(item, Mapping) for item in saved):
            saved = {item.get("name"): item.get("template") for item in saved}
        if isinstance(saved, Mapping):
            templates = {name: self.current_template(template) for name, template in saved.items()}
            has_own = any(template != self.chat_template for template in templates.values())
            return templates if has_own else self.chat_template
        shipped = [known.chat_template for known in CONVERSATION_FORMATS.values()]
        return self.chat_template if not saved or saved in shipped or _is_known_template(saved) else saved

    def current_response_template(self, saved: Any) -> Any:
        """How the library's parser reads an answer: ours, unless another one was saved that was never ours."""
        digest = hashlib.sha256(json.dumps(saved, sort_keys=True, default=repr).encode()).hexdigest()
        return self.response_template if not saved or digest in EARLIER_RESPONSE_TEMPLATES else saved

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The text that asks for an answer, without the control tokens that the tokenizer adds to every text."""
        return "".join(segment.text for segment in self.segments(messages))

    def read_answer(self, text: str, messages: Sequence[Message]) -> tuple[str | dict[str, Any], list[Message]]:
        """Read what the model wrote. Never raises and never evaluates: what cannot be read as a call is text.

        Args:
            text: the decoded answer without its stop token.
            messages: the normalized conversation before it, which tells whether tools were offered.

        Returns:
            The response, and the assistant messages to append to the conversation. The response is a string, or for a
            call `{"name", "parameters"}` if tools were offered and `{"name", "content"}` if not (code interpreter) or
            if the tool is a built-in one. An answer of several parts gives one message each; the response is the last
            one's.
        """
        raise NotImplementedError

    def native_history(self, messages: Sequence[Message]) -> list[Any]:
        """Give a normalized conversation the form that the published `chat` of the generation returns.

        Returns:
            `(question, answer)` pairs where the generation uses them, unless there is a system message or an open
            question, which pairs cannot hold. Otherwise message dicts.
        """
        roles = [message["role"] for message in messages]
        if self.uses_pairs and roles == ["user", "assistant"] * (len(roles) // 2):
            return [
                (question["content"], answer["content"]) for question, answer in zip(messages[::2], messages[1::2])
            ]
        return copy.deepcopy(list(messages))

    def write_tool_call(self, name: str, arguments: Mapping[str, Any] | str) -> Message:
        """Write a call as the assistant message that the generation was taught: the inverse of `parse_tool_call`.

        Args:
            name: the function.
            arguments: its arguments, as a dict or as the JSON text that OpenAI's API uses.

        Raises:
            ValueError: if `parse_tool_call` could not read the call back, or the generation knows no tools.
        """
        raise NotImplementedError

    def _normalize_message(self, message: Mapping[str, Any], place: str) -> list[Message]:
        role = "observation" if message.get("role") == "tool" else message.get("role")
        if role not in ROLES:
            raise ValueError(
                f"{place} has the role {reprlib.repr(role)}; the roles are {', '.join(ROLES)} and OpenAI's tool."
            )
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, (list, tuple)):
            raise TypeError(f"`tool_calls` of {place} must be a list, got {reprlib.repr(calls)}.")
        message, picture = take_picture(message, place)
        if picture is not None and not self.picture_tokens:
            raise ValueError(f"{place} has a picture, and this generation reads text alone.")
        if "content" not in message and not calls and picture is None:
            raise ValueError(f"{place} has no `content`: {reprlib.repr(dict(message))}.")
        check_size(message, place)
        normalized = {
            key: copy.deepcopy(value)
            for key, value in message.items()
            if key not in ("tool_calls", "tool_call_id") and value is not None
        }
        normalized |= {"role": role, "content": content_text(message.get("content"), place)}
        if not isinstance(normalized.get("metadata", ""), str):
            raise TypeError(f"The metadata of {place} must be a string, got {reprlib.repr(normalized['metadata'])}.")
        if role == "system" and "tools" in normalized:
            normalized["tools"] = normalize_tools(normalized["tools"], f"`tools` of {place}")
        if picture is not None:
            normalized["image"] = picture
        if not calls:
            return [normalized]
        if role != "assistant":
            raise ValueError(f"{place} has `tool_calls` and the role {role!r}; only the assistant calls tools.")
        written = [normalized] if normalized["content"] or picture is not None else []
        for call in calls:
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise ValueError(f"A tool call of {place} has no function name: {reprlib.repr(call)}.")
            arguments = function.get("arguments")
            written.append(self.write_tool_call(function["name"], {} if arguments is None else arguments))
        return written


@dataclass(frozen=True, kw_only=True)
class RoundFormat(ConversationFormat):
    """Rounds of one question and one answer, as plain text, without tools.

    Attributes:
        first_round: the number of the first round.
        newline: what ends a line.
        numbers_single_round: whether a question without a history is numbered too.
        answer_opening: the control tokens between the prompt and the answer; the last one is learnt with the answer.
        learns_every_answer: whether answers before the last one can be learnt.
        widens_punctuation: whether ASCII punctuation beside Chinese characters becomes full-width in an answer.
    """

    first_round: int
    newline: str
    numbers_single_round: bool
    answer_opening: tuple[str, ...] = ()
    learns_every_answer: bool
    widens_punctuation: bool

    uses_pairs: ClassVar[bool] = True

    def add_tools(self, messages: Sequence[Message], tools: Any) -> list[Message]:
        """Refuse tools; see `ConversationFormat.add_tools`."""
        if tools is not None:
            raise _no_tools(tools)
        return list(messages)

    def write_tool_call(self, name: str, arguments: Mapping[str, Any] | str) -> Message:
        """Refuse the call; see `ConversationFormat.write_tool_call`."""
        raise _no_tools(name)

    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        """See `ConversationFormat.segments`: the prompt is one piece, and the last answer another."""
        system, rounds = _rounds(messages)
        text = f"{system}{self.newline}" if system else ""
        spans = []
        for number, (question, answer) in enumerate(rounds, start=self.first_round):
            # CODEPATH: chatglm asks its first question as it is; chatglm2 numbers it too.
            if len(rounds) == 1 and not self.numbers_single_round:
                text += question
                continue
            text += f"[Round {number}]{self.newline}问：{question}{self.newline}"
            if answer is not None or add_generation_prompt:
                text += "答："
            if answer is not None and number - self.first_round < len(rounds) - 1:
                spans.append((len(text), len(text) + len(answer)))
                text += f"{answer}{self.newline}"
        answer = rounds[-1][1] if rounds else None
        if answer is not None and add_generation_prompt:
            raise ValueError(
                "The conversation ends with an answer, so there is nothing to answer: end it with a user message, or "
                "pass add_generation_prompt=False."
            )
        # CODEPATH: chatglm2; chatglm sees the answers in its context from both sides.
        segments = [Segment(text, False, False, tuple(spans) if self.learns_every_answer else ())]
        if answer is not None or add_generation_prompt:
            segments += [Segment(token, True) for token in self.answer_opening[:-1]]
            # The published fine-tuning script of ChatGLM-6B makes the model learn `<sop>` as well.
            segments += [Segment(token, True, answer is not None) for token in self.answer_opening[-1:]]
        if answer is not None:
            # The published fine-tuning scripts encode the prompt and the last answer separately.
            segments += [Segment(answer, False, True), Segment(self.closing_token, True, True)]
        return _checked_segments(segments)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """See `ConversationFormat.prompt_text`: the tokenizer adds the opening of an answer too."""
        return self.segments(messages)[0].text

    def read_answer(self, text: str, messages: Sequence[Message]) -> tuple[str | dict[str, Any], list[Message]]:
        """See `ConversationFormat.read_answer`: an answer is text."""
        response = text.strip().replace(*TRAINING_TIME)
        # CODEPATH: chatglm mixes the punctuation of two scripts; chatglm2 does not.
        if self.widens_punctuation:
            response = CHINESE_PUNCTUATION.sub(lambda match: FULL_WIDTH[match[0]], response)
        return response, [{"role": "assistant", "content": response}]


@dataclass(frozen=True, kw_only=True)
class RoleFormat(ConversationFormat):
    """Messages of any role in any order, each behind the token of its role, with tools.

    Attributes:
        tools_prompt: the system text above tools that are offered without a system message.
        tools_heading: what follows the system text where tools are offered beside the messages.
        has_tools_turn: whether tools have a system turn of their own, before that of the system message.
        skips_empty_messages: whether a message without text and picture is left out.
        tools_text: writes the descriptions of tools behind the system text.
        builtin_tools: the names of the tools that are offered by their `type`, and called with plain text.
        unoffered_tools: the names of the tools that are called with plain text where nothing is offered.
        call_text: writes the arguments of a call.
    """

    tools_prompt: str = field(repr=False)
    tools_heading: str = ""
    has_tools_turn: bool = False
    skips_empty_messages: bool = False
    tools_text: Callable[[Any], str]
    builtin_tools: tuple[str, ...] = ()
    unoffered_tools: tuple[str, ...] = ()
    call_text: Callable[[Mapping[str, Any]], str]

    uses_pairs: ClassVar[bool] = False

    def add_tools(self, messages: Sequence[Message], tools: Any) -> list[Message]:
        """See `ConversationFormat.add_tools`."""
        messages = list(messages)
        if tools is None:
            return messages
        # CODEPATH: glm4v writes its prompt above the tools, wherever they are offered; chatglm3 and glm4 do here.
        system: Message = {"role": "system", "content": "" if self.has_tools_turn else self.tools_prompt}
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)
            if "tools" in system:
                raise ValueError("Tools were given twice: in the system message and as `tools`. Give them once.")
        content = system["content"] + ("" if self.has_tools_turn else self.tools_heading)
        return [{**system, "content": content, "tools": normalize_tools(tools, "`tools`")}, *messages]

    def is_complete(self, messages: Sequence[Message]) -> bool:
        """See `ConversationFormat.is_complete`: of the messages that are written."""
        return super().is_complete(list(self._turns(messages)))

    def _turns(self, messages: Sequence[Message]) -> Iterator[Message]:
        """The messages as they are written, one after the other."""
        for message in messages:
            # CODEPATH: glm4v; chatglm3 and glm4 write tools behind the text of the system message, and every message.
            if self.has_tools_turn and message["role"] == "system" and "tools" in message:
                yield {"role": "system", "content": self.tools_prompt + self.tools_heading, "tools": message["tools"]}
                message = {key: value for key, value in message.items() if key != "tools"}
            if not self.skips_empty_messages or message["content"] or "image" in message:
                yield message

    def write_tool_call(self, name: str, arguments: Mapping[str, Any] | str) -> Message:
        """See `ConversationFormat.write_tool_call`; a tool that is called with plain text takes it as it is."""
        is_text = isinstance(arguments, str) and (
            name in self.builtin_tools or (name in self.unoffered_tools and not arguments.lstrip().startswith("{"))
        )
        content = str(arguments) if is_text else write_call(name, arguments, self.call_text)
        return {"role": "assistant", "metadata": name, "content": content}

    def segments(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Segment]:
        """See `ConversationFormat.segments`: a role token, metadata with a newline, and content for each message."""
        segments = []
        was_answer = False
        for message in self._turns(messages):
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content += self.tools_text(message["tools"])
            is_answer = message["role"] == "assistant"
            # The model itself writes the role token that ends its answer, so that token belongs to the answer.
            segments.append(Segment(f"<|{message['role']}|>", True, was_answer))
            segments.append(Segment(f"{message.get('metadata', '')}\n", False, is_answer))
            if "image" in message:
                segments += [Segment(token, True) for token in self.picture_tokens]
            segments.append(Segment(content, False, is_answer))
            was_answer = is_answer
        if add_generation_prompt:
            segments.append(Segment("<|assistant|>", True, was_answer))
        elif self.is_complete(messages):
            segments.append(Segment(self.closing_token, True, True))
        return _checked_segments(segments)

    def read_answer(self, text: str, messages: Sequence[Message]) -> tuple[str | dict[str, Any], list[Message]]:
        """See `ConversationFormat.read_answer`: an answer may have several parts, each text or a call."""
        has_tools = any(message["role"] == "system" and "tools" in message for message in messages)
        answers = []
        parts = text.split("<|assistant|>")
        for part in parts:
            metadata, newline, content = part.partition("\n")
            if not newline:
                metadata, content = "", part
            content = content if metadata.strip() else content.strip()
            answers.append({"role": "assistant", "metadata": metadata, "content": content})
        name = metadata.strip()
        response: str | dict[str, Any]
        if not name:
            response = content.replace(*TRAINING_TIME)
        elif has_tools and (parameters := parse_tool_call(content)) is not None:
            response = {"name": name, "parameters": parameters}
        # CODEPATH: glm4 has built-in tools; chatglm3 has its code interpreter where nothing else is offered.
        elif not has_tools or name in self.builtin_tools:
            response = {"name": name, "content": content}
        else:
            response = parts[-1].strip()
        return response, answers


def conversation_format(name: str) -> ConversationFormat:
    """The format of a generation.

    Raises:
        ValueError: for a generation that `CONVERSATION_FORMATS` does not hold.
    """
    if name not in CONVERSATION_FORMATS:
        raise ValueError(
            f"`model_version` must be one of {tuple(CONVERSATION_FORMATS)}, got {name!r}. GLM and GLM-130B know no "
            "conversation: use `generate`."
        )
    return CONVERSATION_FORMATS[name]


def _is_known_template(template: Any) -> bool:
    """Whether a template is one that the published folders or earlier versions of these files have."""
    if not isinstance(template, str):
        return False
    digest = hashlib.sha256("".join(template.split()).encode(errors="replace")).hexdigest()
    return digest in EARLIER_TEMPLATES or digest in PUBLISHED_TEMPLATES


def _checked_segments(segments: list[Segment]) -> list[Segment]:
    for segment in segments:
        check_text(segment.text)
    return segments


def _no_tools(value: Any) -> ValueError:
    return ValueError(
        "This generation knows no tools: neither `tools`, nor tool calls, nor observations, nor answers with "
        f"metadata. Got {reprlib.repr(value)}."
    )


def _rounds(messages: Sequence[Message]) -> tuple[str, list[tuple[str, str | None]]]:
    """Split a conversation without roles into the system text and `(question, answer)` rounds, the last maybe open."""
    messages = list(messages)
    system = messages.pop(0) if messages and messages[0]["role"] == "system" else {"content": ""}
    if "tools" in system or system.get("metadata"):
        raise _no_tools(system)
    for index, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") or message.get("metadata") or "tools" in message:
            raise _no_tools(message)
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


GLM4 = RoleFormat(
    name="glm4",
    opening_tokens=("[gMASK]", "<sop>"),
    stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
    closing_token="<|user|>",
    marked_tokens=GLM4_TOKENS,
    # glm-4-9b has the tokens, and its network refuses the picture.
    picture_tokens=GLM4_PICTURE_TOKENS,
    chat_template=GLM4_TEMPLATE,
    response_template=GLM4_RESPONSE_TEMPLATE,
    chat_defaults={"max_length": 8192, "top_p": 0.8, "temperature": 0.8},
    tools_prompt=GLM4_TOOLS_PROMPT,
    tools_heading=GLM4_TOOLS_HEADING,
    tools_text=tools_as_sections,
    builtin_tools=tuple(GLM4_BUILTIN_TOOLS),
    call_text=call_as_json,
)


# The formats by name. Another generation is one more entry.
CONVERSATION_FORMATS: dict[str, ConversationFormat] = {
    chat_format.name: chat_format
    for chat_format in (
        RoundFormat(
            name="chatglm",
            stop_tokens=("<eop>",),
            closing_token="<eop>",
            marked_tokens=CHATGLM_6B_TOKENS,
            chat_template=CHATGLM_6B_TEMPLATE,
            chat_defaults={"max_length": 2048, "top_p": 0.7, "temperature": 0.95},
            chat_arguments=("history", "max_length", "num_beams", *SAMPLING_ARGUMENTS),
            stream_chat_arguments=("history", "max_length", *SAMPLING_ARGUMENTS),
            first_round=0,
            newline="\n",
            numbers_single_round=False,
            answer_opening=("[gMASK]", "<sop>"),
            learns_every_answer=False,
            widens_punctuation=True,
        ),
        RoundFormat(
            name="chatglm2",
            opening_tokens=("[gMASK]", "sop"),
            stop_tokens=("</s>",),
            closing_token="</s>",
            marked_tokens=CHATGLM2_TOKENS,
            chat_template=CHATGLM2_TEMPLATE,
            chat_defaults={"max_length": 8192, "top_p": 0.8, "temperature": 0.8},
            chat_arguments=("history", "max_length", "num_beams", *SAMPLING_ARGUMENTS),
            stream_chat_arguments=(
                *("history", "past_key_values", "max_length"),
                *SAMPLING_ARGUMENTS,
                "return_past_key_values",
            ),
            first_round=1,
            newline="\n\n",
            numbers_single_round=True,
            learns_every_answer=True,
            widens_punctuation=False,
        ),
        RoleFormat(
            name="chatglm3",
            opening_tokens=("[gMASK]", "sop"),
            stop_tokens=("</s>", "<|user|>", "<|observation|>"),
            closing_token="</s>",
            marked_tokens=CHATGLM3_TOKENS,
            chat_template=CHATGLM3_TEMPLATE,
            response_template=CHATGLM3_RESPONSE_TEMPLATE,
            # No `max_length`: the published `chat` goes up to the length of the checkpoint.
            chat_defaults={"top_p": 0.8, "temperature": 0.8},
            tools_prompt=TOOLS_PROMPT,
            tools_text=tools_as_list,
            unoffered_tools=("interpreter",),
            call_text=call_as_python,
        ),
        GLM4,
        replace(
            GLM4,
            name="glm4v",
            chat_template=GLM4V_TEMPLATE,
            tools_heading="",
            has_tools_turn=True,
            skips_empty_messages=True,
        ),
    )
}


__all__ = [
    "CONVERSATION_FORMATS",
    "ROLES",
    "ConversationFormat",
    "Message",
    "RoleFormat",
    "RoundFormat",
    "Segment",
    "check_text",
    "conversation_format",
    "parse_tool_call",
]

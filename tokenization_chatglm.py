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
"""The tokenizer of ChatGLM2 and ChatGLM3, on the Rust backend, rebuilt from the checkpoint's `tokenizer.model`.

What is unusual here:

- `tokenizer.model` is a SentencePiece BPE with byte fallback. Its pieces and scores are read with the `sentencepiece`
  package and become a Rust BPE that gives the same ids for any text. `tokenizer.json` is written for other programs
  and read only where `tokenizer.model` is missing.
- The control tokens lie behind the pieces. Text never becomes one of them: `tokenizer("<|user|>")` is text, and so is
  every message. In the Rust tokenizer the flag `special` stands for exactly that; a token which a user adds does not
  have it there, so that it is found in text.
- Every encoding starts with `[gMASK] sop`, padding is on the left, and position ids are among the outputs.
- A conversation is encoded piece by piece (`encode_conversation`), which no rendered string can reproduce. So
  `apply_chat_template` makes ids by that method, as `build_chat_input` does; the Jinja templates give the text.
- The library sets padding, truncation and the reading of special tokens on the shared Rust tokenizer at every call.
  Messages are encoded by a second Rust tokenizer that nobody changes, so threads can do it at the same time.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import get_json_schema, logging, to_py_obj

from .configuration_chatglm import infer_model_version
from .conversation_chatglm import (
    STOP_TOKENS,
    TOOLS_PROMPT,
    Segment,
    add_tools,
    conversation_segments,
    normalize_messages,
)


logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}

DEFAULT_MODEL_VERSION = "chatglm3"
PREFIX_TOKENS = ("[gMASK]", "sop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

# The control tokens of each generation, in the order of their ids, which follow the SentencePiece ids.
CONTROL_TOKENS = {
    "chatglm2": ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    "chatglm3": ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS),
}

COMMAND_NAMES = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<unk>"}
NAMED_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")

# Tags strip the white space around them, so only what is inside `{{ }}` is written.
CHAT_TEMPLATES = {
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
}


def bpe_from_sentencepiece(vocab_file: str, control_tokens: Sequence[str]) -> BPE:
    """Build the Rust BPE that encodes like a SentencePiece BPE model.

    SentencePiece merges the neighbours whose union is the piece of the highest score, the leftmost ones first. Rust
    ranks pairs instead, so each piece contributes one merge for each of its splits into two pieces, in the order of
    the scores.

    Args:
        vocab_file: the `tokenizer.model`.
        control_tokens: names that get the ids behind the pieces. Nothing merges into them.

    Raises:
        ValueError: if the file is not a SentencePiece model.
    """
    try:
        model = SentencePieceProcessor(model_file=vocab_file)
    except RuntimeError as error:
        raise ValueError(f"{vocab_file} is not the SentencePiece model of ChatGLM2 or ChatGLM3: {error}") from error
    ids = list(range(model.get_piece_size()))
    pieces = model.id_to_piece(ids)
    flags = zip(model.is_unknown(ids), model.is_control(ids), model.is_byte(ids))
    scores = {piece: score for piece, score, flag in zip(pieces, model.get_score(ids), flags) if not any(flag)}
    merges = [
        (piece[:index], piece[index:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for index in range(1, len(piece))
        if piece[:index] in scores and piece[index:] in scores
    ]
    vocab = {token: index for index, token in enumerate([*pieces, *control_tokens])}
    return BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def position_ids_from_mask(attention_mask: Sequence[int]) -> list[int]:
    """Count the real tokens from 0; padding has position 0."""
    return [mask * (count - 1) for mask, count in zip(attention_mask, accumulate(attention_mask))]


class ChatGLMTokenizer(TokenizersBackend):
    """
    Tokenizer of ChatGLM2-6B and ChatGLM3-6B, with the ids of the published one.

    Args:
        vocab_file (`str`, *optional*):
            Path of `tokenizer.model`.
        tokenizer_file (`str`, *optional*):
            Path of a `tokenizer.json` that this class saved; used where there is no `vocab_file`.
        model_version (`str`, *optional*):
            `"chatglm2"` or `"chatglm3"`. When absent: what the `config.json` beside the file tells, else ChatGLM3.
        encode_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether ChatGLM3's four role tokens become ids where they stand in a text given to the tokenizer. For
            training scripts; the content of messages stays text.

    Raises:
        ValueError: if there is no vocabulary file, or an unknown `model_version`.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        model_version: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        source = vocab_file or tokenizer_file
        if source is None:
            raise ValueError(_missing_vocabulary(Path(kwargs.get("name_or_path") or ".")))
        model_version = _resolve_model_version(model_version, Path(source).parent)
        control_tokens = CONTROL_TOKENS[model_version]
        if vocab_file is not None:
            model = bpe_from_sentencepiece(vocab_file, control_tokens)
        else:
            model = Tokenizer.from_file(tokenizer_file).model
        self.model_version = model_version
        self.encode_special_tokens = encode_special_tokens
        self._tokenizer = _rust_tokenizer(model)
        self._message_tokenizer: Tokenizer | None = None
        for name, token in NAMED_TOKENS.items():
            kwargs[name] = kwargs.get(name) or token
        kwargs["chat_template"] = kwargs.get("chat_template") or CHAT_TEMPLATES[model_version]
        kwargs["response_template"] = kwargs.get("response_template") or RESPONSE_TEMPLATES.get(model_version)
        # Earlier versions of the library saved `False`, which was of no consequence for the published class.
        kwargs["split_special_tokens"] = True
        super().__init__(
            vocab_file=vocab_file,
            model_version=model_version,
            encode_special_tokens=encode_special_tokens,
            extra_special_tokens=_extra_tokens(kwargs),
            **kwargs,
        )
        self._register_control_tokens()

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`: the library's own conversion of a SentencePiece model needs protobuf."""
        return kwargs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_message_tokenizer": None}

    @property
    def tokenizer(self) -> "PieceTokenizer":
        """The vocabulary without `[gMASK] sop`, under the name it has in the published class."""
        return PieceTokenizer(self)

    def update_post_processor(self) -> None:
        """Put `[gMASK] sop` before every encoding and `</s>` behind a pair."""
        prefix = " ".join(f"{token}:0" for token in PREFIX_TOKENS)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A:0",
            pair=f"{prefix} $A:0 $B:1 </s>:1",
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in (*PREFIX_TOKENS, "</s>")],
        )

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens behind the vocabulary; text is searched for them, the content of messages for the others only.

        Args:
            new_tokens: one token or several. The control tokens of the generation are there already and stay.
            special_tokens: whether `decode(skip_special_tokens=True)` drops them and messages do not match them.

        Returns:
            How many were new.
        """
        tokens = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        tokens = [token for token in tokens if str(token) not in self._control_flags()]
        for token in tokens:
            is_special = special_tokens or getattr(token, "special", False)
            if is_special and str(token) not in self.all_special_tokens:
                self.extra_special_tokens = [*self.extra_special_tokens, str(token)]
        added = super().add_tokens([_added_token(token, special=False) for token in tokens])
        self._register_control_tokens()
        return added

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, model_version: str | None = None, **kwargs: Any
    ) -> str | list[str]:
        """Turn ids into text as SentencePiece does.

        Args:
            token_ids: an id, a sequence of ids, or a batch of sequences (lists, arrays, tensors, an encoding).
            skip_special_tokens: drop all special tokens. Otherwise ChatGLM3's control tokens give their names, and
                ChatGLM2's give nothing, as published. `<unk>`, `<s>` and `</s>` never give anything.
            model_version: the generation to decode for, if not the tokenizer's own.

        Returns:
            One string, or a list of strings for a batch. Ids that are not in the vocabulary (the embedding has more
            rows) give nothing; a byte that is not UTF-8 gives U+FFFD.
        """
        token_ids = to_py_obj(token_ids["input_ids"] if isinstance(token_ids, (dict, BatchEncoding)) else token_ids)
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        if token_ids and isinstance(token_ids[0], (list, tuple)):
            return [self.decode(ids, skip_special_tokens, model_version, **kwargs) for ids in token_ids]
        model_version = _check_model_version(model_version or self.model_version)
        special_texts = self._special_texts(skip_special_tokens, model_version)
        chunks: list[bytes] = []
        for index in token_ids:
            text = special_texts.get(index)
            if text is None:
                piece = self._tokenizer.id_to_token(index) if index >= 0 else None
                if piece and (match := BYTE_PIECE.fullmatch(piece)):
                    chunks.append(bytes.fromhex(match[1]))
                elif piece:
                    # The space that SentencePiece puts before a text goes again.
                    chunks.append((piece if chunks else piece.removeprefix("▁")).replace("▁", " ").encode())
            elif text:
                chunks.append(text.encode())
        return ESCAPED_BYTE.sub("\ufffd", b"".join(chunks).decode(errors="surrogateescape"))

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        """Turn ids into the names of tokens; ids that are not in the vocabulary have the name `""`, as published."""
        tokens = super().convert_ids_to_tokens(ids, skip_special_tokens)
        return (tokens or "") if isinstance(ids, int) else [token or "" for token in tokens]

    def stop_token_ids(self, model_version: str | None = None) -> list[int]:
        """The ids that end an answer, for the tokenizer's own generation or another one."""
        model_version = _check_model_version(model_version or self.model_version)
        return [self._special_ids(model_version)[token] for token in STOP_TOKENS[model_version]]

    def get_command(self, token: str) -> int:
        """The id of a control token, or of `<bos>`, `<eos>` or `<pad>`.

        Raises:
            ValueError: for any other token.
        """
        commands = self.tokenizer.special_tokens
        if token not in commands:
            raise ValueError(
                f"{token!r} is not a control token of {self.model_version}; they are {', '.join(commands)}."
            )
        return commands[token]

    def __call__(
        self, text: Any = None, text_pair: Any = None, *args: Any, return_tensors: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        """Encode texts or pairs of texts. The arguments are the library's; the result has `position_ids` as well."""
        if isinstance(text, str) and text_pair == "":
            # The library drops an empty second text of a single pair, and the `</s>` behind it.
            encoded = self([text], [text_pair], *args, return_tensors=return_tensors, **kwargs)
            if return_tensors is not None or "overflow_to_sample_mapping" in encoded:
                return encoded
            return BatchEncoding({key: value[0] for key, value in encoded.items()}, encoded.encodings)
        encoded = super().__call__(text, text_pair, *args, return_tensors=return_tensors, **kwargs)
        if "position_ids" in self.model_input_names and "position_ids" not in encoded and encoded.encodings:
            positions = [position_ids_from_mask(encoding.attention_mask) for encoding in encoded.encodings]
            is_batch = return_tensors is not None or isinstance(next(iter(encoded["input_ids"]), None), list)
            columns = {"position_ids": positions if is_batch else positions[0]}
            encoded.update(BatchEncoding(columns, tensor_type=return_tensors))
        return encoded

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """Encode one text or pair into ids; see `__call__`."""
        return self(text, text_pair, None, None, *args, **kwargs)["input_ids"]

    def build_prompt(self, query: str, history: Sequence[Any] | None = None, model_version: str | None = None) -> str:
        """The text of a conversation that asks for an answer. For ChatGLM3 it is for reading, not for encoding."""
        model_version = _check_model_version(model_version or self.model_version)
        messages = self._with_query(query, history, "user", model_version)
        return "".join(segment.text for segment in conversation_segments(messages, model_version))

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """The ids of one message of ChatGLM3: the role token, the metadata with a newline, the content.

        Raises:
            ValueError: for an unknown role.
        """
        messages = normalize_messages([{"role": role, "metadata": metadata, "content": message}], "chatglm3")
        return self._encode_segments(conversation_segments(messages, "chatglm3", False)[:3], "chatglm3")[0]

    def build_chat_input(
        self, query: str, history: Sequence[Any] | None = None, role: str = "user", model_version: str | None = None
    ) -> BatchEncoding:
        """Encode a conversation that asks for an answer.

        Args:
            query: the content of the last message.
            history: what comes before it: message dicts or `(question, answer)` pairs; not changed.
            role: the role of the last message.
            model_version: the generation to encode for, if not the tokenizer's own.

        Returns:
            `input_ids`, `attention_mask` and `position_ids`, tensors of shape [1, length].

        Raises:
            TypeError, ValueError: for a history or a role that has no form in this generation.
        """
        model_version = _check_model_version(model_version or self.model_version)
        messages = self._with_query(query, history, role, model_version)
        ids = self.encode_conversation(messages, model_version=model_version)
        return self.pad({"input_ids": [ids]}, return_tensors="pt")

    def encode_conversation(
        self, messages: Sequence[Any] | None, add_generation_prompt: bool = True, model_version: str | None = None
    ) -> list[int]:
        """The ids of a conversation, `[gMASK] sop` included: the one place where conversations become ids.

        Args:
            messages: message dicts of any form `normalize_messages` takes.
            add_generation_prompt: ask for an answer. Otherwise an answer at the end is closed by `</s>`.
            model_version: the generation to encode for, if not the tokenizer's own.
        """
        return self.encode_conversation_with_mask(messages, add_generation_prompt, model_version)[0]

    def encode_conversation_with_mask(
        self, messages: Sequence[Any] | None, add_generation_prompt: bool = True, model_version: str | None = None
    ) -> tuple[list[int], list[int]]:
        """As `encode_conversation`, with a mask of the same length: 1 for what the assistant writes.

        That is all behind the `<|assistant|>` that asks for an answer, up to the token that closes it, included.
        """
        model_version = _check_model_version(model_version or self.model_version)
        messages = normalize_messages(messages, model_version)
        segments = conversation_segments(messages, model_version, add_generation_prompt)
        return self._encode_segments([*(Segment(token, True) for token in PREFIX_TOKENS), *segments], model_version)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[dict[str, Any] | Callable] | None = None,
        documents: Any = None,
        chat_template: str | None = None,
        *,
        tokenize: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        model_version: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write or encode one conversation or a batch of them, with the ids of `build_chat_input`.

        The arguments and results are the library's. With `tokenize=False` the Jinja template of the generation is
        rendered. A template of the user's own (an argument, or put in place of `chat_template`) goes to the library.

        Args:
            conversation: a list of messages, or a list of such lists.
            tools: functions or their descriptions, for the system message.
            model_version: the generation to write for, if not the tokenizer's own.

        Raises:
            TypeError, ValueError: for a conversation that has no form in this generation.
        """
        tokenizer_kwargs = tokenizer_kwargs or {}
        if (self.chat_template if chat_template is None else chat_template) not in CHAT_TEMPLATES.values():
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                tokenize=tokenize,
                # Such a template writes control tokens as text, which is nothing but text to this class otherwise.
                tokenizer_kwargs={"split_special_tokens": False, **tokenizer_kwargs},
                **kwargs,
            )
        conversation = getattr(conversation, "messages", conversation)
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"A conversation is a list with at least one message, got {conversation!r}.")
        model_version = _check_model_version(model_version or self.model_version)
        is_batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        if isinstance(tools, (list, tuple)):
            tools = [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]
        chats = [
            add_tools(normalize_messages(getattr(chat, "messages", chat), model_version), tools or None)
            for chat in (conversation if is_batched else [conversation])
        ]
        if tokenize:
            return self._encode_chats(chats, is_batched, model_version, **tokenizer_kwargs, **kwargs)
        return super().apply_chat_template(
            chats if is_batched else chats[0], chat_template=CHAT_TEMPLATES[model_version], tokenize=False, **kwargs
        )

    def _encode_chats(
        self,
        chats: list[list[dict[str, Any]]],
        is_batched: bool,
        model_version: str,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> Any:
        encodings = []
        for chat in chats:
            ids, mask = self.encode_conversation_with_mask(chat, add_generation_prompt, model_version)
            if continue_final_message:
                if add_generation_prompt or chat[-1]["role"] != "assistant":
                    raise ValueError(
                        "`continue_final_message` leaves an answer at the end open: it needs a last message of the "
                        "assistant, and no `add_generation_prompt`."
                    )
                ids, mask = ids[:-1], mask[:-1]
            encodings.append((ids, mask))
        if truncation and truncation != "do_not_truncate":
            limit = self.model_max_length if max_length is None else max_length
            encodings = [(self._truncate(ids, limit), self._truncate(mask, limit)) for ids, mask in encodings]
        columns = {"input_ids": [ids for ids, _ in encodings]}
        if return_assistant_tokens_mask:
            columns["assistant_masks"] = [mask for _, mask in encodings]
        encoded = self.pad(
            columns,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )
        if not is_batched and return_tensors is None:
            encoded = BatchEncoding({key: value[0] for key, value in encoded.items()})
        return encoded if return_dict else encoded["input_ids"]

    def _truncate(self, values: list[int], limit: int) -> list[int]:
        if self.truncation_side == "right" or len(values) <= limit:
            return values[:limit]
        start = min(len(PREFIX_TOKENS), limit)
        return values[:start] + values[len(values) - limit + start :]

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Save as the library does, and `tokenizer.model` as well, which this class and other programs load."""
        if push_to_hub:
            # It saves to a folder of its own, by this method, and uploads all that is there.
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), token=kwargs.pop("token", None))
        files = super().save_pretrained(save_directory, *args, filename_prefix=filename_prefix, **kwargs)
        return files + self.save_vocabulary(save_directory, filename_prefix)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy `tokenizer.model`, if it is still where the tokenizer was made from it."""
        return super().save_vocabulary(str(save_directory), filename_prefix) if self.can_save_slow_tokenizer else ()

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **kwargs: Any) -> BatchEncoding:
        """Encode a batch; the library dropped this name, which published examples use."""
        return self(batch_text_or_text_pairs, **kwargs)

    def encode_plus(self, text: str, text_pair: str | None = None, **kwargs: Any) -> BatchEncoding:
        """Encode a text or a pair; the library dropped this name, which published examples use."""
        return self(text, text_pair, **kwargs)

    def _pad(
        self,
        encoded_inputs: dict[str, Any] | BatchEncoding,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        length = len(encoded_inputs["input_ids"])
        if "position_ids" in self.model_input_names and "position_ids" not in encoded_inputs:
            mask = encoded_inputs.get("attention_mask", [1] * length)
            encoded_inputs["position_ids"] = position_ids_from_mask(mask)
        padded = super()._pad(
            encoded_inputs,
            max_length=max_length,
            padding_strategy=padding_strategy,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        padding = [0] * (len(padded["input_ids"]) - length)
        for name in ("position_ids", "assistant_masks"):
            if name in padded and padding:
                is_left = (padding_side or self.padding_side) == "left"
                padded[name] = padding + padded[name] if is_left else padded[name] + padding
        return padded

    def _with_query(self, query: str, history: Any, role: str, model_version: str) -> list[dict[str, Any]]:
        query_message = {"role": role, "content": query}
        return normalize_messages(history, model_version) + normalize_messages([query_message], model_version)

    def _control_ids(self, model_version: str) -> dict[str, int]:
        first = self._tokenizer.token_to_id(CONTROL_TOKENS[model_version][0])
        return {token: first + index for index, token in enumerate(CONTROL_TOKENS[model_version])}

    def _special_ids(self, model_version: str) -> dict[str, int]:
        return {**self._control_ids(model_version), "</s>": self._tokenizer.token_to_id("</s>")}

    def _control_flags(self) -> dict[str, bool]:
        """The special tokens of the published vocabulary, and whether they are kept out of text."""
        readable = ROLE_TOKENS if self.encode_special_tokens else ()
        tokens = dict.fromkeys((*NAMED_TOKENS.values(), *CONTROL_TOKENS[self.model_version]))
        return {token: token not in readable for token in tokens}

    def _register_control_tokens(self) -> None:
        tokens = [_added_token(token, special) for token, special in self._control_flags().items()]
        self._tokenizer.add_tokens(tokens)
        control_tokens = CONTROL_TOKENS[self.model_version]
        # `add_special_tokens` replaces this list by default, but these tokens do not go away.
        self.extra_special_tokens = list(dict.fromkeys((*control_tokens, *self.extra_special_tokens)))
        self._message_tokenizer = None

    def _special_texts(self, skip_special_tokens: bool, model_version: str) -> dict[int, str]:
        """What ids give when decoded that are no pieces."""
        control_ids = self._control_ids(model_version)
        silent = [self._tokenizer.token_to_id(token) for token in NAMED_TOKENS.values()]
        # CODEPATH: chatglm2 writes none of its control tokens; chatglm3 writes their names.
        if skip_special_tokens or model_version == "chatglm2":
            silent += control_ids.values()
        if skip_special_tokens:
            silent += self.all_special_ids
        texts = {index: token.content for index, token in self.added_tokens_decoder.items()}
        return texts | {index: token for token, index in control_ids.items()} | dict.fromkeys(silent, "")

    def _text_tokenizer(self) -> Tokenizer:
        """A Rust tokenizer for the text of messages. It shares the vocabulary, but none of the per-call settings."""
        tokenizer = self._message_tokenizer
        if tokenizer is None:
            special = {*self.all_special_tokens, *self._control_flags()}
            added_tokens = [token for _, token in sorted(self.added_tokens_decoder.items())]
            tokenizer = _rust_tokenizer(self._tokenizer.model)
            tokenizer.add_tokens([_added_token(token, token.content in special) for token in added_tokens])
            tokenizer.encode_special_tokens = True
            self._message_tokenizer = tokenizer
        return tokenizer

    def _encode_segments(self, segments: Sequence[Segment], model_version: str) -> tuple[list[int], list[int]]:
        special_ids = self._special_ids(model_version)
        tokenizer = self._text_tokenizer()
        ids, mask = [], []
        for segment in segments:
            if segment.is_special:
                ids.append(special_ids[segment.text])
                mask.append(int(segment.is_answer))
                continue
            encoding = tokenizer.encode(segment.text, add_special_tokens=False)
            ids += encoding.ids
            for start, end in encoding.offsets:
                is_inside = any(start < last and end > first for first, last in segment.answer_spans)
                mask.append(int(segment.is_answer or is_inside))
        return ids, mask


class PieceTokenizer:
    """What published code finds as `tokenizer.tokenizer`: the vocabulary, where nothing is added to a text.

    All else is the tokenizer's own, because libraries take the attribute `tokenizer` of a processor for the tokenizer.
    """

    def __init__(self, owner: ChatGLMTokenizer) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        if name == "_owner":
            raise AttributeError(name)
        return getattr(self._owner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        return self._owner(*args, **kwargs)

    @property
    def n_words(self) -> int:
        """The number of ids."""
        return self._owner.vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the control tokens, and of `<s>`, `</s>` and `<unk>` under their published names."""
        owner = self._owner
        named = {name: owner.convert_tokens_to_ids(token) for name, token in COMMAND_NAMES.items()}
        return owner._control_ids(owner.model_version) | named

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, with `<s>` before and `</s>` behind it if asked for."""
        first, last = [self.special_tokens["<bos>"]] * bos, [self.special_tokens["<eos>"]] * eos
        return first + self._owner.encode(text, add_special_tokens=False) + last


def _check_model_version(model_version: str) -> str:
    if model_version not in CONTROL_TOKENS:
        raise ValueError(
            f"`model_version` must be one of {tuple(CONTROL_TOKENS)} for this tokenizer, got {model_version!r}."
        )
    return model_version


def _resolve_model_version(model_version: str | None, folder: Path) -> str:
    if model_version is None and (config := folder / "config.json").is_file():
        model_version = infer_model_version(json.loads(config.read_text(encoding="utf-8")))
    if model_version is None:
        model_version = DEFAULT_MODEL_VERSION
        logger.warning_once(
            f"Nothing beside the tokenizer tells ChatGLM2 from ChatGLM3, so {model_version} is assumed. "
            'Set `"model_version": "chatglm2"` or `"chatglm3"` in tokenizer_config.json to settle it.'
        )
    return _check_model_version(model_version)


def _missing_vocabulary(folder: Path) -> str:
    if (folder / "ice_text.model").is_file():
        return f"{folder} holds `ice_text.model`, the vocabulary of ChatGLM-6B, which this tokenizer does not read."
    return (
        f"{folder} holds no `tokenizer.model`. Copy it from the published checkpoint; the tokenizer is made from it."
    )


def _extra_tokens(kwargs: dict[str, Any]) -> list[str]:
    """The special tokens in what any version of the library saved; taken out of `kwargs`."""
    saved = [*(kwargs.pop("extra_special_tokens", None) or ()), *(kwargs.pop("additional_special_tokens", None) or ())]
    return [token["content"] if isinstance(token, dict) else str(token) for token in saved]


def _rust_tokenizer(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # For programs that decode with the Rust tokenizer itself; `decode` is the exact way.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _added_token(token: str | AddedToken, special: bool) -> AddedToken:
    token = AddedToken(token) if isinstance(token, str) else token
    return AddedToken(
        token.content,
        # `sop` and `eop` are names that also occur inside words.
        single_word=token.single_word or token.content in ("sop", "eop"),
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        # A normalized one would begin with SentencePiece's leading space, and be found where a word begins only.
        normalized=False,
        special=special,
    )


__all__ = ["ChatGLMTokenizer"]

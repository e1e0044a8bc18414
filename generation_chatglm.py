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
"""What `chat` means: conversations on top of the library's `generate`.

What is unusual here:

- The whole conversation is encoded anew in every turn. Of a cache from an earlier turn, what is common with the new
  prompt is used: a reused cache never changes an answer.
- Only stop tokens are removed from an answer, so one that was cut off by `max_length` is returned whole.
- Arguments by position come in the order of the generation's published methods (`ConversationFormat.chat_arguments`).
- PEFT keeps a soft prompt (prompt tuning, prefix tuning, P-tuning) outside of the model. `chat` and its relatives are
  therefore given to PEFT's model too, where they generate with the soft prompt.
"""

import copy
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import BatchEncoding, GenerationConfig, GenerationMixin, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, TopPLogitsWarper

from .conversation_chatglm import ConversationFormat, conversation_format
from .generation_cache import ConversationCache
from .generation_published import (
    drop_unknown_settings,
    refuse_unknown_settings,
    takes_published_order,
    unpack_encoding,
)
from .generation_streaming import stream_ids


# Tokens that a static cache has room for at least.
LEAST_STATIC_LENGTH = 512

History = list[tuple[str, str]] | list[dict[str, Any]]
# A text; for GLM-4V also parts of a content, or a message of its own.
Query = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


class NotANumberCheck(LogitsProcessor):
    """Stop with an explanation where sampling would fail or, worse, go on with a random token."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if torch.isnan(scores).any():
            raise ValueError(
                f"The model's scores are not numbers while computing in {self.dtype}. float16 overflows easily: load "
                "the model with `dtype=torch.bfloat16` or `torch.float32`. If it stays, the weights are damaged."
            )
        return scores


class QuickTopP(TopPLogitsWarper):
    """Top-p as the library does it, without sorting a whole vocabulary, which takes milliseconds on a CPU."""

    NUM_CANDIDATES = 256

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        num_candidates = min(max(self.NUM_CANDIDATES, self.min_tokens_to_keep), scores.shape[-1])
        best, best_ids = scores.topk(num_candidates, dim=-1)
        probabilities = (best - scores.logsumexp(dim=-1, keepdim=True)).exp()
        cumulative = probabilities.cumsum(dim=-1)
        if (cumulative[..., -1] < self.top_p).any():
            return super().__call__(input_ids, scores)  # The probability is spread over more tokens than these.
        is_dropped = cumulative - probabilities >= self.top_p
        is_dropped[..., : self.min_tokens_to_keep] = False
        best = best.masked_fill(is_dropped, self.filter_value)
        return torch.full_like(scores, self.filter_value).scatter(-1, best_ids, best)


def as_token_ids(value: Any) -> list[int]:
    """`eos_token_id` in any of its forms, an id or several, of Python, NumPy or torch, as a list."""
    ids = value.tolist() if hasattr(value, "tolist") else [] if value is None else value
    try:
        return [operator.index(token_id) for token_id in (ids if isinstance(ids, (list, tuple, set)) else [ids])]
    except TypeError:
        raise TypeError(f"`eos_token_id` must be an id or a list of ids, got {value!r}.") from None


def explicit_settings(generation_config: GenerationConfig | None) -> dict[str, Any]:
    """What a generation config says, as arguments for `generate`, which warns if it gets both."""
    if generation_config is None:
        return {}
    if not isinstance(generation_config, GenerationConfig):
        raise TypeError(f"`generation_config` must be a GenerationConfig, got {type(generation_config).__name__}.")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    return {name: value for name, value in vars(generation_config).items() if name in known and value is not None}


def round_cache_length(num_tokens: int) -> int:
    """The length of a static cache: compiled code is for one length, which turns of a conversation share."""
    return max(1 << (num_tokens - 1).bit_length(), LEAST_STATIC_LENGTH)


def has_soft_prompt(model: nn.Module) -> bool:
    """Whether this is PEFT's model with a soft prompt, around one of ours."""
    return hasattr(type(model), "get_prompt") and isinstance(model.base_model, ChatGLMGenerationMixin)


@dataclass
class Turn:
    """What `chat` and `stream_chat` need to answer one message; some settings go without writing a cache."""

    messages: list[dict[str, Any]]
    prompt_ids: list[int]
    settings: dict[str, Any]
    cache: ConversationCache | None
    written_cache: ConversationCache | None
    # What the cache holds of the prompt: its ids, and a name for a picture in each of its places.
    cached_names: list[Any]


class ChatGLMGenerationMixin(GenerationMixin):
    """`generate` with early errors, and `chat`, `stream_chat`, `batch_chat` and `stream_generate` on top of it."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as `GenerationMixin.generate` does, after checking the prompt. `temperature=0` decodes greedily.

        The prompt may be what a tokenizer returned, such as `apply_chat_template(..., return_tensors="pt")`.

        Raises:
            ValueError: for an empty prompt, ids outside the vocabulary, a prompt longer than the model's positions, a
                cache that the settings do not allow for, and for scores that are not numbers.
        """
        inputs, kwargs = unpack_encoding(inputs, kwargs)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            # With pictures, the ids were checked before those made them longer.
            if kwargs.get("pictures") is None:
                self._check_prompt(input_ids, kwargs.get("position_ids"))
            if kwargs.get("attention_mask") is None:
                # `<unk>` and padding share the id 0, so the library would take an `<unk>` of the prompt for padding.
                kwargs["attention_mask"] = torch.ones_like(input_ids)
        self._check_cache_settings(generation_config, kwargs)
        if "eos_token_id" in kwargs:
            kwargs["eos_token_id"] = as_token_ids(kwargs["eos_token_id"]) or None
        self._check_chunked_prefill(generation_config, kwargs)
        # CODEPATH: chatglm-6b, glm and glm-130b; the others are causal.
        if self.config.is_bidirectional:
            num_tokens = None
            if input_ids is not None and kwargs.get("past_key_values") is None:
                num_tokens = input_ids.shape[-1]
            kwargs["attention_mask"] = self.as_padding_mask(kwargs.get("attention_mask"), num_tokens)
            # Under their own name, the library would count both rows on, and repeat the second dimension for beams.
            kwargs["prompt_position_ids"] = kwargs.pop("position_ids", None)
        if kwargs.get("temperature") == 0 or kwargs.get("do_sample") is False:
            # `None` also silences what a generation_config.json says about sampling. Contrastive search has a use for it.
            kwargs.update(do_sample=False, temperature=None, top_p=None)
            if not kwargs.get("penalty_alpha"):
                kwargs["top_k"] = None
        if kwargs.get("max_length") is None and self._setting("max_new_tokens", kwargs, generation_config) is None:
            kwargs.pop("max_length", None)
        logits_processor = LogitsProcessorList([*(logits_processor or []), NotANumberCheck(self.dtype)])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def _setting(self, name: str, kwargs: dict[str, Any], generation_config: GenerationConfig | None = None) -> Any:
        """A setting as the library finds it: the argument, then the caller's configuration, then the model's."""
        if name in kwargs:
            return kwargs[name]
        value = getattr(generation_config, name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    def _is_assisted(self, kwargs: dict[str, Any], generation_config: GenerationConfig | None = None) -> bool:
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        return any(self._setting(name, kwargs, generation_config) not in (None, False) for name in names)

    def _check_prompt(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> None:
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
            found = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"The prompt must be a tensor of at least one id, [batch, seq]; got {found}.")
        lowest, highest = input_ids.min().item(), input_ids.max().item()
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"The prompt holds the id {lowest if lowest < 0 else highest}, outside the vocabulary of "
                f"{self.config.vocab_size} ids. Was it encoded with another model's tokenizer?"
            )
        num_tokens = input_ids.shape[1]
        # CODEPATH: glm, whose earlier answers stand where their blanks do and take no positions of their own.
        if self.config.learned_positions and position_ids is not None:
            num_tokens = int(position_ids[..., :num_tokens].max()) + 1
        if num_tokens > self.config.max_prompt_length:
            raise ValueError(
                f"The prompt has {num_tokens} tokens, more than the {self.config.max_prompt_length} "
                "positions of this model (`seq_length` in its config.json). Shorten the history or the query."
            )

    def _check_cache_settings(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        if not isinstance(cache := kwargs.get("past_key_values"), Cache):
            return
        if self._setting("use_cache", kwargs, generation_config) is False:
            raise ValueError("`past_key_values` cannot be used with `use_cache=False`. Leave one of the two out.")
        # The library would compute the whole prompt once more and append it to what the cache holds.
        if self._is_assisted(kwargs, generation_config) and cache.is_initialized and cache.get_seq_length() > 0:
            raise ValueError(
                "An assistant or prompt lookup cannot continue `past_key_values` that hold tokens already. Pass an empty "
                "cache, or leave `past_key_values` or the assistant out."
            )

    def _check_chunked_prefill(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        chunk_size, cache = (
            self._setting("prefill_chunk_size", kwargs, generation_config),
            kwargs.get("past_key_values"),
        )
        # CODEPATH: chatglm-6b, glm and glm-130b; the others are causal.
        if chunk_size is not None and self.config.is_bidirectional:
            raise ValueError(
                "`prefill_chunk_size` cannot be used with ChatGLM-6B and the older GLM: their context is bidirectional, "
                "so no part of it can be computed before the whole is there."
            )
        # CODEPATH: checkpoints with a P-tuning prefix; no published base model has one.
        if (
            chunk_size is not None
            and self.config.pre_seq_len is not None
            and cache is not None
            and cache.is_initialized
        ):
            raise ValueError(
                f"`prefill_chunk_size={chunk_size}` cannot continue `past_key_values` with a P-tuning prefix "
                "(`pre_seq_len`), which the library would take for tokens. Leave one of the two out."
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        # A private hook (Transformers 5.17 to 5.23), the only place that knows the length of a static cache.
        prefix_length = self.config.pre_seq_len or 0
        max_cache_length += prefix_length
        if "static" in (generation_config.cache_implementation or ""):
            longest = max(self.config.max_position_embeddings + prefix_length, max_cache_length)
            max_cache_length = min(round_cache_length(max_cache_length), longest)
        if generation_config.compile_config is not None:
            # The library leaves processors out, unless its configuration says this in a private attribute.
            generation_config.compile_config = copy.copy(generation_config.compile_config)
            generation_config.compile_config._compile_all_devices = True
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # A private hook (Transformers 5.17 to 5.23), the only place that sees the library's processors in their order.
        processors = super()._get_logits_processor(*args, **kwargs)
        for index, processor in enumerate(processors if self._input_device().type == "cpu" else ()):
            if type(processor) is TopPLogitsWarper:
                settings = (processor.top_p, processor.filter_value, processor.min_tokens_to_keep)
                processors[index] = QuickTopP(*settings)
        return processors

    def as_padding_mask(
        self, attention_mask: torch.Tensor | None, num_tokens: int | None = None
    ) -> torch.Tensor | None:
        """A mask in the form of the tokenizer as `[batch, seq]`, 1 for real tokens; the last `num_tokens` of them."""
        return attention_mask

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, for the causal generations; `generate_batch` begins with this.

        Raises:
            ValueError: for ChatGLM-6B and the older GLM, whose bidirectional context it would lose, and with a P-tuning
                prefix.
        """
        reason = None
        if self.config.pre_seq_len is not None:
            reason = "a P-tuning prefix (`pre_seq_len`): its paged cache starts every request empty"
        elif self.config.is_bidirectional:
            reason = "ChatGLM-6B and the older GLM: its paged attention would drop the mask of the bidirectional context silently"
        if reason is not None:
            raise ValueError(
                f"`generate_batch` cannot be used with {reason}. Use `generate` with a padded batch, or `batch_chat`."
            )
        return super().init_continuous_batching(*args, **kwargs)

    @takes_published_order("chat_arguments")
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: Query,
        history: History | None = None,
        role: str = "user",
        *,
        image: Any = None,
        past_key_values: ConversationCache | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Answer one message of a conversation.

        Args:
            tokenizer: the `ChatGLMTokenizer` of the checkpoint.
            query: the new message: a text, parts of a content, or a message dict.
            history: the conversation so far, pairs of query and answer or message dicts; it is not changed.
            role: who says `query`: `"user"`, `"system"` or `"observation"`.
            image: GLM-4V: a picture of the new message. One of an earlier message is in the history.
            past_key_values: the cache that an earlier turn returned; the same answer comes faster. Only one call at a
                time can use it.
            return_past_key_values: return that cache as a third value.
            kwargs: anything `generate` takes. `max_length` counts the prompt; `temperature=0` decodes greedily. By
                position, arguments come in the published order: `chat_format.chat_arguments`.

        Returns:
            The answer (text, or a dict for a tool call) and the new history, in the form of the generation: pairs
            for ChatGLM2, dicts for ChatGLM3.

        Raises:
            ValueError: for an unknown role or argument, a malformed history, a prompt that is too long, or a cache in
                use.
        """
        refuse_unknown_settings(self._inner_model(), kwargs)
        cached = (past_key_values, return_past_key_values)
        messages = self._next_messages(query, history, role, image)
        turn = self._prepare_turn(tokenizer, messages, cached, kwargs, has_soft_prompt(self))
        prompt = torch.tensor([turn.prompt_ids], device=self._input_device())
        outputs = (self.generate(ids, past_key_values=turn.written_cache, **turn.settings) for ids in [prompt])
        [answer] = self._read_answers(tokenizer, turn, outputs, return_past_key_values)
        return answer

    @takes_published_order("stream_chat_arguments")
    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: Query,
        history: History | None = None,
        role: str = "user",
        *,
        image: Any = None,
        past_key_values: ConversationCache | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Generator[tuple[Any, ...], None, None]:
        """Answer as [`chat`] does, yielding the answer so far after every token.

        The arguments are read and checked at once; the work begins with the first `next`. The last yield equals what
        `chat` returns. Closing the iterator stops the work. A returned cache may be handed to the next turn once the
        iterator has ended. Arguments that nothing knows are dropped with a warning.
        """
        kwargs = drop_unknown_settings(self._inner_model(), kwargs)
        cached = (past_key_values, return_past_key_values)
        messages = self._next_messages(query, history, role, image)
        turn = self._prepare_turn(tokenizer, messages, cached, kwargs, has_soft_prompt(self))
        prompt = torch.tensor([turn.prompt_ids], device=self._input_device())
        outputs = self.stream_generate(prompt, past_key_values=turn.written_cache, **turn.settings)
        return self._read_answers(tokenizer, turn, outputs, return_past_key_values)

    def _read_answers(
        self, tokenizer: PreTrainedTokenizerBase, turn: Turn, outputs: Generator[Any, None, None], returns_cache: bool
    ) -> Generator[tuple[Any, ...], None, None]:
        """Yield an answer for each output, `[1, prompt + answer]`, and keep the books of the cache."""
        cache, answer, new_ids = turn.written_cache, None, list[int]()
        growing, text, is_stopped = tokenizer.growing_text(self.chat_format), "", False
        stop_ids = set(turn.settings["eos_token_id"] or ())
        is_continued = not self._is_assisted(turn.settings)
        with nullcontext() if cache is None else cache.turn(self, turn.cached_names, is_continued):
            try:
                with closing(outputs):
                    for output_ids in outputs:
                        for token_id in output_ids[0, len(turn.prompt_ids) + len(new_ids) :].tolist():
                            new_ids.append(token_id)
                            is_stopped = is_stopped or token_id in stop_ids
                            text = text if is_stopped else growing.add(token_id)
                        answer = (*self._read(text, turn.messages), *([turn.cache] if returns_cache else []))
                        # Half a character shows as U+FFFD until its last byte arrives.
                        if text and not text.endswith("\ufffd"):
                            yield answer
                            answer = None
            finally:
                if cache is not None:
                    cache.token_ids = [*turn.cached_names, *new_ids][: cache.get_num_tokens()]
        if answer is not None:
            yield answer

    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[Query],
        histories: list[History | None] | None = None,
        role: str = "user",
        **kwargs: Any,
    ) -> tuple[list[Any], list[History]]:
        """Answer several conversations in one batch; see [`chat`].

        Returns:
            The answers and the new histories, in the order of `queries`.
        """
        if isinstance(queries, (str, Mapping)) or not queries:
            raise ValueError(f"`queries` must be a list of at least one message, got {queries!r}.")
        for name in ("past_key_values", "return_past_key_values"):
            if kwargs.pop(name, None):
                raise ValueError(f"`{name}` belongs to one conversation; use it with `chat`.")
        refuse_unknown_settings(self._inner_model(), kwargs)
        histories = [None] * len(queries) if histories is None else histories
        if len(histories) != len(queries):
            raise ValueError(f"Got {len(queries)} queries but {len(histories)} histories; give one for each query.")
        batch = [self._next_messages(query, history, role) for query, history in zip(queries, histories)]
        images = self._encode_pictures(tokenizer, [message for messages in batch for message in messages])
        prompts = [tokenizer.encode_conversation(messages, chat_format=self.chat_format) for messages in batch]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs, prompt_length = inputs.to(self._input_device()), max(map(len, prompts))
        settings = self._chat_settings(tokenizer, kwargs, prompt_length)
        # Without any stop token the library would let rows go on that a stop string has ended. No model writes this one.
        settings["eos_token_id"] = settings["eos_token_id"] or [self.config.vocab_size]
        output_ids = self.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **images, **settings)
        pad_ids = as_token_ids(self._setting("pad_token_id", settings))[:1] if len(queries) > 1 else []
        answers = []
        for new_ids, messages in zip(output_ids[:, prompt_length:].tolist(), batch):
            # A row that a stop string ended has no stop token before its padding.
            while new_ids and new_ids[-1] in pad_ids:
                new_ids.pop()
            answers.append(self._read(self._decode(tokenizer, new_ids, settings["eos_token_id"]), messages))
        return [response for response, _ in answers], [history for _, history in answers]

    def stream_generate(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Generator[Any, None, None]:
        """Generate as `generate` does, yielding all ids so far, `[batch, seq]`, after every token.

        The arguments are checked at once; the work begins with the first `next`.

        Args:
            input_ids: the prompt, `[batch, seq]`, or what a tokenizer returned.
            return_past_key_values: yield pairs of ids and the cache, which is one object that keeps growing.
            kwargs: anything `generate` takes. What nothing knows is dropped with a warning.

        Raises:
            ValueError: for a bad prompt, and for beams, several sequences of one prompt and a `streamer`, which cannot
                be streamed.
        """
        _, kwargs = unpack_encoding(input_ids, drop_unknown_settings(self._inner_model(), kwargs))
        input_ids = kwargs.pop("input_ids", input_ids)
        self._check_prompt(input_ids, kwargs.get("position_ids"))
        self._check_streamable(generation_config, kwargs)
        if return_past_key_values and has_soft_prompt(self):
            raise ValueError("PEFT keeps the cache of a soft prompt to itself: leave `return_past_key_values` out.")
        if return_past_key_values and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = DynamicCache(config=self.config)
        arguments = (input_ids, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn)
        cache = kwargs["past_key_values"] if return_past_key_values else None
        return stream_ids(partial(self.generate, *arguments, **kwargs), input_ids, cache)

    def _check_streamable(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
        for name, allowed in (("streamer", None), ("num_beams", 1), ("num_return_sequences", 1)):
            if (value := self._setting(name, kwargs, generation_config)) not in (None, allowed):
                raise ValueError(f"`{name}={value!r}` cannot be streamed; use `generate` or `chat`.")

    def process_response(self, output: str, history: History | None = None) -> Any:
        """Read an answer of the model: `process_response(text)`, or with the conversation as ChatGLM3 and GLM-4 do.

        Args:
            output: what the model wrote, decoded.
            history: the conversation up to the question, if the new one is wanted; it is not changed.

        Returns:
            The answer as `chat` returns it. With a history, a pair of it and the new history.
        """
        messages = self.chat_format.normalize_messages(history)
        response, new_history = self._read(output, messages)
        return response if history is None else (response, new_history)

    def build_inputs(
        self, tokenizer: PreTrainedTokenizerBase, query: Query, history: History | None = None
    ) -> BatchEncoding:
        """What `chat` gives the model to read, on its device: the whole conversation, ending with `query`."""
        messages = self._next_messages(query, history, "user")
        prompt_ids = tokenizer.encode_conversation(messages, chat_format=self.chat_format)
        inputs = tokenizer.pad({"input_ids": [prompt_ids]}, return_tensors="pt")
        inputs.update(self._encode_pictures(tokenizer, messages))
        return inputs.to(self._input_device())

    def build_stream_inputs(
        self, tokenizer: PreTrainedTokenizerBase, query: Query, history: History | None = None
    ) -> BatchEncoding:
        """The same as `build_inputs`. A cache is continued with the whole conversation, not with its last round."""
        return self.build_inputs(tokenizer, query, history)

    def _inner_model(self) -> Any:
        """This model, or the one inside of PEFT's for a soft prompt."""
        return self.base_model if has_soft_prompt(self) else self

    def _input_device(self) -> torch.device:
        # An embedding that is offloaded is on the meta device until it is used; its hook moves the ids.
        return self.device if self.device.type != "meta" else torch.device("cpu")

    @property
    def chat_format(self) -> ConversationFormat:
        """How this generation writes a conversation down and reads an answer back."""
        return conversation_format(self.config.model_version)

    def _next_messages(
        self, query: Query, history: History | None, role: str, image: Any = None
    ) -> list[dict[str, Any]]:
        if isinstance(query, Mapping):
            message: dict[str, Any] = {"role": role, **query}
        elif isinstance(query, (str, list, tuple)):
            message = {"role": role, "content": query}
        else:
            raise TypeError(f"`query` must be a string, parts or a message, got {type(query).__name__}: {query!r}.")
        if image is not None:
            if message.get("image") is not None:
                raise ValueError("The picture was given twice: in the message and as `image`. Give it once.")
            message["image"] = image
        normalized = self.chat_format.normalize_messages([message])
        return self.chat_format.normalize_messages([*self.chat_format.normalize_messages(history), *normalized])

    def _encode_pictures(
        self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """The pictures of messages as an argument of `generate`; nothing if there are none."""
        pictures = [message["image"] for message in messages if "image" in message]
        if not pictures:
            return {}
        self._inner_model().check_eyes()
        if has_soft_prompt(self):
            raise ValueError(
                "A soft prompt of PEFT does not go with pictures. Use LoRA, or P-tuning v2 (`pre_seq_len`)."
            )
        return {"images": tokenizer.encode_pictures(pictures)}

    def name_cached_tokens(self, prompt_ids: list[int], images: torch.Tensor | None) -> list[Any]:
        """What a reused cache holds of a prompt: the ids."""
        return prompt_ids

    def _prepare_turn(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[dict[str, Any]],
        cached: tuple[ConversationCache | None, bool],
        kwargs: dict[str, Any],
        has_soft_prompt: bool,
    ) -> Turn:
        prompt_ids = tokenizer.encode_conversation(messages, chat_format=self.chat_format)
        images = self._encode_pictures(tokenizer, messages)
        settings = self._chat_settings(tokenizer, kwargs, len(prompt_ids)) | images
        cache, is_returned = cached
        if cache is not None and not hasattr(cache, "turn"):
            raise TypeError(
                "`past_key_values` must be the cache that `chat` or `stream_chat` returned, which knows its tokens; "
                f"got {type(cache).__name__}."
            )
        # CODEPATH: chatglm-6b, where a new question changes what the whole bidirectional context computes.
        if self.config.prefix_lm:
            cache = None
        if cache is None and is_returned:
            cache = ConversationCache(config=self.config)
        is_unused = has_soft_prompt or self._setting("use_cache", settings) is False or "custom_generate" in settings
        written_cache = None if is_unused else cache
        if written_cache is not None and (self._setting("num_beams", settings) or 1) > 1:
            raise ValueError("A cache of several beams cannot be kept for the next turn: leave `num_beams` at 1.")
        names = self.name_cached_tokens(prompt_ids, images.get("images"))
        return Turn(messages, prompt_ids, settings, cache, written_cache, names)

    def _chat_settings(
        self, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], prompt_length: int
    ) -> dict[str, Any]:
        """What `generate` is given: the caller's arguments, then their generation config, then the published defaults."""
        given = explicit_settings(kwargs.pop("generation_config", None))
        if kwargs.get("max_length") is not None:
            given.pop("max_new_tokens", None)
        defaults = {
            "eos_token_id": tokenizer.stop_token_ids(self.chat_format),
            "pad_token_id": tokenizer.pad_token_id,
            "do_sample": True,
            **self.chat_format.chat_defaults,
        }
        positions = self.config.max_position_embeddings
        published = defaults.pop("max_length", positions)
        settings = {**defaults, **given, **kwargs, "tokenizer": tokenizer, "return_dict_in_generate": False}
        settings["eos_token_id"] = as_token_ids(settings["eos_token_id"]) or None
        # Of the two limits one is None, so that a generation_config.json changes neither.
        if settings.setdefault("max_new_tokens", None) is not None:
            settings["max_length"] = None
        elif settings.get("max_length") is None:
            # The published limit, unless it leaves no room for an answer.
            settings["max_length"] = min(published, positions) if prompt_length < published else positions
        elif settings["max_length"] <= prompt_length:
            raise ValueError(
                f"`max_length={settings['max_length']}` counts the prompt, whose {prompt_length} tokens leave no room for an "
                "answer. Raise `max_length`, give `max_new_tokens` instead, or shorten the history."
            )
        if (num_answers := self._setting("num_return_sequences", settings)) not in (None, 1):
            raise ValueError(f"A conversation has one answer: `num_return_sequences` is {num_answers}.")
        return settings

    def _decode(self, tokenizer: PreTrainedTokenizerBase, new_ids: list[int], stop_ids: list[int] | None) -> str:
        """The text before the first stop token; a batch fills what follows it with padding."""
        stops = (index for index, token_id in enumerate(new_ids) if token_id in (stop_ids or ()))
        return tokenizer.decode(new_ids[: next(stops, None)], chat_format=self.chat_format)

    def _read(self, text: str, messages: list[dict[str, Any]]) -> tuple[Any, History]:
        response, new_messages = self.chat_format.read_answer(text, messages)
        return response, self.chat_format.native_history(messages + new_messages)


def refuse(message: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(message)


def give_chat_to_soft_prompts(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
    """Give PEFT's model for soft prompts a `chat` of its own.

    PEFT would hand out the method of the model inside, which knows nothing of the soft prompt.
    """
    if name != "base_model" or not isinstance(module, ChatGLMGenerationMixin) or not hasattr(wrapper, "get_prompt"):
        return
    message = (
        "`generate_batch` would ignore the soft prompt of PEFT. Use `generate` with a padded batch, or `batch_chat`."
    )
    for method in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        setattr(wrapper, method, partial(refuse, message))
    message = (
        "ChatGLM-6B and the older GLM cannot have a soft prompt of PEFT: their positions are read off the ids, which PEFT "
        "replaces by embeddings. Use LoRA, or P-tuning v2 (`pre_seq_len`)."
    )
    for method in ("chat", "stream_chat", "batch_chat", "stream_generate"):
        lent = partial(getattr(type(module), method), wrapper)
        # CODEPATH: chatglm-6b, glm and glm-130b; the others take embeddings as they come.
        setattr(wrapper, method, partial(refuse, message) if module.config.is_bidirectional else lent)


register_module_module_registration_hook(give_chat_to_soft_prompts)


__all__ = ["ChatGLMGenerationMixin", "ConversationCache"]

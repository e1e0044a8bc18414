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

- The whole conversation is encoded anew in every turn. A cache kept from the turn before holds the ids it was made
  from, and only its common beginning with the new ids is used: a reused cache never changes an answer.
- Streaming runs `generate` in a thread that hands tokens over as they come. Closing the iterator stops the thread.
- Only stop tokens are removed from an answer, so one that was cut off by `max_length` is returned whole.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from .conversation_chatglm import ConversationFormat, conversation_format


History = list[tuple[str, str]] | list[dict[str, Any]]


class ConversationCache(DynamicCache):
    """A cache that knows which tokens it holds, so that the next turn can tell how much of it still applies."""

    def __init__(self, *args: Any, prefix_encoder: torch.nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_ids: list[int] = []
        # A stream that has not ended is still writing.
        self.is_busy = False
        # Of P-tuning v2: what comes before all tokens.
        self.prefix_encoder = prefix_encoder

    def get_num_tokens(self) -> int:
        """How many tokens it holds; a prefix of P-tuning v2 is no token."""
        prefix_length = 0 if self.prefix_encoder is None else self.prefix_encoder.pre_seq_len
        return max(self.get_seq_length() - prefix_length, 0)

    def keep_common_prefix(self, token_ids: list[int]) -> None:
        """Drop everything from the first token on that differs from `token_ids`, and always the last one of them."""
        length = 0
        for held, wanted in zip(self.token_ids, token_ids[:-1]):
            if held != wanted:
                break
            length += 1
        self.crop(length - self.get_num_tokens())
        self.token_ids = token_ids[:length]


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


class StopEvent(StoppingCriteria):
    """Stops all rows as soon as an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full(input_ids.shape[:1], self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class QueueStreamer(BaseStreamer):
    """Puts new tokens, `[batch]` at a time, into a queue; the prompt, which comes first, is left out."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[torch.Tensor | BaseException | None] = queue.SimpleQueue()
        self.batch_size: int | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.batch_size is None:
            self.batch_size = value.shape[0]
            return
        # Speculative decoding brings several tokens at once.
        for tokens in value.reshape(self.batch_size, -1).unbind(1):
            self.queue.put(tokens)

    def end(self) -> None:
        """The end is marked by the thread, which knows whether it was an error."""


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

        Raises:
            ValueError: for ids outside the vocabulary, for a prompt longer than the model's positions, and for
                scores that are not numbers.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and input_ids.numel() > 0:
            self._check_prompt(input_ids)
            if kwargs.get("attention_mask") is None and kwargs.get("inputs_embeds") is None:
                # `<unk>` and padding share the id 0, so the library would take an `<unk>` of the prompt for padding.
                kwargs["attention_mask"] = torch.ones_like(input_ids)
        generation_config_used = generation_config or self.generation_config
        if self.config.pre_seq_len is not None:
            self._check_prefix_support(generation_config_used, kwargs)
        # CODEPATH: chatglm-6b; the others are causal.
        if self.config.prefix_lm:
            self._prepare_prefix_lm(generation_config_used, kwargs)
        if kwargs.get("temperature") == 0 or kwargs.get("do_sample") is False:
            # `None` also silences what a generation_config.json says about sampling.
            kwargs.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        logits_processor = LogitsProcessorList([*(logits_processor or []), NotANumberCheck(self.dtype)])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def _check_prompt(self, input_ids: torch.LongTensor) -> None:
        lowest, highest = input_ids.min().item(), input_ids.max().item()
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"The prompt holds the id {lowest if lowest < 0 else highest}, outside the vocabulary of "
                f"{self.config.vocab_size} ids. Was it encoded with another model's tokenizer?"
            )
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens, more than the {self.config.max_position_embeddings} "
                "positions of this model (`seq_length` in its config.json). Shorten the history or the query."
            )

    def _check_prefix_support(self, generation_config: GenerationConfig, kwargs: dict[str, Any]) -> None:
        chunk_size = kwargs.get("prefill_chunk_size", generation_config.prefill_chunk_size)
        cache = kwargs.get("past_key_values")
        if chunk_size is not None and cache is not None and cache.is_initialized:
            raise ValueError(
                f"`prefill_chunk_size={chunk_size}` cannot continue `past_key_values` with a P-tuning prefix "
                "(`pre_seq_len`), which the library would take for tokens. Leave one of the two out."
            )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        # A private hook (Transformers 5.17 to 5.23), where alone the length of a static cache is known.
        max_cache_length += self.config.pre_seq_len or 0
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def as_padding_mask(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask in the form of the tokenizer as `[batch, seq]`, 1 for real tokens."""
        return attention_mask

    def _prepare_prefix_lm(self, generation_config: GenerationConfig, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"] = self.as_padding_mask(kwargs.get("attention_mask"))
        if kwargs.get("inputs_embeds") is None:
            # Read off the ids at every step; what the tokenizer returned holds for the first one only.
            kwargs.pop("position_ids", None)
        if kwargs.get("prefill_chunk_size", generation_config.prefill_chunk_size) is not None:
            raise ValueError(
                "`prefill_chunk_size` cannot be used with ChatGLM-6B: its context is bidirectional, so no part of it "
                "can be computed before the whole is there."
            )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, for the causal generations; `generate_batch` begins with this.

        Raises:
            ValueError: for ChatGLM-6B, whose bidirectional context it would lose, and with a P-tuning prefix.
        """
        if self.config.pre_seq_len is not None:
            raise ValueError(
                "`generate_batch` cannot be used with a P-tuning prefix (`pre_seq_len`): its paged cache starts every "
                "request empty. Use `generate` with a padded batch, or `batch_chat`."
            )
        if self.config.prefix_lm:
            raise ValueError(
                "`generate_batch` cannot be used with ChatGLM-6B: its paged attention would drop the mask of the "
                "bidirectional context silently. Use `generate` with a padded batch, or `batch_chat`."
            )
        return super().init_continuous_batching(*args, **kwargs)

    @torch.no_grad()
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        role: str = "user",
        *,
        past_key_values: ConversationCache | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Answer one message of a conversation.

        Args:
            tokenizer: the `ChatGLMTokenizer` of the checkpoint.
            query: the new message.
            history: the conversation so far, pairs of query and answer or message dicts; it is not changed.
            role: who says `query`: `"user"`, `"system"` or `"observation"`.
            past_key_values: the cache that an earlier turn returned; the same answer comes faster.
            return_past_key_values: return that cache as a third value.
            kwargs: anything `generate` takes. `max_length` counts the prompt; `temperature=0` decodes greedily.

        Returns:
            The answer (text, or a dict for a tool call) and the new history, in the form of the generation: pairs
            for ChatGLM2, dicts for ChatGLM3.

        Raises:
            ValueError: for an unknown role, a malformed history, or a prompt that is too long.
        """
        messages = self._next_messages(query, history, role)
        prompt_ids = self._encode(tokenizer, messages)
        cache = self._prepare_cache(past_key_values, return_past_key_values, prompt_ids)
        kwargs = self._chat_kwargs(tokenizer, kwargs)
        if cache is not None and (kwargs.get("num_beams") or 1) > 1:
            raise ValueError("A cache of several beams cannot be kept for the next turn: leave `num_beams` at 1.")
        input_ids = torch.tensor([prompt_ids], device=self._input_device())
        output_ids = self.generate(input_ids, past_key_values=cache, **kwargs)[0].tolist()
        if cache is not None:
            cache.token_ids = output_ids[: cache.get_num_tokens()]
        answer = self._read(self._decode(tokenizer, output_ids[len(prompt_ids) :], kwargs["eos_token_id"]), messages)
        return (*answer, cache) if return_past_key_values else answer

    @torch.no_grad()
    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        role: str = "user",
        *,
        past_key_values: ConversationCache | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Answer as [`chat`] does, yielding the answer so far after every token.

        The last yield equals what `chat` returns. Closing the iterator stops the work. A returned cache may be
        handed to the next turn once the iterator has ended.
        """
        messages = self._next_messages(query, history, role)
        prompt_ids = self._encode(tokenizer, messages)
        cache = self._prepare_cache(past_key_values, return_past_key_values, prompt_ids)
        kwargs = self._chat_kwargs(tokenizer, kwargs)
        stop_ids = kwargs["eos_token_id"]
        input_ids = torch.tensor([prompt_ids], device=self._input_device())
        output_ids, shown = prompt_ids, False
        if cache is not None:
            cache.is_busy = True
        try:
            with closing(self.stream_generate(input_ids, past_key_values=cache, **kwargs)) as stream:
                for step in stream:
                    output_ids = step[0].tolist()
                    new_ids = output_ids[len(prompt_ids) :]
                    text = self._decode(tokenizer, new_ids, stop_ids)
                    # Half a character shows as U+FFFD until its last byte arrives.
                    shown = text != "" and not text.endswith("\ufffd")
                    if shown:
                        answer = self._read(text, messages)
                        yield (*answer, cache) if return_past_key_values else answer
        finally:
            if cache is not None:
                cache.token_ids = output_ids[: cache.get_num_tokens()]
                cache.is_busy = False
        if not shown:
            answer = self._read(self._decode(tokenizer, output_ids[len(prompt_ids) :], stop_ids), messages)
            yield (*answer, cache) if return_past_key_values else answer

    @torch.no_grad()
    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        queries: list[str],
        histories: list[History | None] | None = None,
        role: str = "user",
        **kwargs: Any,
    ) -> tuple[list[Any], list[History]]:
        """Answer several conversations in one batch; see [`chat`].

        Returns:
            The answers and the new histories, in the order of `queries`.
        """
        if isinstance(queries, str) or not queries:
            raise ValueError(f"`queries` must be a list of at least one message, got {queries!r}.")
        for name in ("past_key_values", "return_past_key_values"):
            if kwargs.pop(name, None):
                raise ValueError(f"`{name}` belongs to one conversation; use it with `chat`.")
        histories = [None] * len(queries) if histories is None else histories
        if len(histories) != len(queries):
            raise ValueError(f"Got {len(queries)} queries but {len(histories)} histories; give one for each query.")
        batch = [self._next_messages(query, history, role) for query, history in zip(queries, histories)]
        prompts = [{"input_ids": self._encode(tokenizer, messages)} for messages in batch]
        inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(self._input_device())
        kwargs = self._chat_kwargs(tokenizer, kwargs)
        output_ids = self.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **kwargs)
        answers = [
            self._read(self._decode(tokenizer, new_ids, kwargs["eos_token_id"]), messages)
            for new_ids, messages in zip(output_ids[:, inputs["input_ids"].shape[1] :].tolist(), batch)
        ]
        return [response for response, _ in answers], [history for _, history in answers]

    @torch.no_grad()
    def stream_generate(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[torch.LongTensor | tuple[torch.LongTensor, Cache]]:
        """Generate as `generate` does, yielding all ids so far, `[batch, seq]`, after every token.

        Args:
            input_ids: the prompt, `[batch, seq]`.
            return_past_key_values: yield pairs of ids and the cache, which is one object that keeps growing.
            kwargs: anything `generate` takes.

        Raises:
            ValueError: for beams, several sequences of one prompt, and a `streamer`, which cannot be streamed.
        """
        self._check_streamable(generation_config or self.generation_config, kwargs)
        if return_past_key_values and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = DynamicCache(config=self.config)
        stopped = threading.Event()
        streamer = QueueStreamer()
        generate_kwargs = {
            "inputs": input_ids,
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": StoppingCriteriaList([*(stopping_criteria or []), StopEvent(stopped)]),
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            **kwargs,
            "streamer": streamer,
        }
        modes = self._modes_of_this_thread(input_ids.device.type)
        thread = threading.Thread(target=self._generate_into, args=(streamer, modes, generate_kwargs), daemon=True)
        thread.start()
        try:
            while (item := streamer.queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                input_ids = torch.cat([input_ids, item.to(input_ids.device)[:, None]], dim=-1)
                yield (input_ids, kwargs["past_key_values"]) if return_past_key_values else input_ids
        finally:
            stopped.set()
            thread.join()

    @staticmethod
    def _check_streamable(generation_config: GenerationConfig, kwargs: dict[str, Any]) -> None:
        for name, allowed in (("streamer", None), ("num_beams", 1), ("num_return_sequences", 1)):
            value = kwargs.get(name, getattr(generation_config, name, None))
            if value not in (None, allowed):
                raise ValueError(f"`{name}={value!r}` cannot be streamed; use `generate` or `chat`.")

    @staticmethod
    def _modes_of_this_thread(device_type: str) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Autocast and inference mode, which belong to a thread, for the one that `generate` is going to run in."""
        is_autocast = torch.is_autocast_enabled(device_type)
        autocast = torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), enabled=is_autocast)
        return autocast, torch.inference_mode(torch.is_inference_mode_enabled())

    def _generate_into(
        self,
        streamer: QueueStreamer,
        modes: tuple[AbstractContextManager, AbstractContextManager],
        generate_kwargs: dict[str, Any],
    ) -> None:
        try:
            with modes[0], modes[1]:
                self.generate(**generate_kwargs)
            streamer.queue.put(None)
        except BaseException as error:  # Whatever it is belongs to the caller, who waits at the queue.
            streamer.queue.put(error)

    def _input_device(self) -> torch.device:
        # An embedding that is offloaded is on the meta device until it is used; its hook moves the ids.
        return self.device if self.device.type != "meta" else torch.device("cpu")

    @property
    def chat_format(self) -> ConversationFormat:
        """How this generation writes a conversation down and reads an answer back."""
        return conversation_format(self.config.model_version)

    def _next_messages(self, query: str, history: History | None, role: str) -> list[dict[str, Any]]:
        if not isinstance(query, str):
            raise TypeError(f"`query` must be a string, got {type(query).__name__}: {query!r}.")
        messages = self.chat_format.normalize_messages(history)
        return messages + self.chat_format.normalize_messages([{"role": role, "content": query}])

    def _encode(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
        return tokenizer.encode_conversation(messages, chat_format=self.chat_format)

    def _prepare_cache(
        self, past_key_values: ConversationCache | None, is_returned: bool, prompt_ids: list[int]
    ) -> ConversationCache | None:
        prefix_encoder = self.base_model.prefix_encoder
        new_cache = ConversationCache(config=self.config, prefix_encoder=prefix_encoder)
        if past_key_values is None:
            return new_cache if is_returned else None
        if not hasattr(past_key_values, "keep_common_prefix"):
            raise TypeError(
                "`past_key_values` must be the cache that `chat` or `stream_chat` returned, because it knows which "
                f"tokens it holds; got {type(past_key_values).__name__}."
            )
        if past_key_values.is_busy:
            raise ValueError("`past_key_values` belongs to a stream that has not ended; exhaust or close it first.")
        if self.config.prefix_lm or past_key_values.prefix_encoder is not prefix_encoder:
            # A new question changes what the whole bidirectional context of ChatGLM-6B computes, and another prefix
            # what everything does.
            return new_cache
        past_key_values.keep_common_prefix(prompt_ids)
        return past_key_values

    def _chat_kwargs(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What `generate` is given: the caller's arguments, then his generation config, then the published defaults."""
        positions = self.config.max_position_embeddings
        defaults = {
            "eos_token_id": tokenizer.stop_token_ids(self.chat_format),
            "pad_token_id": tokenizer.pad_token_id,
            "do_sample": True,
            **self.chat_format.chat_defaults,
        }
        defaults["max_length"] = min(defaults.get("max_length", positions), positions)
        if (given := kwargs.get("generation_config")) is not None:
            defaults = {name: value for name, value in defaults.items() if getattr(given, name, None) is None}
            defaults["eos_token_id"] = given.eos_token_id or tokenizer.stop_token_ids(self.chat_format)
            if given.max_new_tokens is not None:
                defaults.pop("max_length", None)
        kwargs = {**defaults, **kwargs, "tokenizer": tokenizer, "return_dict_in_generate": False}
        if kwargs.get("max_new_tokens") is not None:
            kwargs.pop("max_length", None)
        elif "max_length" in kwargs:
            # Otherwise a generation_config.json with `max_new_tokens` would win.
            kwargs["max_new_tokens"] = None
        if kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError(
                f"A conversation has one answer: `num_return_sequences` is {kwargs['num_return_sequences']}."
            )
        if isinstance(kwargs["eos_token_id"], int):
            kwargs["eos_token_id"] = [kwargs["eos_token_id"]]
        return kwargs

    def _decode(self, tokenizer: PreTrainedTokenizerBase, new_ids: list[int], stop_ids: list[int] | None) -> str:
        """The text before the first stop token; a batch fills what follows it with padding."""
        stops = (index for index, token_id in enumerate(new_ids) if token_id in (stop_ids or ()))
        return tokenizer.decode(new_ids[: next(stops, None)], chat_format=self.chat_format)

    def _read(self, text: str, messages: list[dict[str, Any]]) -> tuple[Any, History]:
        response, new_messages = self.chat_format.read_answer(text, messages)
        return response, self.chat_format.native_history(messages + new_messages)


__all__ = ["ChatGLMGenerationMixin", "ConversationCache"]

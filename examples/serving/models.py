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
"""Which models are served, and under which names?

The folder is served by its name, an adapter by `folder:adapter`. Adapters share the weights of the folder: each has its
own modules around the same tensors, so requests to several of them may run at the same time.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from local_code import check_model_type, load_tokenizer, pick_device, pick_dtype, register
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from .answers import AnswerStream, Settings
from .engines import Engine, engine_for, with_same_weights
from .errors import RequestError
from .metrics import Metrics


@dataclass
class ServedModel:
    """A model with what generates its answers.

    Attributes:
        name: what requests call it.
        longest_prompt: tokens of a prompt at most, if that is less than the model takes.
        seconds: how long an answer may take.
        media_folder: whose files may be named as pictures; none if there is none.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    metrics: Metrics
    longest_prompt: int | None = None
    seconds: float = 600.0
    media_folder: Path | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def sees(self) -> bool:
        """Whether messages may have pictures."""
        return self.model.config.vision_config is not None

    @property
    def default_sampling(self) -> dict[str, float]:
        """`temperature` and `top_p` of a request that says nothing: those of `chat`, or 0 if the checkpoint decodes
        greedily."""
        if self.model.generation_config.do_sample is False:
            return {"temperature": 0.0, "top_p": 1.0}
        defaults = self.model.chat_format.chat_defaults
        return {"temperature": defaults["temperature"], "top_p": defaults["top_p"]}

    def room_for(self, prompt_ids: list[int], param: str) -> int:
        """How many tokens an answer to a prompt may have.

        Raises:
            RequestError: if the prompt is empty or too long; `param` is the field that holds it.
        """
        longest = min(self.engine.max_tokens - 1, self.longest_prompt or self.engine.max_tokens)
        if not prompt_ids:
            raise RequestError("The prompt is empty.", param)
        if len(prompt_ids) > longest:
            raise RequestError(
                f"The prompt has {len(prompt_ids)} tokens, and {self.name} takes {longest} here. Shorten it.",
                param,
                code="context_length_exceeded",
            )
        return self.engine.max_tokens - len(prompt_ids)

    def start(
        self,
        prompt_ids: list[int],
        settings: Settings,
        read: Callable[[str | None], list[Any]] | None = None,
        images: torch.Tensor | None = None,
    ) -> AnswerStream:
        """Begin an answer; in the event loop. See `AnswerStream`."""
        metrics = self.metrics
        metrics.prompt_tokens.labels(self.name).inc(len(prompt_ids))
        metrics.running.inc()
        metrics.waiting.inc()

        def count(total: int) -> None:
            metrics.generated_tokens.labels(self.name).inc()
            if total == 1:
                metrics.waiting.dec()
                metrics.first_token.labels(self.name).observe(time.perf_counter() - answer.started)

        stop_ids = self.tokenizer.stop_token_ids(self.model.chat_format)
        answer = AnswerStream(prompt_ids, settings, self.tokenizer, stop_ids, read, count, images)
        limit = RequestError(f"The answer took longer than {self.seconds:g} seconds.", status=504, code="timeout")
        timer = answer.loop.call_later(self.seconds, answer.fail, limit)

        def tidy() -> None:
            timer.cancel()
            metrics.running.dec()
            if answer.total_tokens == 0:
                metrics.waiting.dec()

        answer.when_done.append(tidy)
        self.engine.start(answer)
        return answer


class Models:
    """All that a server serves, by name; the first is what a request gets that names none."""

    def __init__(self, served: Iterable[ServedModel]) -> None:
        self.by_name = {model.name: model for model in served}
        self.default = next(iter(self.by_name.values()))
        self._engines = [model.engine for model in self.by_name.values()]

    def find(self, name: Any) -> ServedModel:
        """The model of a request.

        Raises:
            RequestError: for a name that is not served.
        """
        if name is None:
            return self.default
        if not isinstance(name, str) or name not in self.by_name:
            known = ", ".join(self.by_name)
            message = f"The model {name!r:.200} is not served here; there is {known}."
            raise RequestError(message, "model", status=404, code="model_not_found")
        return self.by_name[name]

    def stop(self) -> None:
        """End all engines, after the answers that have begun."""
        while self._engines:
            self._engines.pop().stop()


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What is loaded, and how; see `serve.py --help`."""

    folder: Path
    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    bits: int = 0
    prefix: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    cache_tokens: int = 32768


def load_models(settings: LoadSettings, metrics: Metrics, **limits: Any) -> Models:
    """Load a checkpoint folder with this repository's code, and its adapters; nothing in the folders is run.

    Args:
        limits: `longest_prompt`, `seconds` and `media_folder` of each `ServedModel`.

    Raises:
        ValueError, OSError: if a folder is not what it should be.
    """
    base = load_base(settings)
    tokenizer = load_tokenizer(settings.folder)
    name = settings.name or settings.folder.resolve().name
    loaded = {name: base}
    for adapter, folder in settings.adapters.items():
        loaded[f"{name}:{adapter}"] = with_adapter(base, folder)
    if settings.prefix is not None:
        base.load_prefix_encoder(settings.prefix)
    return Models(
        ServedModel(name, model.eval(), tokenizer, engine_for(model, settings.cache_tokens), metrics, **limits)
        for name, model in loaded.items()
    )


def load_base(settings: LoadSettings) -> PreTrainedModel:
    """Load the model of a checkpoint folder, quantizing it on the way if that was asked for."""
    check_model_type(settings.folder)
    register()
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, settings.folder, device)
    quantization = {"quantization_config": {"quant_method": "chatglm", "bits": settings.bits}} if settings.bits else {}
    return AutoModel.from_pretrained(settings.folder, dtype=dtype, device_map=device, **quantization)


def with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model that shares the weights of `base` and has an adapter of PEFT.

    Raises:
        ValueError: for soft prompts, which continuous batching would ignore.
    """
    from peft import PeftConfig, PeftModel  # Only who serves adapters needs it.

    if PeftConfig.from_pretrained(folder).is_prompt_learning:
        raise ValueError(f"{folder} holds a soft prompt of PEFT, which cannot be served; LoRA and its relatives can.")
    return PeftModel.from_pretrained(with_same_weights(base), folder).get_base_model()

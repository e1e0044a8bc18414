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
"""The ChatGLM decoder and its heads.

What is unusual here:

- Module names are those of the published ChatGLM2, ChatGLM3 and GLM-4 checkpoints
  (`transformer.encoder.layers.0.self_attention.query_key_value`, ...), so weights load without renaming and adapters
  trained elsewhere fit. The names of ChatGLM-6B, GLM and GLM-130B are renamed on load and written back on save. The
  output layer is a part of the base model, as in the published files.
- What differs between the generations is a property of the configuration; nothing here asks for the generation itself.
"""

import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_chatglm import ChatGLMConfig
from .configuration_generations import GENERATION_FEATURES
from .generation_blanks import BlankFillingMixin
from .generation_chatglm import ChatGLMGenerationMixin
from .linear_cpu import ChatGLMLinear
from .modeling_cache import let_cache_grow
from .modeling_classification import SequenceClassificationMixin
from .modeling_layers import ChatGLMAttention, ChatGLMBlock, ChatGLMEncoder, ChatGLMRotaryEmbedding
from .modeling_pictures import (
    PictureGenerationMixin,
    PictureModelMixin,
    PlacedPictures,
    expand_labels,
    expand_mask,
    lay_out_pictures,
    reads_pictures,
)
from .modeling_positions import (
    continue_positions,
    count_in_samples,
    count_positions,
    cut_generation_mask,
    cut_positions,
    is_first_step,
    make_mask,
    make_prefix_lm_inputs,
    make_published_mask,
    make_room_for_prefix,
    make_whole_mask,
    prefix_lm_positions,
    read_published_mask,
    reduce_published_mask,
    unmask_empty_rows,
)
from .modeling_prefix import (
    PrefixEncoder,
    PrefixGenerationMixin,
    PrefixModelMixin,
    PrefixTuningMixin,
    lacks_prefix,
)
from .quantization import ChatGLMQuantizationMixin, init_quantized_linear
from .vision_chatglm import ChatGLMVisionAttention, ChatGLMVisionLayer, ChatGLMVisionModel


# The attention implementations that take a mask of any form.
BIDIRECTIONAL_ATTENTION = ("sdpa", "eager", "flex_attention")


def as_published(forward: Callable) -> Callable:
    """Take the mask of the published ChatGLM2 to GLM-4, and return the last of the hidden states as ChatGLM-6B did.

    That one is normed where `config.tie_last_hidden_states` says so; newer versions of the library than 5.17 do this in
    `capture_outputs`. `full_attention_mask` is what `get_masks` returns, and takes the place of `attention_mask`.
    """

    @wraps(forward)
    def wrapper(
        self: "ChatGLMModel",
        *args: Any,
        full_attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if full_attention_mask is not None:
            # As integers: ChatGLM-6B's tokenizer has booleans that mean the opposite, and `forward` expects those.
            kwargs["attention_mask"] = (~full_attention_mask.bool()).long()
        outputs = forward(self, *args, return_dict=True, **kwargs)
        # CODEPATH: chatglm-6b; the others return the output of the last layer.
        if self.config.tie_last_hidden_states and outputs.hidden_states is not None:
            outputs.hidden_states = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    return wrapper


def name_pattern(name: str) -> str:
    """The whole names that a part of one in `published_names` stands for; what begins with a dot is in a layer."""
    # From the start: GLM-4V's eyes have layers of their own.
    return rf"^transformer\.layers\.(\d+){re.escape(name)}" if name.startswith(".") else f"^{re.escape(name)}"


def renamings_to_ours(names: Iterable[tuple[str, str]]) -> list[WeightRenaming]:
    """From the published names to ours, given pairs of ours and the published one."""
    renamings = [WeightRenaming(name_pattern(published), name_pattern(ours)) for ours, published in names]
    # GLM's published heads keep the network under this name. In layers before the layers, whose published names it takes.
    return [PrefixChange(prefix_to_remove="glm"), *renamings[::-1]]


def take_published_names(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` take what `save_pretrained` has written, as Trainer wants it to when it resumes.

    Saved files have the published names, and a tied output layer is only in them as the word embedding.
    """
    names = {**model.config.published_names, "classifier_head_score.": "classifier_head."}
    renamings = renamings_to_ours(names.items())
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        state_dict[prefix + name] = state_dict.pop(key)
    if model.config.tie_word_embeddings:
        for tied, source in model.all_tied_weights_keys.items():
            if prefix + source in state_dict:
                state_dict.setdefault(prefix + tied, state_dict[prefix + source])


def refuse_pipeline_parallelism(distributed_config: Any) -> None:
    """Raise a `ValueError` if the library's `DistributedConfig`, or a dict of its values, asks for a pipeline."""
    values = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config or object)
    if (values.get("pp_size") or 1) > 1:
        raise ValueError(
            "Pipeline parallelism (`pp_size`) of the library looks for `layers` and `norm` in the base model, and the "
            'published names have them in `encoder`. Use `device_map="auto"` or `tp_size`, or put the stages together '
            "yourself from `pp_plan`."
        )


@auto_docstring
class ChatGLMPreTrainedModel(PictureModelMixin, PrefixTuningMixin, ChatGLMQuantizationMixin, PreTrainedModel):
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock", "ChatGLMPatchEmbedding", "ChatGLMVisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Published files store these buffers, but they can be computed from the configuration.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$", r"rotary_emb\.inv_freq$"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The second of each are those of GLM-4V's eyes, which run on their own, in `get_image_features`.
    _can_record_outputs = {
        "hidden_states": [ChatGLMBlock, ChatGLMVisionLayer],
        "attentions": [ChatGLMAttention, ChatGLMVisionAttention],
    }

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # A private hook (Transformers 5.17 to 5.23) and the only place that sees every way of choosing.
        # CODEPATH: chatglm-6b, glm and glm-130b; the others are causal.
        if self.config.is_bidirectional and attn_implementation not in (None, *BIDIRECTIONAL_ATTENTION):
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported by ChatGLM-6B and the older '
                "GLM: it is unknown, or it would silently drop the mask of the bidirectional context. Use one of "
                f"{BIDIRECTIONAL_ATTENTION}."
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # Published programs pass both. Transformers 5 never fills weights that are about to be loaded.
        kwargs.pop("empty_init", None)
        if (device := kwargs.pop("device", None)) is not None:
            kwargs.setdefault("device_map", device)
        refuse_pipeline_parallelism(kwargs.get("distributed_config"))
        cls.check_stored_prefix(*args, **kwargs)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Private (Transformers 5.17 to 5.23), as DeepSpeed's ZeRO-3 keeps all of them, and saving would undo every one.
        if conversions := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
        # Loading replaces the parameters by new ones, which all require a gradient.
        model.freeze_base_model()
        return loaded

    def post_init(self) -> None:
        super().post_init()
        self.register_load_state_dict_pre_hook(take_published_names)

    def _init_weights(self, module: Any) -> None:
        prefix_encoder = self.base_model.prefix_encoder
        # `isinstance` would fail for a class from another checkpoint's copy of this code.
        if hasattr(module, "weight_scale"):
            init_quantized_linear(module, self.config.initializer_range)
        elif prefix_encoder is not None and hasattr(module, "reset_parameters") and module in prefix_encoder.modules():
            # As published, PyTorch's own: a standard normal embedding. Published learning rates are made for it; from
            # `initializer_range` a prefix is learnt several times slower.
            module.reset_parameters()
        elif hasattr(module, "original_inv_freq"):
            # Others may replace what the library calls "default" for the models of all (gptqmodel 7.7 does).
            inv_freq, _ = module.compute_default_rope_parameters(module.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)
        elif isinstance(module, ChatGLMClassifierHead):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)
            # Vectors of GLM-4V's eyes that are no layers.
            for name in ("cls_embedding", "boi", "eoi"):
                if isinstance(vector := getattr(module, name, None), nn.Parameter):
                    init.normal_(vector, std=self.config.initializer_range)

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """Turn quantized weights back into floats; see [`ChatGLMQuantizationMixin`]."""
        model = super().dequantize(*args, **kwargs)
        self.freeze_base_model()
        return model

    @property
    def max_sequence_length(self) -> int:
        """How many positions the model has, by its published name."""
        return self.config.max_position_embeddings

    def get_masks(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Any = None,
        padding_mask: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """The published mask, bool `[batch, 1, seq, cached + seq]`, true = hidden; a `full_attention_mask`.

        `get_masks(input_ids, device)` is the call of ChatGLM-6B, the rest are the arguments of the others.
        """
        if isinstance(past_key_values, torch.device | str):
            past_key_values, device = None, past_key_values
        return make_published_mask(self.config, input_ids, past_key_values, padding_mask).to(device)

    def get_position_ids(
        self,
        input_ids: torch.LongTensor,
        mask_positions: Any = None,
        device: torch.device | str | None = None,
        use_gmasks: Any = None,
    ) -> torch.Tensor:
        """The published positions, `[batch, seq]`, or `[batch, 2, seq]` for ChatGLM-6B.

        `get_position_ids(input_ids, device)` is the call of ChatGLM2 to GLM-4. What ChatGLM-6B's says of mask tokens is
        not needed, as the ids tell it.
        """
        device = mask_positions if isinstance(mask_positions, torch.device | str) else device
        # CODEPATH: chatglm-6b and glm-130b; the others have the positions of a causal model.
        if self.config.prefix_lm:
            return prefix_lm_positions(self.config, input_ids, None)[0].to(device)
        return count_positions(None, input_ids.shape[1], 0, input_ids.device).repeat(len(input_ids), 1).to(device)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.base_model.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        # `resize_token_embeddings` makes PyTorch's own layer, which is slower on a CPU.
        if type(new_embeddings) is nn.Linear and type(self.base_model.output_layer) is ChatGLMLinear:
            new_embeddings.__class__ = ChatGLMLinear
        self.base_model.output_layer = new_embeddings


@auto_docstring(custom_intro="The decoder without a head on top, usable alone as a text encoder.")
class ChatGLMModel(PrefixModelMixin, ChatGLMPreTrainedModel):
    # Tied in ChatGLM-6B only (`tie_word_embeddings`).
    _tied_weights_keys = {"output_layer.weight": "embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size)})
        # CODEPATH: glm adds learned positions to the embeddings; the others turn queries and keys.
        if config.learned_positions:
            num_positions = config.max_position_embeddings + config.has_block_positions
            self.position_embeddings = nn.Embedding(num_positions, config.hidden_size)
            # CODEPATH: all published checkpoints of glm have both tables; models trained without blocks have the first.
            if config.has_block_positions:
                self.block_position_embeddings = nn.Embedding(num_positions, config.hidden_size)
        else:
            self.rotary_pos_emb = ChatGLMRotaryEmbedding(config)
        self.encoder = ChatGLMEncoder(config)
        self.output_layer = ChatGLMLinear(config.hidden_size, config.vocab_size, bias=False)
        # CODEPATH: glm-4v-9b has eyes; the others read text alone.
        self.vision = ChatGLMVisionModel(config) if config.vision_config is not None else None
        self.prefix_encoder = None
        # CODEPATH: checkpoints with a P-tuning prefix; no published base model has one.
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
        self.freeze_base_model()
        self.gradient_checkpointing = False
        self.post_init()

    def place(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        num_cached: int | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Positions, filled in where they are not given, and the two places where they may go: embeddings and rotations.

        Returns:
            Positions, `[batch or 1, seq]` or `[batch, 2, seq]`; embeddings, `[batch, seq, hidden]`; cosines and sines.
        """
        if position_ids is None:
            # CODEPATH: glm counts padding too.
            counted = None if self.config.mask_tells_who_sees_whom else attention_mask
            position_ids = count_positions(counted, inputs_embeds.shape[1], num_cached, inputs_embeds.device)
        # CODEPATH: no published checkpoint keeps the residual stream in float32; the flag is for trainers.
        hidden_states = inputs_embeds.float() if self.config.fp32_residual_connection else inputs_embeds
        # CODEPATH: glm; the others turn queries and keys.
        if not self.config.learned_positions:
            return position_ids, hidden_states, self.rotary_pos_emb(inputs_embeds, position_ids)
        # One row stands for positions in the context.
        rows = position_ids.unflatten(0, (-1, 1)) if position_ids.ndim == 2 else position_ids
        hidden_states = hidden_states + self.position_embeddings(rows[:, 0])
        # CODEPATH: all published checkpoints of glm have both tables; models trained without blocks have the first.
        if self.config.has_block_positions:
            blocks = rows[:, 1] if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])
            hidden_states = hidden_states + self.block_position_embeddings(blocks)
        return position_ids, F.dropout(hidden_states, self.config.embedding_dropout, self.training), None

    @as_published
    @reads_pictures
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(
        custom_intro="""
        Run the decoder. Real tokens count from position 0 by default, and the attention mask leaves a P-tuning prefix
        out. `hidden_states[0]` are the embeddings and `hidden_states[i]` the output of layer `i`; the last one is
        before the final norm, as published.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        let_cache_grow(past_key_values)
        seq_len, prefix_length = inputs_embeds.shape[1], self.config.pre_seq_len or 0
        is_first = is_first_step(past_key_values, seq_len) if prefix_length == 0 else lacks_prefix(past_key_values)
        # CODEPATH: chatglm-6b and glm-130b, whose masks are of their own kind. One made for a static cache is not it.
        if self.config.mask_marks_hidden and is_first and not getattr(past_key_values, "is_compileable", False):
            attention_mask = read_published_mask(self.config, attention_mask)
        # CODEPATH: chatglm-6b and glm-130b; of the others' ids nothing is read off.
        if self.config.prefix_lm:
            position_ids, token_type_ids = make_prefix_lm_inputs(
                self.config, input_ids, attention_mask, position_ids, token_type_ids, past_key_values, is_first
            )
        prefix_cache = None
        # CODEPATH: checkpoints with a P-tuning prefix; no published base model has one.
        if self.prefix_encoder is not None:
            past_key_values, prefix_cache = self.add_prefix(past_key_values, inputs_embeds)
        num_cached = past_key_values.get_seq_length() - prefix_length if past_key_values is not None else 0
        # CODEPATH: glm, unless the token types say it; the masks of the others say what is padding.
        if self.config.mask_tells_who_sees_whom and token_type_ids is None:
            attention_mask = make_whole_mask(attention_mask, inputs_embeds, past_key_values, num_cached)
        whole_mask = make_room_for_prefix(attention_mask, prefix_length, num_cached + seq_len)
        mask = make_mask(
            self.config, inputs_embeds, whole_mask, past_key_values, position_ids, token_type_ids, is_first
        )
        positions, hidden_states, rotations = self.place(inputs_embeds, position_ids, attention_mask, num_cached)
        hidden_states = self.encoder(
            hidden_states if prefix_cache is None else prefix_cache.pass_gradients(hidden_states),
            position_embeddings=rotations,
            attention_mask=unmask_empty_rows(mask),
            past_key_values=past_key_values if prefix_cache is None else None,
            prefix_cache=prefix_cache,
            position_ids=count_in_samples(self.config, positions),
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states.to(inputs_embeds.dtype),
            past_key_values=past_key_values if use_cache else None,
        )


@auto_docstring(
    custom_intro="The language model: `generate`, and `chat` in the conversation format of its generation."
)
class ChatGLMForConditionalGeneration(
    PictureGenerationMixin, PrefixGenerationMixin, ChatGLMPreTrainedModel, BlankFillingMixin, ChatGLMGenerationMixin
):
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Predict the next token at every position. Labels are the input ids, with -100 where no loss is wanted; they are
        shifted here, except for GLM and GLM-130B (`config.aligned_labels`). The loss is computed in float32.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_last_logit: bool = False,
        pixel_values: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        images (`torch.Tensor`, *optional*):
            The published name of `pixel_values`: GLM-4V's pictures, one for each row whose ids have room for one.
        image_features (`torch.Tensor`, *optional*):
            What `get_image_features` made of them, in their place.
        return_last_logit (`bool`, *optional*, defaults to `False`):
            The published name of `logits_to_keep=1`.
        """
        pictures = {"pixel_values": pixel_values, "images": images, "image_features": image_features}
        pictures = {name: value for name, value in pictures.items() if value is not None}
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **pictures,
            **kwargs,
        )
        logits_to_keep = 1 if return_last_logit else logits_to_keep
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            # CODEPATH: glm and glm-130b, whose labels stand where they are predicted; the others' are shifted.
            aligned: dict[str, Any] = {"shift_labels": labels} if self.config.aligned_labels else {}
            options = {**aligned, **kwargs}
            if pictures and labels.shape[1] != logits.shape[1]:
                labels = expand_labels(self.config, input_ids, labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def as_padding_mask(
        self, attention_mask: torch.Tensor | None, num_tokens: int | None = None
    ) -> torch.Tensor | None:
        # CODEPATH: chatglm-6b and glm-130b; the masks of the others are what `generate` takes.
        return reduce_published_mask(attention_mask, num_tokens) if self.config.mask_marks_hidden else attention_mask

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        prompt_position_ids: torch.LongTensor | None = None,
        generation_attention_mask: torch.Tensor | None = None,
        pictures: PlacedPictures | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # CODEPATH: checkpoints with a P-tuning prefix; no published base model has one.
        if self.config.pre_seq_len is not None and kwargs.get("past_key_values") is not None:
            kwargs["next_sequence_length"] = self.count_new_tokens(input_ids, attention_mask, **kwargs)
        # CODEPATH: glm, whose caller gives positions and a mask for the answer too; without, it is causal.
        if self.config.mask_tells_who_sees_whom:
            num_tokens = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            num_new = kwargs.get("next_sequence_length") or num_tokens
            position_ids = None
            if prompt_position_ids is not None:
                position_ids = cut_positions(prompt_position_ids, num_tokens)
            elif num_tokens > self.config.max_prompt_length:
                raise ValueError(
                    f"Token {num_tokens} is to come, and the model has {self.config.max_prompt_length} positions. Generate "
                    "fewer tokens, or give the positions of `build_inputs_for_generation`, which stand still in an answer."
                )
            if generation_attention_mask is not None:
                cache = kwargs.get("past_key_values")
                attention_mask = cut_generation_mask(
                    generation_attention_mask, num_tokens, num_new, self.config, cache
                )
            else:
                kwargs["token_type_ids"] = torch.zeros(
                    len(input_ids), num_tokens, dtype=torch.long, device=self.device
                )
            prompt_position_ids = None
        # CODEPATH: chatglm-6b and glm-130b, whose positions and context are read off all the ids at every step.
        if self.config.prefix_lm and inputs_embeds is None:
            position_ids, kwargs["token_type_ids"] = prefix_lm_positions(self.config, input_ids, attention_mask)
        # CODEPATH: chatglm-6b from embeddings, with the positions of the caller.
        elif prompt_position_ids is not None and position_ids is not None:
            num_new_tokens = position_ids.shape[-1] - prompt_position_ids.shape[-1]
            position_ids = continue_positions(prompt_position_ids, num_new_tokens)
            if position_ids.ndim == 3:
                kwargs["token_type_ids"] = (position_ids[:, 1] == 0).long()
        # CODEPATH: glm-4v-9b has eyes; the others read text alone.
        if pictures is not None:
            kwargs["pictures"] = pictures
        # The library hands on to the model what `generate` was given for stop strings (5.17 to 5.23).
        kwargs.pop("tokenizer", None)
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs
        )

    @staticmethod
    def create_masks_for_generate(
        config: ChatGLMConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.LongTensor | None,
        token_type_ids: torch.LongTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """The mask for a compiled step with a static cache, the same that `forward` makes."""
        # CODEPATH: checkpoints with a P-tuning prefix; no published base model has one.
        if config.pre_seq_len is not None and attention_mask is not None:
            attention_mask = F.pad(attention_mask, (config.pre_seq_len, 0), value=1)
        return make_mask(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, token_type_ids, is_first_iteration
        )


class ChatGLMClassifierHead(nn.Module):
    """A linear layer. It is no `nn.Linear`, to which PEFT's "all-linear" would add an adapter.

    PEFT trains and saves modules whose name ends in `score`; in files the head has its published name.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_labels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight, self.bias)


@auto_docstring(
    custom_intro="""
    A linear classifier on the last real token of each row. Padding may be on either side, but must be masked.
    """
)
class ChatGLMForSequenceClassification(SequenceClassificationMixin, ChatGLMPreTrainedModel):
    # PEFT reads this for adapters whose `modules_to_save` was the published name.
    _checkpoint_conversion_mapping = {r"^classifier_head\.": "classifier_head_score."}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier_head_score = ChatGLMClassifierHead(config.hidden_size, config.num_labels)
        self.freeze_base_model()
        self.post_init()

    @property
    def classifier_head(self) -> nn.Module:
        """The linear classifier, by its published name."""
        return self.classifier_head_score

    def classify(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        # CODEPATH: chatglm-6b and glm-130b, whose masks are of their own kind.
        if self.config.mask_marks_hidden:
            attention_mask = reduce_published_mask(attention_mask)
        if input_ids is not None and hidden_states.shape[1] != input_ids.shape[1]:
            attention_mask = expand_mask(lay_out_pictures(self.config, input_ids), input_ids, attention_mask)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"The last token of each row is read off an attention mask [batch, seq], got {attention_mask.shape}."
            )
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        last_token: int | torch.Tensor = -1
        if attention_mask is not None:
            real_tokens = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device)
            last_token = (real_tokens * torch.arange(hidden_states.shape[1], device=hidden_states.device)).argmax(-1)
        return self.classifier_head_score(self.dropout(hidden_states[rows, last_token]))


def weight_renamings() -> list[WeightRenaming]:
    """The names of all generations: published -> ours when loading, and back when saving.

    The library applies them in turn when loading, and undoes in reverse turn when saving those alone that were of use
    in loading; for a model that was not loaded, all of them. So our names go to the published ones and back, the
    published ones go to ours: a checkpoint is saved under the names that it came with, a new model of any generation
    under ours.
    """
    names = dict.fromkeys(pair for one in GENERATION_FEATURES.values() for pair in one.published_names.items())
    there = [WeightRenaming(name_pattern(ours), name_pattern(published)) for ours, published in names]
    return [*there, *renamings_to_ours(names), WeightRenaming(r"classifier_head\.", r"classifier_head_score\.")]


register_checkpoint_conversion_mapping("chatglm", weight_renamings(), overwrite=True)

# With label smoothing, Trainer computes the loss itself, and shifts labels only for the classes that are listed here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["chatglm"] = "ChatGLMForConditionalGeneration"


__all__ = [
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
]

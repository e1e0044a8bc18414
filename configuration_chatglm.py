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
"""One configuration for ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B, and for GLM and GLM-130B before them.

What is unusual here:

- The published files name their sizes in their own way (`num_layers`, `ffn_hidden_size`, ...). The code uses the
  library's names (`num_hidden_layers`, `intermediate_size`, ...); both read and write the same value. Files are saved
  with the published names, because other programs read those.
- ChatGLM-6B and GLM call sizes differently from their successors. Their names are accepted by every generation, and
  written back for those that had them.
- GLM's published files carry the model type "glm", which is another network in the library by now. They are read, and
  saved as "chatglm".
- No published file says which generation it belongs to. `model_version` does, and is inferred when it is absent.
- What distinguishes the generations is data, in `configuration_generations.py`. The rest of the code asks the
  configuration for single features and never compares `model_version`.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import transformers


# Before anything that older versions lack: this is the first of the files that the library loads.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        f"These ChatGLM files need Transformers 5.17 or newer, this is {transformers.__version__}: "
        "pip install -U 'transformers>=5.17,<6'"
    )

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring, logging

from .configuration_generations import (
    AUTO_MAP,
    DEFAULT_MODEL_VERSION,
    GENERATION_FEATURES,
    VISION_AUTO_MAP,
    GenerationFeatures,
    infer_model_version,
    refuse_images,
)
from .configuration_vision import VisionSettings


# What only models with eyes have.
VISION_KEYS = ("vision_config", "boi_token_id", "eoi_token_id")

# The version of these files, all of them together.
__version__ = "0.2.0"

logger = logging.get_logger(__name__)


def own_field_names() -> set[str]:
    """The fields that `ChatGLMConfig` adds to those of every configuration."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return {field.name for field in fields(ChatGLMConfig)} - inherited


@auto_docstring(
    custom_intro="""
    Configuration of a ChatGLM model of any generation. The defaults are those of ChatGLM3-6B.

    Every size has the library's name and its published one: `num_hidden_layers` (`num_layers`), `intermediate_size`
    (`ffn_hidden_size`, ChatGLM-6B: `inner_hidden_size`), `head_dim` (`kv_channels`), `num_key_value_heads`
    (`multi_query_group_num`), `vocab_size` (`padded_vocab_size`), `max_position_embeddings` (`seq_length`,
    ChatGLM-6B: `max_sequence_length`), `rms_norm_eps` (`layernorm_epsilon`). A size that no model can have raises a
    `ValueError` with the value.
    """
)
@strict
class ChatGLMConfig(PreTrainedConfig):
    r"""
    model_version (`str`, *optional*):
        `"chatglm"`, `"chatglm2"`, `"chatglm3"`, `"glm4"` or `"glm4v"`; inferred by [`infer_model_version`] when absent.
    head_dim (`int`, *optional*):
        Width of one attention head; `hidden_size // num_attention_heads` when absent.
    multi_query_attention (`bool`, *optional*):
        `True`: `num_key_value_heads` key/value heads, and queries, keys and values one after another in the
        fused projection. `False` (ChatGLM-6B): one key/value head for each query head, interleaved by head.
    rmsnorm (`bool`, *optional*):
        RMSNorm, or LayerNorm with bias (ChatGLM-6B).
    apply_residual_connection_post_layernorm (`bool`, *optional*):
        The residual starts from the output of the norm (ChatGLM-6B) instead of its input.
    post_layer_norm (`bool`):
        Whether a norm follows the last layer.
    add_bias_linear (`bool`, *optional*):
        Bias on every linear layer of the blocks.
    add_qkv_bias (`bool`):
        Bias on the fused query/key/value projection.
    fp32_residual_connection (`bool`):
        Keep the residual stream in float32.
    rope_ratio (`float`):
        ChatGLM2: positions are divided by it. ChatGLM3 and GLM-4: the base 10000 is multiplied by it.
    position_encoding_2d (`bool`, *optional*):
        ChatGLM-6B: half of each head is rotated by the position in the context, half by that in the answer.
    block_position_encoding (`bool`, *optional*):
        GLM: the position in the answer has a table of its own; both are added to the embeddings.
    embedding_dropout (`float`):
        GLM: dropout behind the embeddings.
    mask_token_id (`int`, *optional*):
        ChatGLM-6B: id of `[MASK]`; by default four before `<sop>` (`bos_token_id`), where both vocabularies have it.
    gmask_token_id (`int`, *optional*):
        ChatGLM-6B: id of `[gMASK]`; by default three before `<sop>`.
    smask_token_id (`int`, *optional*):
        GLM-130B: id of `[sMASK]`; by default two before `<sop>`.
    quantization_bit (`int`):
        4 or 8 for a checkpoint with quantized weights in the published format, 0 otherwise.
    pre_seq_len (`int`, *optional*):
        Number of virtual tokens of P-tuning v2 (https://arxiv.org/abs/2110.07602).
    prefix_projection (`bool`):
        Whether an MLP makes the prefix from its embedding.
    vision_config (`dict`, *optional*):
        GLM-4V: the sizes of its eyes under their published names; see `VisionSettings`.
    boi_token_id (`int`, *optional*):
        GLM-4V: id of `<|begin_of_image|>`, behind which a picture stands.
    eoi_token_id (`int`, *optional*):
        GLM-4V: id of `<|end_of_image|>`.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_layers": "num_hidden_layers",
        "padded_vocab_size": "vocab_size",
        "seq_length": "max_position_embeddings",
        "max_sequence_length": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "inner_hidden_size": "intermediate_size",
        "kv_channels": "head_dim",
        "multi_query_group_num": "num_key_value_heads",
        "layernorm_epsilon": "rms_norm_eps",
        "layer_norm_eps": "rms_norm_eps",
        "attention_dropout_prob": "attention_dropout",
        "embedding_dropout_prob": "embedding_dropout",
        "output_dropout_prob": "hidden_dropout",
    }
    # The fused projections are gathered: their parts (q, k, v; gate, up) do not lie at the shard boundaries.
    base_model_tp_plan = {
        "encoder.layers.*.self_attention.query_key_value": "colwise_gather_output",
        "encoder.layers.*.self_attention.dense": "rowwise_split_input",
        "encoder.layers.*.mlp.dense_h_to_4h": "colwise_gather_output",
        "encoder.layers.*.mlp.dense_4h_to_h": "rowwise_split_input",
        "embedding.word_embeddings": "embedding_rowwise",
        "output_layer": "colwise_gather_output",
    }
    # Each layer is gathered when it computes, and given back.
    base_model_fsdp_plan = {
        "embedding.word_embeddings": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.final_layernorm": "keep_full_weight",
        "output_layer": "keep_full_weight",
    }
    # Where the layers are in every model with a head, for GPTQ, which looks for them under the names of other models.
    path_of_layers = "transformer.encoder.layers"
    # What stands before the list of layers goes to the first process, what stands behind it to the last.
    base_model_pp_plan = {
        "embedding.word_embeddings": (["input_ids"], ["inputs_embeds"]),
        "encoder.layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "encoder.final_layernorm": (["hidden_states"], ["hidden_states"]),
        "output_layer": (["hidden_states"], ["logits"]),
    }

    model_version: str | None = None
    num_hidden_layers: int = 28
    hidden_size: int = 4096
    intermediate_size: int | None = None
    num_attention_heads: int = 32
    head_dim: int | None = None
    multi_query_attention: bool | None = None
    num_key_value_heads: int | None = None
    vocab_size: int = 65024
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rmsnorm: bool | None = None
    apply_residual_connection_post_layernorm: bool | None = None
    post_layer_norm: bool = True
    position_encoding_2d: bool | None = None
    block_position_encoding: bool | None = None
    add_bias_linear: bool | None = None
    add_qkv_bias: bool = True
    fp32_residual_connection: bool = False
    rope_ratio: float | int = 1.0
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    initializer_range: float = 0.02
    quantization_bit: int | None = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    smask_token_id: int | None = None
    vision_config: dict[str, Any] | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_images(kwargs)
        own_keys = {name: getattr(self, name) for name in own_field_names() if getattr(self, name) is not None}
        self.model_version = infer_model_version({**kwargs, **own_keys}) or DEFAULT_MODEL_VERSION
        kwargs.pop("model_type", None)
        for name in [name for name in kwargs if name in self.attribute_map]:
            try:
                # Under the field's own name, which the library checks the type of.
                setattr(self, self.attribute_map[name], kwargs.pop(name))
            except StrictDataclassFieldValidationError as error:
                raise ValueError(f"`{name}`: {error}") from error
        self._check_inherited(kwargs)
        # CODEPATH: chatglm2 and its successors have a key that vLLM cannot do without; chatglm-6b has not.
        if self.rotary_interleaved:
            kwargs.setdefault("original_rope", True)
        if self.quantization_bit and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = {"quant_method": "chatglm", "bits": self.quantization_bit}
        elif (
            isinstance(settings := kwargs.get("quantization_config"), Mapping)
            and settings.get("quant_method") == "gptq"
        ):
            # Optimum, which packs the layers, forgets where they were (2.3).
            path = settings.get("block_name_to_quantize") or self.path_of_layers
            kwargs["quantization_config"] = {**settings, "block_name_to_quantize": path}
        self._fill_in_defaults()
        self._validate_sizes()
        super().__post_init__(**kwargs)

    def _check_inherited(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings of every configuration that the library would stumble over without naming them."""
        for name in ("auto_map", "id2label", "label2id", "quantization_config", "rope_parameters", "rope_scaling"):
            value = settings.get(name, getattr(self, name, None))
            # A quantization_config may be an object of the library's.
            if not (value is None or isinstance(value, Mapping) or hasattr(value, "to_dict")):
                raise TypeError(f"`{name}` must be a dict, got {reprlib.repr(value)}.")
        for name, value in (("dtype", self.dtype), ("torch_dtype", settings.get("torch_dtype"))):
            dtype = getattr(torch, value, None) if isinstance(value, str) else value
            if value is not None and not isinstance(dtype, torch.dtype):
                raise ValueError(f'`{name}` must name a dtype of torch, such as "float16", got {reprlib.repr(value)}.')
        for name in settings:
            attribute = getattr(type(self), name, None)
            if callable(attribute) or (isinstance(attribute, property) and attribute.fset is None):
                raise ValueError(f"`{name}` is no setting: the configuration has a method or property of that name.")

    def _fill_in_defaults(self) -> None:
        defaults = {
            "multi_query_attention": True,
            "rmsnorm": True,
            "add_bias_linear": False,
            "position_encoding_2d": False,
            "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": False,
            "head_dim": self.hidden_size // max(self.num_attention_heads, 1),
            # CODEPATH: glm's files do not say it; 13696 is chatglm3-6b's.
            "intermediate_size": 4 * self.hidden_size if self.learned_positions else 13696,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **self.features.default_settings,
        }
        if self.bos_token_id is not None:
            defaults |= {name: self.bos_token_id + offset for name, offset in self.features.token_offsets.items()}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not self.multi_query_attention:
            self.num_key_value_heads = self.num_attention_heads
        elif self.num_key_value_heads is None:
            self.num_key_value_heads = 2

    def _validate_sizes(self) -> None:
        positive = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
        for name in (*positive, "num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_ratio"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
        num_key_value_heads, head_dim = self.num_key_value_heads or 0, self.head_dim or 0
        if self.num_attention_heads % num_key_value_heads != 0:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of the number of key/value "
                f"heads, `num_key_value_heads` ({num_key_value_heads})."
            )
        if head_dim % 4 != 0:
            raise ValueError(
                f"`head_dim` (`kv_channels`) must be a multiple of 4, because half of a head is rotated in "
                f"pairs; got {head_dim}."
            )
        if self.quantization_bit not in (None, 0, 4, 8):
            raise ValueError(f"`quantization_bit` must be 0, 4 or 8, got {self.quantization_bit}.")
        if self.pre_seq_len is not None and self.pre_seq_len <= 0:
            raise ValueError(f"`pre_seq_len` must be positive, or None for no prefix, got {self.pre_seq_len}.")
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        if self.vision_config is not None:
            VisionSettings.from_dict(self.vision_config)
            if self.boi_token_id is None or self.eoi_token_id is None:
                raise ValueError(
                    "`vision_config` needs `boi_token_id` and `eoi_token_id`, between which a picture stands."
                )

    @property
    def features(self) -> GenerationFeatures:
        """What is special about this generation. The code asks for single features by the properties below."""
        return GENERATION_FEATURES[self.model_version or DEFAULT_MODEL_VERSION]

    @property
    def prefix_lm(self) -> bool:
        """Whether the tokens before `<sop>` see each other both ways, and positions stand still behind it."""
        return self.features.prefix_lm

    @property
    def mask_tells_who_sees_whom(self) -> bool:
        """Whether a mask says more than what is padding.

        In GLM none is causal, one of one element or of one for each row says where the causal part begins, one of two
        dimensions lets all that is real see each other, and of four dimensions it says everything.
        """
        return self.features.mask_tells_who_sees_whom

    @property
    def mask_marks_hidden(self) -> bool:
        """Whether true means hidden in a bool mask `[batch, 1, seq, seq]`, as published; otherwise 1 means visible."""
        return self.features.mask_marks_hidden

    @property
    def mask_is_whole(self) -> bool:
        """Whether such a mask says it all; otherwise what is padding, and the ids say where the context ends."""
        return self.features.mask_is_whole

    @property
    def is_bidirectional(self) -> bool:
        """Whether a context may see itself both ways."""
        return self.prefix_lm or self.mask_tells_who_sees_whom

    @property
    def aligned_labels(self) -> bool:
        """Whether a label stands where it is predicted; otherwise where it is read, and is shifted for the loss."""
        return self.features.aligned_labels

    @property
    def blank_token_ids(self) -> list[int]:
        """The mask tokens that an answer may fill, the one that is looked for first first."""
        ids = [getattr(self, name) for name in self.features.blank_tokens]
        return [token_id for token_id in ids if token_id is not None]

    @property
    def learned_positions(self) -> bool:
        """Whether positions are embeddings that are added to the tokens; otherwise rotations of queries and keys."""
        return self.features.learned_positions

    @property
    def has_block_positions(self) -> bool:
        """Whether positions come in two rows, `[batch, 2, seq]`: in the context and in the answer."""
        return bool(self.position_encoding_2d or self.block_position_encoding)

    @property
    def max_prompt_length(self) -> int:
        """How many tokens a prompt may have. In GLM the start of an answer stands where its blank does."""
        return self.max_position_embeddings + self.learned_positions

    @property
    def is_qkv_interleaved(self) -> bool:
        """Whether each head has its query, key and value in a row; otherwise all queries come first, then all keys."""
        return not self.multi_query_attention and self.features.interleaves_heads

    @property
    def is_mlp_gated(self) -> bool:
        """Whether half of the feed-forward layer is a gate for the other half."""
        return self.features.is_mlp_gated

    @property
    def gate_comes_first(self) -> bool:
        """Whether the activated half of a gated feed-forward layer is the first."""
        return self.features.gate_comes_first

    @property
    def activation(self) -> str:
        """The library's name of the activation."""
        return self.features.activation

    @property
    def rotary_interleaved(self) -> bool:
        """Whether rotary positions turn neighbouring channels; otherwise one half with the other."""
        return self.features.rotary_interleaved

    @property
    def rotary_whole_head(self) -> bool:
        """Whether one position turns all channels of a head; otherwise half of them."""
        return self.features.rotary_whole_head and not self.position_encoding_2d

    @property
    def rounds_rotary_frequencies(self) -> bool:
        """Whether rotary frequencies are rounded to float16, as they were in training."""
        return self.features.rounds_rotary_frequencies

    @property
    def scales_positions(self) -> bool:
        """Whether positions are divided by `rope_ratio`; otherwise the base is multiplied by it."""
        return self.features.scales_positions

    @property
    def residual_scale(self) -> float:
        """Factor of the residual: DeepNorm's √(2 · layers) (https://arxiv.org/abs/2203.00555), or 1."""
        num_layers = self.num_hidden_layers if self.features.residual_counts_layers else self.features.residual_layers
        return math.sqrt(2 * num_layers) if num_layers else 1.0

    @property
    def tie_last_hidden_states(self) -> bool:
        """Whether the last of the returned hidden states is the normed one, as in the published code."""
        return self.features.tie_last_hidden_states

    @property
    def published_scale_dtype(self) -> str | None:
        """The dtype of all scales of quantized weights, or `None` where it is that of the weights."""
        return self.features.published_scale_dtype

    @property
    def published_names(self) -> Mapping[str, str]:
        """Parts of the weights' names: ours -> those in the published files, where they differ."""
        return self.features.published_names

    @property
    def prefix_size(self) -> int:
        """How many numbers a P-tuning prefix has for each virtual token: keys and values of every layer."""
        return self.num_hidden_layers * 2 * (self.num_key_value_heads or 0) * (self.head_dim or 0)

    @property
    def prefix_embedding_size(self) -> int:
        """Width of a P-tuning prefix's embedding, from which `prefix_projection` makes `prefix_size` numbers."""
        # CODEPATH: chatglm-6b projects from the hidden size; chatglm2, chatglm3 and glm4 from the size of the cache.
        if self.prefix_projection and self.features.projects_prefix_from_hidden_size:
            return self.hidden_size
        return self.prefix_size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ChatGLMConfig":
        # A file may hold both names of a value (GLM-4's do). The published one is the one that published code reads.
        both = [name for key, name in cls.attribute_map.items() if key in config_dict and name in config_dict]
        config_dict = {key: value for key, value in config_dict.items() if key not in both}
        # Overrides given to `from_pretrained` join in here, to be validated and to shape what is derived.
        for key in [key for key in kwargs if key in cls.attribute_map or key in own_field_names()]:
            name = cls.attribute_map.get(key, key)
            config_dict = {
                other: value for other, value in config_dict.items() if cls.attribute_map.get(other) != name
            }
            config_dict[name] = kwargs.pop(key)
        if infer_model_version(config_dict) is None:
            logger.warning_once(
                "Nothing in this configuration tells ChatGLM2 from ChatGLM3, so ChatGLM3 is assumed. "
                'Set `"model_version": "chatglm2"` or `"chatglm3"` in config.json to settle it.'
            )
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: the values under the published names of this generation."""
        config_dict = super().to_diff_dict()
        # The published code knows `quantization_bit` alone, and its library rejects any `quantization_config`.
        if config_dict.get("quantization_bit"):
            config_dict.pop("quantization_config", None)
        if auto_map := config_dict.get("auto_map"):
            # Names loaded from a hub have its repository before `--`, whose code would be loaded instead of the saved.
            own = {**AUTO_MAP, **self.features.auto_map, **(VISION_AUTO_MAP if self.vision_config else {})}
            local = {name: value for name, value in auto_map.items() if str(value).split("--")[-1] != own.get(name)}
            config_dict["auto_map"] = {**own, **local}
        published_keys = self.features.published_keys
        config_dict = {published_keys.get(key, key): value for key, value in config_dict.items()}
        # vLLM (0.32) takes any file with the first of these keys for one of a model that sees, whatever its value.
        if self.vision_config is None:
            config_dict = {key: value for key, value in config_dict.items() if key not in VISION_KEYS}
        # llama.cpp's converter reads it beside the published name.
        return {**config_dict, "vocab_size": self.vocab_size}


__all__ = [
    "AUTO_MAP",
    "ChatGLMConfig",
    "GENERATION_FEATURES",
    "GenerationFeatures",
    "__version__",
    "infer_model_version",
    "refuse_images",
]

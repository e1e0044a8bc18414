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
"""One configuration for ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B.

What is unusual here:

- The published files name their sizes in their own way (`num_layers`, `ffn_hidden_size`, ...). The code uses the
  library's names (`num_hidden_layers`, `intermediate_size`, ...); both read and write the same value. Files are saved
  with the published names, because other programs read those.
- ChatGLM-6B calls three sizes differently from its successors. Its names are accepted by every generation, and
  written back for ChatGLM-6B.
- No published file says which generation it belongs to. `model_version` does, and is inferred when it is absent.
"""

import math
from dataclasses import fields
from typing import Any

import transformers


# Before anything that older versions lack: this is the first of the files that the library loads.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        f"These ChatGLM files need Transformers 5.17 or newer, this is {transformers.__version__}: "
        "pip install -U 'transformers>=5.17,<6'"
    )

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring, logging


logger = logging.get_logger(__name__)

MODEL_VERSIONS = ("chatglm", "chatglm2", "chatglm3", "glm4")

# Keys that only the configuration files of ChatGLM-6B have.
CHATGLM_6B_KEYS = ("inner_hidden_size", "max_sequence_length", "position_encoding_2d", "gmask_token_id")

# The library's name of a value -> its name in the files of ChatGLM2, ChatGLM3 and GLM-4.
PUBLISHED_KEYS = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "seq_length",
    "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels",
    "num_key_value_heads": "multi_query_group_num",
    "rms_norm_eps": "layernorm_epsilon",
}
# The same for ChatGLM-6B.
CHATGLM_6B_PUBLISHED_KEYS = {
    **PUBLISHED_KEYS,
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_sequence_length",
    "intermediate_size": "inner_hidden_size",
}

# Parts of published repository names, the more specific ones first.
PUBLISHED_NAMES = {
    "glm-4": "glm4",
    "glm4": "glm4",
    "codegeex4": "glm4",
    "chatglm3": "chatglm3",
    "chatglm2": "chatglm2",
    "codegeex2": "chatglm2",
    "chatglm-6b": "chatglm",
}


def infer_model_version(config: dict[str, Any]) -> str | None:
    """Tell the generation of a published `config.json`.

    An explicit `model_version` wins, then the keys and ids that one generation alone has, then the published name.

    Args:
        config: the content of a `config.json`.

    Returns:
        One of `MODEL_VERSIONS`, or `None` where nothing tells (ChatGLM2 and ChatGLM3 have the same keys).

    Raises:
        ValueError: for an explicit `model_version` that does not exist.
    """
    if (model_version := config.get("model_version")) is not None:
        if model_version not in MODEL_VERSIONS:
            raise ValueError(f"`model_version` must be one of {MODEL_VERSIONS}, got {model_version!r}.")
        return model_version
    if any(config.get(key) for key in CHATGLM_6B_KEYS):
        return "chatglm"
    eos_token_id = config.get("eos_token_id")
    # GLM-4 pads with `<|endoftext|>`, one of its end tokens. Trainers do the same with `</s>`, the others' id 2.
    if (
        isinstance(eos_token_id, (list, tuple))
        and config.get("pad_token_id") in eos_token_id
        and 2 not in eos_token_id
    ):
        return "glm4"
    for key in ("_name_or_path", "name_or_path"):
        name = str(config.get(key) or "").lower()
        for part, model_version in PUBLISHED_NAMES.items():
            if part in name:
                return model_version
    return None


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
        `"chatglm"`, `"chatglm2"`, `"chatglm3"` or `"glm4"`; inferred by [`infer_model_version`] when absent.
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
    mask_token_id (`int`, *optional*):
        ChatGLM-6B: id of `[MASK]`; by default four before `<sop>` (`bos_token_id`), where both vocabularies have it.
    gmask_token_id (`int`, *optional*):
        ChatGLM-6B: id of `[gMASK]`; by default three before `<sop>`.
    quantization_bit (`int`):
        4 or 8 for a checkpoint with quantized weights in the published format, 0 otherwise.
    pre_seq_len (`int`, *optional*):
        Number of virtual tokens of P-tuning v2 (https://arxiv.org/abs/2110.07602).
    prefix_projection (`bool`):
        Whether an MLP makes the prefix from its embedding.
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

    model_version: str | None = None
    num_hidden_layers: int = 28
    hidden_size: int = 4096
    intermediate_size: int = 13696
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
    add_bias_linear: bool | None = None
    add_qkv_bias: bool = True
    fp32_residual_connection: bool = False
    rope_ratio: float | int = 1.0
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
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    mask_token_id: int | None = None
    gmask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        own_keys = {name: getattr(self, name) for name in own_field_names() if getattr(self, name) is not None}
        self.model_version = infer_model_version({**kwargs, **own_keys}) or "chatglm3"
        for name in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, name, kwargs.pop(name))
        if self.quantization_bit and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = {"quant_method": "chatglm", "bits": self.quantization_bit}
        is_chatglm_6b = self.model_version == "chatglm"
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.multi_query_attention is None:
            self.multi_query_attention = not is_chatglm_6b
        if not self.multi_query_attention:
            self.num_key_value_heads = self.num_attention_heads
        elif self.num_key_value_heads is None:
            self.num_key_value_heads = 2
        if self.rmsnorm is None:
            self.rmsnorm = not is_chatglm_6b
        if self.add_bias_linear is None:
            self.add_bias_linear = is_chatglm_6b
        if self.position_encoding_2d is None:
            self.position_encoding_2d = is_chatglm_6b
        if self.apply_residual_connection_post_layernorm is None:
            self.apply_residual_connection_post_layernorm = is_chatglm_6b
        if is_chatglm_6b and self.bos_token_id is not None:
            # The older vocabulary's file names neither.
            self.mask_token_id = self.bos_token_id - 4 if self.mask_token_id is None else self.mask_token_id
            self.gmask_token_id = self.bos_token_id - 3 if self.gmask_token_id is None else self.gmask_token_id
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = is_chatglm_6b
        self._validate_sizes()
        super().__post_init__(**kwargs)

    def _validate_sizes(self) -> None:
        positive = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
        for name in (*positive, "num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_ratio"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of the number of key/value "
                f"heads, `num_key_value_heads` ({self.num_key_value_heads})."
            )
        if self.head_dim % 4 != 0:
            raise ValueError(
                f"`head_dim` (`kv_channels`) must be a multiple of 4, because half of a head is rotated in "
                f"pairs; got {self.head_dim}."
            )
        if self.quantization_bit not in (None, 0, 4, 8):
            raise ValueError(f"`quantization_bit` must be 0, 4 or 8, got {self.quantization_bit}.")
        if self.pre_seq_len is not None and self.pre_seq_len <= 0:
            raise ValueError(f"`pre_seq_len` must be positive, or None for no prefix, got {self.pre_seq_len}.")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")

    @property
    def prefix_lm(self) -> bool:
        """Whether the tokens before `<sop>` see each other both ways, and positions are counted as ChatGLM-6B does."""
        return self.model_version == "chatglm"

    @property
    def residual_scale(self) -> float:
        """Factor of the residual. ChatGLM-6B: the square root of twice its 28 layers, however many there are."""
        return math.sqrt(2 * 28) if self.model_version == "chatglm" else 1.0

    @property
    def tie_last_hidden_states(self) -> bool:
        """Whether the last of the returned hidden states is the normed one, as the published ChatGLM-6B has it."""
        return self.model_version == "chatglm"

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
        # CODEPATH: chatglm-6b; chatglm2, chatglm3 and glm4 take the else.
        published = CHATGLM_6B_PUBLISHED_KEYS if self.model_version == "chatglm" else PUBLISHED_KEYS
        return {published.get(key, key): value for key, value in config_dict.items()}


__all__ = ["ChatGLMConfig", "MODEL_VERSIONS", "infer_model_version"]

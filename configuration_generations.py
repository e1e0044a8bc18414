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
"""What distinguishes the generations, as data, and by what a published `config.json` is told to be one of them.

A generation is one entry of `GENERATION_FEATURES`. `ChatGLMConfig` looks its own up there, and the rest of the code asks
the configuration for single features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


# The classes that a saved model's Auto classes find. The published files of ChatGLM-6B lack some.
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}

# The same for GLM and, without those for choices and classes, GLM-130B.
GLM_130B_AUTO_MAP = dict.fromkeys(
    ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), "modeling_glm.GLMForConditionalGeneration"
)
GLM_AUTO_MAP = {
    **GLM_130B_AUTO_MAP,
    "AutoModelForMultipleChoice": "modeling_glm.GLMForMultipleChoice",
    "AutoModelForSequenceClassification": "modeling_glm.GLMForSequenceClassification",
}

# The same for GLM-4V.
VISION_AUTO_MAP = {
    "AutoModelForImageTextToText": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoProcessor": "processing_chatglm.ChatGLMProcessor",
}

# The classes that Auto classes find by its preprocessor_config.json; of two image processors, torchvision's is the second.
PREPROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": [
        "image_processing_chatglm.ChatGLMImageProcessorPil",
        "image_processing_chatglm.ChatGLMImageProcessor",
    ],
    "AutoProcessor": "processing_chatglm.ChatGLMProcessor",
}

# The library's name of a value -> its name in the published files.
PUBLISHED_KEYS = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "seq_length",
    "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels",
    "num_key_value_heads": "multi_query_group_num",
    "rms_norm_eps": "layernorm_epsilon",
}
# The same for ChatGLM-6B and GLM-130B, and for GLM.
CHATGLM_6B_KEYS = {
    **PUBLISHED_KEYS,
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_sequence_length",
    "intermediate_size": "inner_hidden_size",
}
GLM_KEYS = {
    **CHATGLM_6B_KEYS,
    "attention_dropout": "attention_dropout_prob",
    "embedding_dropout": "embedding_dropout_prob",
    "hidden_dropout": "output_dropout_prob",
}
# Parts of the weights' names: ours -> those of ChatGLM-6B and GLM-130B. What begins with a dot is within a layer.
CHATGLM_6B_NAMES = {
    "transformer.embedding.word_embeddings.": "transformer.word_embeddings.",
    "transformer.encoder.layers.": "transformer.layers.",
    ".self_attention.": ".attention.",
    "transformer.encoder.final_layernorm.": "transformer.final_layernorm.",
    "transformer.output_layer.": "lm_head.",
}


@dataclass(frozen=True)
class InfillFormat:
    """How a generation that knows blanks is asked to fill them. The defaults are those of GLM-large to GLM-10B."""

    # Answers are written into the text; otherwise behind it.
    writes_into_text: bool = False
    # Which blank is filled first: those of an earlier group before those of a later one, and from left to right.
    mask_groups: tuple[tuple[str, ...], ...] = (("[MASK]", "[sMASK]", "[gMASK]"),)
    start_of_text: str | None = "[CLS]"
    end_of_text: str | None = "<|endoftext|>"
    # A text whose last token is one of these has no end of text.
    open_ends: tuple[str, ...] = ("[gMASK]",)
    # Whether a text has its end of text too where choices are scored.
    ends_scored_text: bool = True

    @property
    def masks(self) -> tuple[str, ...]:
        """All mask tokens."""
        return tuple(name for group in self.mask_groups for name in group)


@dataclass(frozen=True)
class GenerationFeatures:
    """What the network of one generation does, and how its published files are recognised.

    The defaults are those of ChatGLM3-6B.
    """

    # How a `config.json` without `model_version` is recognised: by keys that no other generation has, by its model type,
    # by padding with one of several end tokens, or by parts of the published repository's name.
    own_keys: tuple[str, ...] = ()
    published_model_type: str = "chatglm"
    pads_with_end_token: bool = False
    repository_names: tuple[str, ...] = ()
    # Settings that the published files leave out, with the values that they have there.
    default_settings: Mapping[str, Any] = field(default_factory=dict)
    # Control tokens that the published files leave out, as distances from `bos_token_id`.
    token_offsets: Mapping[str, int] = field(default_factory=dict)
    published_keys: Mapping[str, str] = field(default_factory=lambda: PUBLISHED_KEYS)
    # Parts of the weights' names: ours -> those in the published files, where they differ.
    published_names: Mapping[str, str] = field(default_factory=dict)
    # The classes that Auto classes find beyond those of `AUTO_MAP`, or in their place.
    auto_map: Mapping[str, str] = field(default_factory=dict)
    # The tokens that an answer may fill, by their names in the configuration, the first that is there first.
    blank_tokens: tuple[str, ...] = ()
    # How it is asked to fill blanks; None for those that read from left to right and were never taught to.
    infill_format: InfillFormat | None = None
    # See the properties of the same names in `ChatGLMConfig`.
    prefix_lm: bool = False
    mask_marks_hidden: bool = False
    mask_is_whole: bool = False
    mask_tells_who_sees_whom: bool = False
    aligned_labels: bool = False
    learned_positions: bool = False
    interleaves_heads: bool = True
    is_mlp_gated: bool = True
    gate_comes_first: bool = True
    activation: str = "silu"
    rotary_interleaved: bool = True
    rotary_whole_head: bool = False
    rounds_rotary_frequencies: bool = False
    scales_positions: bool = False
    residual_layers: int | None = None
    residual_counts_layers: bool = False
    tie_last_hidden_states: bool = False
    published_scale_dtype: str | None = None
    projects_prefix_from_hidden_size: bool = False


# `model_version` -> what is special about that generation. The first whose keys are there is the one.
GENERATION_FEATURES: dict[str, GenerationFeatures] = {
    "glm": GenerationFeatures(
        own_keys=("block_position_encoding", "output_predict", "spell_func"),
        published_model_type="glm",
        default_settings={
            "multi_query_attention": False,
            "rmsnorm": False,
            "add_bias_linear": True,
            "block_position_encoding": True,
            "tie_word_embeddings": True,
            # The files name no end token, and GLM's differ between its vocabularies.
            "eos_token_id": None,
            "pad_token_id": None,
        },
        published_keys=GLM_KEYS,
        published_names={
            "transformer.embedding.word_embeddings.": "word_embeddings.",
            "transformer.encoder.layers.": "transformer.layers.",
            ".self_attention.": ".attention.",
            "transformer.encoder.final_layernorm.": "transformer.final_layernorm.",
        },
        auto_map=GLM_AUTO_MAP,
        infill_format=InfillFormat(),
        mask_tells_who_sees_whom=True,
        aligned_labels=True,
        learned_positions=True,
        interleaves_heads=False,
        is_mlp_gated=False,
        # As in the published files. The code that trained them had "gelu_pytorch_tanh".
        activation="gelu",
    ),
    "glm130b": GenerationFeatures(
        default_settings={
            "multi_query_attention": False,
            "rmsnorm": False,
            "add_bias_linear": True,
            "position_encoding_2d": False,
            "apply_residual_connection_post_layernorm": True,
            "tie_word_embeddings": True,
        },
        token_offsets={"mask_token_id": -4, "gmask_token_id": -3, "smask_token_id": -2},
        published_keys=CHATGLM_6B_KEYS,
        published_names=CHATGLM_6B_NAMES,
        auto_map=GLM_130B_AUTO_MAP,
        blank_tokens=("mask_token_id", "smask_token_id", "gmask_token_id"),
        infill_format=InfillFormat(
            writes_into_text=True,
            mask_groups=(("[MASK]",), ("[sMASK]",), ("[gMASK]",)),
            start_of_text=None,
            end_of_text="</s>",
            open_ends=("[MASK]", "[sMASK]", "[gMASK]"),
            ends_scored_text=False,
        ),
        prefix_lm=True,
        mask_marks_hidden=True,
        mask_is_whole=True,
        aligned_labels=True,
        gate_comes_first=False,
        activation="gelu",
        rotary_interleaved=False,
        rotary_whole_head=True,
        rounds_rotary_frequencies=True,
        residual_counts_layers=True,
    ),
    "chatglm": GenerationFeatures(
        own_keys=("inner_hidden_size", "max_sequence_length", "position_encoding_2d", "gmask_token_id"),
        repository_names=("chatglm-6b",),
        default_settings={
            "multi_query_attention": False,
            "rmsnorm": False,
            "add_bias_linear": True,
            "position_encoding_2d": True,
            "apply_residual_connection_post_layernorm": True,
            "tie_word_embeddings": True,
        },
        token_offsets={"mask_token_id": -4, "gmask_token_id": -3},
        published_keys=CHATGLM_6B_KEYS,
        published_names=CHATGLM_6B_NAMES,
        blank_tokens=("gmask_token_id", "mask_token_id"),
        infill_format=InfillFormat(
            writes_into_text=True, mask_groups=(("[gMASK]",), ("[MASK]",)), start_of_text=None, end_of_text=None
        ),
        prefix_lm=True,
        mask_marks_hidden=True,
        is_mlp_gated=False,
        activation="gelu_pytorch_tanh",
        rotary_interleaved=False,
        rotary_whole_head=True,
        rounds_rotary_frequencies=True,
        # Its 28 layers, in smaller models too.
        residual_layers=28,
        tie_last_hidden_states=True,
        published_scale_dtype="float16",
        projects_prefix_from_hidden_size=True,
    ),
    "chatglm2": GenerationFeatures(repository_names=("chatglm2", "codegeex2"), scales_positions=True),
    "chatglm3": GenerationFeatures(repository_names=("chatglm3",)),
    # Its decoder is GLM-4's. What its conversations do otherwise is in its `ConversationFormat`.
    "glm4v": GenerationFeatures(own_keys=("vision_config",), repository_names=("glm-4v",), auto_map=VISION_AUTO_MAP),
    "glm4": GenerationFeatures(pads_with_end_token=True, repository_names=("glm-4", "glm4", "codegeex4")),
}

# Where nothing tells, as between ChatGLM2 and ChatGLM3.
DEFAULT_MODEL_VERSION = "chatglm3"
# Keys of config.json of members of the family whose eyes are of another kind, and what these are called.
IMAGE_KEYS = {"eva_config": "visualglm-6b"}


def infer_model_version(config: Mapping[str, Any]) -> str | None:
    """Tell the generation of a published `config.json`.

    An explicit `model_version` wins, then the keys and ids that one generation alone has, then the published name.

    Args:
        config: the content of a `config.json`.

    Returns:
        A key of `GENERATION_FEATURES`, or `None` where nothing tells (ChatGLM2 and ChatGLM3 have the same keys).

    Raises:
        ValueError: for an explicit `model_version` that does not exist.
    """
    if (generation := config.get("model_version")) is not None:
        if generation not in GENERATION_FEATURES:
            raise ValueError(f"`model_version` must be one of {tuple(GENERATION_FEATURES)}, got {generation!r}.")
        return generation
    for generation, features in GENERATION_FEATURES.items():
        # The library's own "glm" has `rms_norm_eps`.
        is_named = features.published_model_type == config.get("model_type") != "chatglm"
        if any(config.get(key) for key in features.own_keys) or (is_named and "rms_norm_eps" not in config):
            return generation
    eos_token_id: Any = config.get("eos_token_id")
    has_end_tokens = isinstance(eos_token_id, (list, tuple)) and config.get("pad_token_id") in eos_token_id
    for generation, features in GENERATION_FEATURES.items():
        # Trainers make the other generations pad with their end token too: `</s>`, id 2.
        if features.pads_with_end_token and has_end_tokens and 2 not in eos_token_id:
            return generation
    for key in ("_name_or_path", "name_or_path"):
        name = str(config.get(key) or "").lower()
        for generation, features in GENERATION_FEATURES.items():
            if any(part in name for part in features.repository_names):
                return generation
    return None


def refuse_images(config: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a `config.json` of a model with eyes that are not known here and would be left out."""
    for key, name in IMAGE_KEYS.items():
        if config.get(key) is not None:
            raise ValueError(f"config.json has {key!r}, as {name} does: such eyes are not supported.")


__all__ = [
    "AUTO_MAP",
    "DEFAULT_MODEL_VERSION",
    "GENERATION_FEATURES",
    "GenerationFeatures",
    "InfillFormat",
    "PREPROCESSOR_AUTO_MAP",
    "VISION_AUTO_MAP",
    "infer_model_version",
    "refuse_images",
]

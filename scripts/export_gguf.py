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
"""Writes a checkpoint as a GGUF file for llama.cpp: `python scripts/export_gguf.py FOLDER OUT.gguf --type q8_0`.

ChatGLM2, ChatGLM3 and GLM-4 have the architecture `chatglm` there: weights, sizes, vocabulary, stop tokens and chat template
are written. `f16` keeps matrices in float16, `q8_0` in 8 bits with a scale for each 32; vectors stay float32. A quantized
checkpoint is decoded first. Needs the package `gguf` (requirements/peers.txt).

What is unusual here:

- llama.cpp finds control tokens by their text, in prompts and in the middle of merges. `sop` and `eop` are parts of words
  ("people"), so they are called `<sop>` and `<eop>` in the file.
- It encodes the whole text between two control tokens at once. In ChatGLM3 that text has two pieces, each with
  SentencePiece's leading space: the template in the file writes the second of them out.
- ChatGLM2-6B-32K divides positions, which is llama.cpp's linear scaling; the others multiply the base.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from local_code import check_model_type, load_module, load_tokenizer, register  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402
from transformers.utils import logging  # noqa: E402


ARCHITECTURE = gguf.MODEL_ARCH.CHATGLM
TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
ROPE_BASE = 10000.0
# Where training's tags for answers stand in a template; llama.cpp does not know them.
GENERATION_TAG = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def check_network(config: Any) -> None:
    """Refuse what llama.cpp's architecture `chatglm` does not compute.

    Raises:
        ValueError: with all that differs.
    """
    differences = {
        "it reads its context in both directions, and llama.cpp's `chatglm` is causal": config.is_bidirectional,
        "its positions are not rotations of neighbouring channels in half of a head": not config.rotary_interleaved
        or config.rotary_whole_head
        or config.learned_positions,
        "its norms are not RMSNorm before each part": not config.rmsnorm
        or config.apply_residual_connection_post_layernorm
        or not config.post_layer_norm,
        "its feed-forward layers are not SwiGLU": not config.is_mlp_gated or config.activation != "silu",
        "its linear layers have biases": config.add_bias_linear,
        f"its heads are {config.num_attention_heads} × {config.head_dim} wide, which is not the hidden size "
        f"{config.hidden_size}": config.num_attention_heads * config.head_dim != config.hidden_size,
        "it sees pictures": config.vision_config is not None,
        "it has a P-tuning prefix": config.pre_seq_len is not None,
    }
    found = [reason for reason, is_so in differences.items() if is_so]
    if found:
        raise ValueError(f"llama.cpp cannot run this checkpoint: {'; '.join(found)}.")


def add_network(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the sizes of the network."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim // 2)
    writer.add_vocab_size(config.vocab_size)
    # CODEPATH: chatglm2 divides positions; chatglm3 and glm4 multiply the base.
    if config.scales_positions:
        writer.add_rope_freq_base(ROPE_BASE)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_ratio)
    else:
        writer.add_rope_freq_base(ROPE_BASE * config.rope_ratio)


def tensor_names(names: Iterable[str], num_layers: int) -> dict[str, str]:
    """The names that weights have in GGUF, by ours.

    Raises:
        ValueError: for a weight that the architecture does not have.
    """
    known = gguf.get_tensor_name_map(ARCHITECTURE, num_layers)
    found = {name: known.get_name(name.removeprefix("transformer."), (".weight", ".bias")) for name in names}
    for name, new_name in found.items():
        if new_name is None:
            raise ValueError(f"llama.cpp's `chatglm` has no weight for {name!r}.")
    return {name: new_name for name, new_name in found.items() if new_name is not None}


def tensor_type(shape: Sequence[int], wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """Vectors stay float32, and a matrix whose rows do not divide into blocks stays float16."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def to_type(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType, name: str) -> np.ndarray:
    """The bytes of a weight in that type.

    Raises:
        ValueError: for a value that float16 cannot hold.
    """
    values = tensor.detach().float().numpy()
    if kind != gguf.GGMLQuantizationType.F32 and not np.abs(values).max() <= np.finfo(np.float16).max:
        raise ValueError(f"{name!r} has a value that float16 cannot hold: {np.abs(values).max()}.")
    return gguf.quants.quantize(values, kind)


def add_weights(writer: gguf.GGUFWriter, weights: Mapping[str, torch.Tensor], num_layers: int, kind: str) -> None:
    """Write everything that was added to the file, and then the weights, one at a time."""
    names = tensor_names(weights, num_layers)
    kinds = {name: tensor_type(tensor.shape, TYPES[kind]) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        shape = (
            gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name]) if kind_is_packed(kinds[name]) else tensor.shape
        )
        num_blocks = tensor.numel() // gguf.GGML_QUANT_SIZES[kinds[name]][0]
        num_bytes = num_blocks * gguf.GGML_QUANT_SIZES[kinds[name]][1]
        dtype = np.dtype(np.float16 if kinds[name] == gguf.GGMLQuantizationType.F16 else np.float32)
        dtype = np.dtype(np.uint8) if kind_is_packed(kinds[name]) else dtype
        writer.add_tensor_info(names[name], shape, dtype, num_bytes, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in weights.items():
        writer.write_tensor_data(to_type(tensor, kinds[name], name))


def kind_is_packed(kind: gguf.GGMLQuantizationType) -> bool:
    return kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def control_names(tokenizer: Any) -> dict[str, str]:
    """What the control tokens are called in the file. Those that templates do not mark are words."""
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {name: name if name in tokenizer.chat_format.marked_tokens else f"<{name}>" for name in control}


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Write the tokens with their types and what merges them, the stop tokens and the chat template.

    Raises:
        ValueError: for more tokens than the model has.
    """
    last = max(tokenizer.get_vocab().values())
    if last >= vocab_size:
        raise ValueError(f"the tokenizer has ids up to {last} and the model {vocab_size} tokens.")
    control = control_names(tokenizer)
    tokens = {index: f"[PAD{index}]" for index in range(vocab_size)}
    kinds = dict.fromkeys(tokens, gguf.TokenType.UNUSED)
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = control.get(token, token)
        kinds[index] = gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL
    rust_model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # CODEPATH: chatglm2 and chatglm3 have a SentencePiece model; glm4 has ranked bytes.
    if rust_model["byte_fallback"]:
        add_pieces(writer, tokenizer.tokenizer.sp_model, kinds)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("glm4")
        writer.add_token_merges([" ".join(pair) for pair in rust_model["merges"]])
    writer.add_token_list([tokens[index] for index in range(vocab_size)])
    writer.add_token_types([kinds[index] for index in range(vocab_size)])
    # llama.cpp can put one token before a text; these generations put two, which the template writes.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token_id in zip(adders, tokenizer.stop_token_ids()):
        add(token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(chat_template(tokenizer, rust_model["byte_fallback"]))


def add_pieces(writer: gguf.GGUFWriter, pieces: Any, kinds: dict[int, gguf.TokenType]) -> None:
    """Write the scores of SentencePiece's pieces, and set the types of those that are no text."""
    for index in range(len(pieces)):
        if pieces.is_unknown(index):
            kinds[index] = gguf.TokenType.UNKNOWN
        elif pieces.is_control(index):
            kinds[index] = gguf.TokenType.CONTROL
        elif pieces.is_byte(index):
            kinds[index] = gguf.TokenType.BYTE
    scores = [pieces.get_score(index) for index in range(len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores + [0.0] * (len(kinds) - len(scores)))
    writer.add_add_space_prefix(True)
    writer.add_unk_token_id(pieces.unk_id())


def chat_template(tokenizer: Any, has_leading_spaces: bool) -> str:
    """The tokenizer's template as llama.cpp needs it; one of somebody's own loses only what llama.cpp cannot read."""
    chat_format = tokenizer.chat_format
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template["default"]
    template = GENERATION_TAG.sub(r"{#\1 \2#}", template)
    names = control_names(tokenizer)
    opening = "".join(chat_format.opening_tokens)
    template = template.replace(opening, "".join(names[token] for token in chat_format.opening_tokens))
    new_names = [name for token, name in names.items() if name != token]
    plain_macro = load_module("conversation_templates").plain_macro
    marked = chat_format.marked_tokens
    template = template.replace(plain_macro(marked), plain_macro((*marked, *new_names)))
    if has_leading_spaces and not chat_format.uses_pairs:
        # CODEPATH: chatglm3 encodes what follows the first line of a message on its own; chatglm2 has one text.
        template = template.replace(r"'\n' + content", r"'\n ' + content").replace(r"'\n```python", r"'\n ```python")
        template = template.replace(r"<|system|>\n", r"<|system|>\n ")
    return template


def export(folder: Path, output: Path, kind: str) -> None:
    """Write the file.

    Raises:
        OSError, ValueError: for a folder that is no checkpoint, or that llama.cpp cannot run; nothing is written then.
    """
    if output.exists():
        raise ValueError(f"{output} exists, and nothing is written over.")
    check_model_type(folder)
    register()
    check_network(AutoConfig.from_pretrained(folder))
    tokenizer = load_tokenizer(folder)
    model = AutoModel.from_pretrained(folder, dtype="auto")
    if model.quantized:
        model.dequantize()
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("transformer.output_layer.weight")
    try:
        writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
        writer.add_name(folder.resolve().name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_network(writer, model.config)
        add_vocabulary(writer, tokenizer, model.config.vocab_size)
        add_weights(writer, weights, model.config.num_hidden_layers, kind)
        writer.close()
    except BaseException:
        output.unlink(missing_ok=True)
        raise


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint folder of ChatGLM2, ChatGLM3 or GLM-4")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--type", choices=TYPES, default="f16", help="of the matrices (default: %(default)s)")
    arguments = parser.parse_args(words)
    try:
        export(arguments.folder, arguments.output, arguments.type)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


__all__ = ["add_network", "check_network", "export", "tensor_names"]


if __name__ == "__main__":
    logging.set_verbosity_error()
    sys.exit(main())

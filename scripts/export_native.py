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
"""Writes a checkpoint for the library's own `GlmForCausalLM`: `python scripts/export_native.py FOLDER OUT`.

The new folder needs no code of this repository, so it loads without `trust_remote_code`, and in engines that know the
architecture by its name, such as vLLM. For mlx-lm, whose own class is another network, a file `mlx_glm.py` stands in it.
ChatGLM2, ChatGLM3 and GLM-4 are that network, under other names:

| here | there |
|---|---|
| `query_key_value` | `q_proj`, `k_proj`, `v_proj`: its rows, in this order |
| `dense_h_to_4h`, `dense_4h_to_h` | `gate_up_proj`, the gate first in both, and `down_proj` |
| neighbours in the first half of a head are turned | the same, `partial_rotary_factor` 0.5 |
| `rope_ratio` raises the base (ChatGLM3, GLM-4) | `rope_theta` |
| `rope_ratio` divides positions (ChatGLM2) | `rope_type` "linear" |

What is another network is refused, and the message names every reason: ChatGLM-6B, GLM and GLM-130B, GLM-4V, a P-tuning
prefix. The logits are equal up to rounding; in half precision the norms there round once more. The tokenizer is written by
`native_tokenizer.py`, which says where its ids differ.

Weights are read and written one file at a time, so memory holds one file of the result (`--max-shard-size`). FOLDER is
only read, OUT must not exist, and no code in FOLDER is run.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from folder_switch import Change, UpgradeError
from recognise_checkpoint import Checkpoint, load_code, recognise


# Ours -> the library's, the same in every layer.
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
OTHER_NAMES = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
# What mlx-lm builds the network from; nothing else reads it.
MLX_FILE = Path(__file__).with_name("mlx_glm.py")
# Computed from the configuration.
NOT_NEEDED = "transformer.rotary_pos_emb.inv_freq"


def obstacles(config: Any) -> list[str]:
    """What the network of a configuration does that `GlmForCausalLM` cannot, in words."""
    found = {
        "its context sees itself both ways": config.is_bidirectional,
        "its positions have two rows": config.has_block_positions,
        "its positions are embeddings": config.learned_positions,
        "one position turns all of a head": not config.learned_positions and config.rotary_whole_head,
        "its rotary pairs are halves of a head": not config.rotary_interleaved,
        "its rotary frequencies are rounded": config.rounds_rotary_frequencies,
        "its norms are LayerNorms": not config.rmsnorm,
        "its residual starts behind the norm": config.apply_residual_connection_post_layernorm,
        "its residual is scaled": config.residual_scale != 1,
        "its residual is kept in float32": config.fp32_residual_connection,
        "no norm follows its last layer": not config.post_layer_norm,
        "its feed-forward layers have no gate": not config.is_mlp_gated,
        "the gate is the second half": not config.gate_comes_first,
        f"its activation is {config.activation}": config.activation != "silu",
        "all its layers have a bias": config.add_bias_linear,
        "each head has its query, key and value in a row": config.is_qkv_interleaved,
        "it has a prefix of P-tuning v2 (`pre_seq_len`)": config.pre_seq_len is not None,
        "it has eyes (`vision_config`)": config.vision_config is not None,
    }
    return [reason for reason, is_so in found.items() if is_so]


def native_config(config: Any, dtype: Any, stop_ids: list[int]) -> Any:
    """The `GlmConfig` of the same network.

    Args:
        config: our configuration.
        dtype: of the weights.
        stop_ids: what ends an answer.
    """
    from transformers import GlmConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    # CODEPATH: chatglm2-6b-32k divides the position by the ratio; chatglm3-6b-32k/-128k and glm4 raise the base.
    if not config.scales_positions:
        rope["rope_theta"] *= config.rope_ratio
    elif config.rope_ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(config.rope_ratio)}
    return GlmConfig(
        architectures=["GlmForCausalLM"],
        dtype=dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_act=config.activation,
        attention_bias=config.add_qkv_bias,
        attention_dropout=config.attention_dropout,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=rope,
        eos_token_id=stop_ids,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
    )


def native_sources(config: Any) -> Iterator[tuple[str, str, slice]]:
    """For every tensor of `GlmForCausalLM`: its name, the tensor it is taken from, and which rows of that it is."""
    query_size, key_size = (num * config.head_dim for num in (config.num_attention_heads, config.num_key_value_heads))
    rows = {
        "q_proj": slice(0, query_size),
        "k_proj": slice(query_size, query_size + key_size),
        "v_proj": slice(query_size + key_size, query_size + 2 * key_size),
    }
    for ours, native in OTHER_NAMES.items():
        if not (native == "lm_head.weight" and config.tie_word_embeddings):
            yield native, ours, slice(None)
    for index in range(config.num_hidden_layers):
        here, there = f"transformer.encoder.layers.{index}.", f"model.layers.{index}."
        for ours, native in LAYER_NAMES.items():
            yield there + native, here + ours, slice(None)
        for kind in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            for name, part in rows.items():
                yield f"{there}self_attn.{name}.{kind}", f"{here}self_attention.query_key_value.{kind}", part


def native_weights(config: Any, stored: Any, dequantize: bool) -> Any:
    """The tensors of `GlmForCausalLM` by name, each without values until it is read.

    Args:
        config: our configuration.
        stored: the tensors of the checkpoint.
        dequantize: whether quantized weights become floats.

    Raises:
        UpgradeError: if tensors are missing, have another shape, are quantized, or have no place there.
    """
    import torch
    from convert_weights import Weights

    sources = {native: (ours, rows) for native, ours, rows in native_sources(config)}
    scales = {f"{name}_scale" for name in stored if f"{name}_scale" in stored}
    if scales and not dequantize:
        raise UpgradeError("the weights are quantized, which GlmForCausalLM does not read; --dequantize makes floats.")
    names = {ours for ours, _ in sources.values()}
    if missing := sorted(names - stored.keys()):
        raise UpgradeError(f"{len(missing)} weights are missing, such as {missing[0]}.")
    tied = {"transformer.output_layer.weight"} if config.tie_word_embeddings else set()
    if extra := sorted(stored.keys() - names - scales - tied - {NOT_NEEDED}):
        raise UpgradeError(f"GlmForCausalLM has no place for {len(extra)} weights, such as {extra[0]}.")
    dtype = stored["transformer.embedding.word_embeddings.weight"].dtype
    dequantize_weight = load_code("quantization_kernels").dequantize_weight

    class NativeWeights(Weights):
        def read(self, name: str) -> torch.Tensor:
            ours, rows = sources[name]
            tensor = stored.read(ours)
            if f"{ours}_scale" in scales:
                tensor = dequantize_weight(tensor, stored.read(f"{ours}_scale"), self[name].shape[1], dtype)
            return tensor[rows]

    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(native_config(config, dtype, [])).state_dict()
    weights = NativeWeights({native: expected[native].to(dtype) for native in sources})
    for native, (ours, rows) in sources.items():
        shape = stored[ours].shape
        if f"{ours}_scale" not in scales and stored[ours][rows].shape != weights[native].shape:
            raise UpgradeError(f"{ours} has the shape {list(shape)}, which config.json does not say.")
    return weights


def read_checkpoint(folder: Path) -> Any:
    """The tensors of a checkpoint folder by their names. Their values stay on the disk until they are read.

    Raises:
        UpgradeError: if there are none.
    """
    from convert_weights import StoredWeights, read_weights
    from folder_switch import read_json

    if files := sorted(folder.glob("model*.safetensors")):
        return StoredWeights(files)
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UpgradeError(f"{folder} has no weights: neither model*.safetensors nor pytorch_model*.bin.")
    return read_weights(files, read_json(folder / "pytorch_model.bin.index.json"))


def read_config(checkpoint: Checkpoint) -> Any:
    """Our configuration of a checkpoint that can be exported.

    Raises:
        UpgradeError: for another network than `GlmForCausalLM`, and for weights of other quantizers.
    """
    config_class = load_code("configuration_chatglm").ChatGLMConfig
    try:
        config = config_class.from_dict({**checkpoint.config, "model_version": checkpoint.generation})
    except (TypeError, ValueError) as error:
        raise UpgradeError(f"config.json: {error}") from error
    if reasons := obstacles(config):
        raise UpgradeError(f"{checkpoint.generation} is another network than GlmForCausalLM: {'; '.join(reasons)}.")
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method", "chatglm")
    if method != load_code("quantization_layers").QUANT_METHOD:
        raise UpgradeError(f"the weights are quantized by {method!r}, which cannot be undone here.")
    return config


def export(folder: Path, output: Path, args: argparse.Namespace) -> None:
    """Write the new folder; nothing is left of it if that fails.

    Raises:
        UpgradeError: for a checkpoint that cannot be exported, or a folder that exists.
    """
    checkpoint = recognise(folder, args.model_version)
    config = read_config(checkpoint)
    # Imported late, for torch takes its time and the refusals above need not wait.
    from convert_weights import convert
    from native_tokenizer import load_tokenizer, native_tokenizer, save_native_tokenizer
    from transformers import GenerationConfig
    from upgrade_checkpoint import check_room

    tokenizer = load_tokenizer(checkpoint)
    stored = read_checkpoint(folder)
    weights = native_weights(config, stored, args.dequantize)
    try:
        output.mkdir(parents=True)
    except FileExistsError:
        raise UpgradeError(f"{output} exists; name a folder that does not, nothing is written over.") from None
    try:
        check_room(output, weights, "The new folder")
        with Change(output) as change:
            convert(weights, args.max_shard_size, change)
        native = native_tokenizer(tokenizer)
        save_native_tokenizer(native, output)
        stop_ids = tokenizer.stop_token_ids()
        settings = {}
        if (folder / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(folder).to_diff_dict()
        ends = {"eos_token_id": stop_ids, "pad_token_id": config.pad_token_id}
        GenerationConfig.from_dict({**settings, **ends}).save_pretrained(output)
        shutil.copyfile(MLX_FILE, output / MLX_FILE.name)
        dtype = stored["transformer.embedding.word_embeddings.weight"].dtype
        new_config = native_config(config, dtype, stop_ids)
        new_config.model_file = MLX_FILE.name
        # Last, so that a folder that is not whole does not load.
        new_config.save_pretrained(output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    print(f"{output}: {checkpoint.generation} as GlmForCausalLM, {len(weights)} tensors in {dtype}")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="the new folder, which must not exist")
    parser.add_argument("--model-version", metavar="NAME", help="chatglm2, chatglm3, ..., where the files do not tell")
    parser.add_argument("--dequantize", action="store_true", help="turn quantized weights into floats")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: 2GB")
    args = parser.parse_args(words)
    try:
        export(args.folder, args.output, args)
    except (UpgradeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

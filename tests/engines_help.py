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
"""Folders for the tests of other engines: published layouts with random weights, in sizes that the engines take.

They compute the width of a head as hidden size over heads, which the recorded cases do not keep to, and vLLM has
kernels for heads of 32 channels and more. The rest of config.json, and the vocabulary, are those of the recorded cases.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import REFERENCE, REPOSITORY
from transformers import AutoConfig, AutoModel, PreTrainedModel


sys.path.insert(0, str(REPOSITORY / "scripts"))

import upgrade_checkpoint  # noqa: E402


SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "ffn_hidden_size": 192,
    "inner_hidden_size": 512,
    "multi_query_group_num": 2,
    "num_layers": 2,
    "num_hidden_layers": 2,
    "seq_length": 1024,
    "max_sequence_length": 1024,
}
# Embeddings of the published checkpoints, whose vocabularies may take the place of the small ones.
PUBLISHED_SIZES = {"chatglm2": 65024, "chatglm3": 65024, "glm4": 151552}
# What encodings have to agree on: both scripts, spaces, control tokens and parts of them, bytes of rare characters.
TEXTS = [
    "你好，世界！",
    "The people of Sopot read a soap opera: (sop) eop </s> <s> [gMASK]sop <|user|> <0x0A>",
    "  leading and trailing  ",
    "a\n\n  b\n\tc\r\n d\n",
    "１２３ 1234567 3.14159 ½ ℃ …… —— ‘quoted’ “quoted”",
    "def f(x):\n    return {'a': x ** 2}  # it's I'LL we've",
    "𠮷野家 👩‍👩‍👧 ﷺ \u200b e\u0301 ▁ \u2581\u2581x",
    "Ünïcode İstanbul ǅ ß ſ",
    "啊" * 70,
    "",
]


def write_weights(folder: Path, model: PreTrainedModel) -> None:
    """The weights of a model as they are published: one `.bin` file, with the rotary buffer of then."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    # CODEPATH: chatglm-6b and its kin have other names in their files.
    for ours, published in model.config.published_names.items():
        weights = {name.replace(ours, published): weight for name, weight in weights.items()}
    weights["transformer.rotary_pos_emb.inv_freq"] = torch.ones(model.config.head_dim // 4)
    torch.save(weights, folder / "pytorch_model.bin")


def published_folder(target: Path, case: str, vocabulary: Path | None = None, **changes: Any) -> Path:
    """Write a checkpoint in the layout of a recorded case, without code in it.

    Args:
        target: the folder, which must not exist.
        case: of `tests/reference`.
        vocabulary: a folder with another tokenizer.model or ice_text.model.
        changes: further keys of config.json.
    """
    source = REFERENCE / case
    shutil.copytree(
        source, target, ignore=shutil.ignore_patterns("expected.*", "*.bin*", "*.safetensors*", "*.md", "images")
    )
    config = json.loads((source / "config.json").read_text("utf-8"))
    config |= {key: value for key, value in SIZES.items() if key in config} | changes
    if vocabulary is not None:
        config["padded_vocab_size"] = PUBLISHED_SIZES[case]
        for file in vocabulary.glob("*.model"):
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def upgraded_folder(target: Path, case: str, vocabulary: Path | None = None, seed: int = 0, **changes: Any) -> Path:
    """The same after the upgrade command, with random weights that make some tokens much likelier than others."""
    folder = published_folder(target, case, vocabulary, **changes)
    for source in REPOSITORY.glob("*.py"):
        shutil.copyfile(source, folder / source.name)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    for source in REPOSITORY.glob("*.py"):
        (folder / source.name).unlink()
    write_weights(folder, model)
    if upgrade_checkpoint.main([str(folder)]) != 0:
        raise RuntimeError(f"{folder} was not upgraded")
    return folder

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
"""llama.cpp, the real one, on the files that `scripts/export_gguf.py` writes: `make test-engines`.

Both compute from the same numbers: ours from those that the file holds, decoded.
"""

import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REFERENCE, REPOSITORY
from engines_help import TEXTS, upgraded_folder
from generations import RECORDED
from transformers import PreTrainedModel


pytestmark = pytest.mark.engines

sys.path.insert(0, str(REPOSITORY / "scripts"))

gguf = pytest.importorskip("gguf", reason="needs requirements/engines.txt: make test-engines")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs requirements/engines.txt: make test-engines")
import export_gguf  # noqa: E402
import upgrade_checkpoint  # noqa: E402
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402
from local_code import load_tokenizer  # noqa: E402
from transformers import AutoModel  # noqa: E402


CASES = ["chatglm2", "chatglm2-32k", "chatglm3", "chatglm3-32k", "glm4"]
ROLE_CASES = [name for name in CASES if RECORDED[name].has_roles]
# The folders of the published vocabularies, by case.
VOCABULARIES = ["chatglm2", "chatglm3", "glm4"]
QUERIES = ("你好，世界", "show me the people of the city " * 8)

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气 of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京", "days": 2}}}
PLAIN_CHATS = {
    "question": [{"role": "user", "content": "The people of Sopot: (sop) eop?"}],
    "turns": [
        {"role": "system", "content": "Be kind.\nAlways."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "  Hi there,\n\nyou"},
        {"role": "user", "content": " what\n\n now "},
    ],
}
TOOL_CHAT = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"t": 18}'},
    {"role": "assistant", "content": "18 °C"},
    {"role": "user", "content": "and now?"},
]


@pytest.fixture(scope="module", autouse=True)
def alone(leave_the_auto_classes_alone: None) -> None:
    """The script registers this repository's classes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def make(name: str, vocabulary: Path | None = None, **changes: Any) -> Path:
        return upgraded_folder(tmp_path_factory.mktemp("published") / name, name, vocabulary, **changes)

    return make


@pytest.fixture(scope="module")
def exported(folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def export(name: str, kind: str = "f16", vocabulary: Path | None = None) -> Path:
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        assert export_gguf.main([str(folder(name, vocabulary)), str(path), "--type", kind]) == 0
        return path

    return export


@pytest.fixture(scope="module")
def llama(exported: Callable[..., Path]) -> Callable[..., Any]:
    @cache
    def load(*arguments: Any) -> Any:
        return llama_cpp.Llama(str(exported(*arguments)), n_ctx=512, n_threads=1, verbose=False)

    yield load
    load.cache_clear()


def same_numbers(folder: Path, path: Path) -> PreTrainedModel:
    """Our model of a folder with the weights that a file holds."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    stored = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }
    weights = model.state_dict()
    names = export_gguf.tensor_names(weights, model.config.num_hidden_layers)
    assert set(names.values()) == set(stored)
    model.load_state_dict({name: stored[names[name]].reshape(weight.shape) for name, weight in weights.items()})
    return model.eval()


def greedy(engine: Any, ids: list[int], length: int) -> list[int]:
    engine.reset()
    tokens = engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    return [token for token, _ in zip(tokens, range(length))]


def our_greedy(model: PreTrainedModel, ids: list[int], length: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=length, max_length=None, eos_token_id=[]
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(folder: Any, exported: Any, llama: Any, name: str) -> None:
    tokenizer = load_tokenizer(folder(name))
    model = same_numbers(folder(name), exported(name))
    for query in QUERIES:
        ids = tokenizer.build_chat_input(query)["input_ids"][0].tolist()
        assert greedy(llama(name), ids, 24) == our_greedy(model, ids, 24)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_of_8_bits(folder: Any, exported: Any, llama: Any, name: str) -> None:
    """llama.cpp rounds what such a matrix is multiplied with to 8 bits, too: near ties may fall to the other side."""
    tokenizer = load_tokenizer(folder(name))
    model = same_numbers(folder(name), exported(name, "q8_0"))
    for query in QUERIES:
        ids = tokenizer.build_chat_input(query)["input_ids"][0].tolist()
        answer = greedy(llama(name, "q8_0"), ids, 24)
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert ((logits.amax(-1) - chosen) / logits.std(-1)).max() < 0.05


def test_matrices_have_the_type_that_was_asked_for(exported: Any) -> None:
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(exported("glm4", "q8_0")).tensors}
    assert {kind for name, kind in kinds.items() if name.endswith(("norm.weight", "bias"))} == {"F32"}
    assert {kind for name, kind in kinds.items() if not name.endswith(("norm.weight", "bias"))} == {"Q8_0"}


def check_texts(engine: Any, tokenizer: Any) -> None:
    # GLM-4's published tokenizer takes control tokens from any text, the others from none.
    takes_control = not tokenizer.backend_tokenizer.encode_special_tokens and "<|user|>" in tokenizer.tokenize(
        "<|user|>"
    )
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert engine.tokenize(text.encode(), add_bos=False, special=takes_control) == ids
        assert engine.tokenize(text.encode(), add_bos=True, special=takes_control) == ids


def check_chats(engine: Any, tokenizer: Any, has_roles: bool) -> None:
    """What llama-cpp-python renders and encodes is what our tokenizer makes of the messages."""
    render = Jinja2ChatFormatter(engine.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
    chats: list[dict[str, Any]] = [{"messages": chat} for chat in PLAIN_CHATS.values()]
    if has_roles:
        chats += [{"messages": TOOL_CHAT}, {"messages": TOOL_CHAT, "tools": [TOOL]}]
        chats.append({"messages": PLAIN_CHATS["turns"], "tools": [TOOL]})
    for chat in chats:
        messages, tools = chat["messages"], chat.get("tools")
        ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
        assert engine.tokenize(render(**chat).prompt.encode(), add_bos=False, special=True) == ids


@pytest.mark.parametrize("name", CASES)
def test_texts_and_conversations(folder: Any, llama: Any, name: str) -> None:
    tokenizer = load_tokenizer(folder(name))
    check_texts(llama(name), tokenizer)
    check_chats(llama(name), tokenizer, RECORDED[name].has_roles)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_vocabularies(folder: Any, llama: Any, real_tokenizers: Path, name: str) -> None:
    vocabulary = real_tokenizers / name
    tokenizer = load_tokenizer(folder(name, vocabulary))
    check_texts(llama(name, "f16", vocabulary), tokenizer)
    check_chats(llama(name, "f16", vocabulary), tokenizer, RECORDED[name].has_roles)


@pytest.mark.parametrize("name", CASES)
def test_stop_tokens(folder: Any, llama: Any, name: str) -> None:
    tokenizer, vocabulary = load_tokenizer(folder(name)), llama(name)._model.vocab
    ends = {index for index in range(len(tokenizer)) if llama_cpp.llama_vocab_is_eog(vocabulary, index)}
    assert ends == set(tokenizer.stop_token_ids())


@pytest.mark.parametrize("name", CASES)
def test_no_message_makes_a_control_token(folder: Any, llama: Any, name: str) -> None:
    """What looks like one in a message keeps the joiner that hides it, as llama.cpp does not know of it."""
    tokenizer = load_tokenizer(folder(name))
    control = set(tokenizer.all_special_ids)
    names = [*export_gguf.control_names(tokenizer).values(), *export_gguf.control_names(tokenizer)]
    render = Jinja2ChatFormatter(llama(name).metadata["tokenizer.chat_template"], eos_token="", bos_token="")

    def count(text: str) -> int:
        prompt = render(messages=[{"role": "user", "content": text}]).prompt
        return sum(token in control for token in llama(name).tokenize(prompt.encode(), add_bos=False, special=True))

    assert count(" ".join(names)) == count("x") > 0


@pytest.mark.parametrize("kind", export_gguf.TYPES)
def test_answers_of_the_bundled_checkpoint(tmp_path: Path, kind: str) -> None:
    bundled = REPOSITORY / "examples" / "tiny-chatglm3"
    path = tmp_path / "model.gguf"
    assert export_gguf.main([str(bundled), str(path), "--type", kind]) == 0
    engine = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=1, verbose=False)
    tokenizer, model = load_tokenizer(bundled), same_numbers(bundled, path)
    render = Jinja2ChatFormatter(engine.metadata["tokenizer.chat_template"], eos_token="", bos_token="")
    for query in ("你好", "What is the capital of Italy?"):
        prompt = render(messages=[{"role": "user", "content": query}]).prompt
        ids = engine.tokenize(prompt.encode(), add_bos=False, special=True)
        answer = takewhile(lambda token: token != engine.token_eos(), greedy(engine, ids, 64))
        # Decoded by our tokenizer: llama-cpp-python (0.3.36) drops pieces of more than 32 bytes, such as this one has.
        assert tokenizer.decode(list(answer)).strip() == model.chat(tokenizer, query, do_sample=False)[0]


def test_a_quantized_checkpoint_is_decoded(tmp_path: Path) -> None:
    bundled = REPOSITORY / "examples" / "tiny-chatglm3"
    model = AutoModel.from_pretrained(bundled, dtype=torch.float16).quantize(8)
    tokenizer = load_tokenizer(bundled)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "int8")
    assert export_gguf.main([str(tmp_path / "int8"), str(tmp_path / "model.gguf")]) == 0
    engine = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, n_threads=1, verbose=False)
    ids = tokenizer.build_chat_input("你好")["input_ids"][0].tolist()
    assert greedy(engine, ids, 8) == our_greedy(model.dequantize().float(), ids, 8)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("chatglm1", {}, "it reads its context in both directions, and llama.cpp's `chatglm` is causal"),
        ("chatglm3", {"kv_channels": 16}, "its heads are 4 × 16 wide, which is not the hidden size 128"),
        ("glm4", {"pre_seq_len": 4}, "it has a P-tuning prefix"),
        ("chatglm2", {"padded_vocab_size": 480}, "the tokenizer has ids up to 484 and the model 480 tokens"),
    ],
)
def test_refusals(
    folder: Any, tmp_path: Path, capsys: Any, record_property: Any, name: str, changes: Any, reason: str
) -> None:
    path = tmp_path / "model.gguf"
    assert export_gguf.main([str(folder(name, **changes)), str(path)]) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: .*\.$", error) and reason in error
    assert not path.exists()
    record_property("refused", reason)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("glm-chinese", "it reads its context in both directions"),
        ("glm-130b", "it reads its context in both directions"),
        ("glm4v", "it sees pictures"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, capsys: Any, record_property: Any, case: str, reason: str) -> None:
    folder = shutil.copytree(REFERENCE / case, tmp_path / "folder")
    assert upgrade_checkpoint.main([str(folder)]) == 0
    capsys.readouterr()
    assert export_gguf.main([str(folder), str(tmp_path / "model.gguf")]) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: llama.cpp cannot run this checkpoint: .*\.$", error) and reason in error
    assert not (tmp_path / "model.gguf").exists()
    record_property("refused", reason)


def test_nothing_is_written_over(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "model.gguf").write_text("mine", encoding="utf-8")
    assert export_gguf.main([str(REPOSITORY / "examples" / "tiny-chatglm3"), str(tmp_path / "model.gguf")]) == 2
    assert "exists, and nothing is written over" in capsys.readouterr().err
    assert (tmp_path / "model.gguf").read_text("utf-8") == "mine"

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
"""Answers that hold to a JSON schema, by outlines and xgrammar: `make test-engines`.

The weights are random and the temperature is high, so that whatever a library lets through is written sooner or later.
"""

import importlib
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from engines_help import upgraded_folder
from generations import GENERATION_CASES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast


pytestmark = pytest.mark.engines

jsonschema = pytest.importorskip("jsonschema", reason="needs requirements/engines.txt: make test-engines")
outlines = pytest.importorskip("outlines", reason="needs requirements/engines.txt: make test-engines")
xgrammar = pytest.importorskip("xgrammar", reason="needs requirements/engines.txt: make test-engines")

# Everything in it ends. outlines (1.3.3) does not hold to `minimum` and `maximum`.
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["北京", "Rome"]},
        "days": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[a-z0-9 ]{2,6}$"},
        "note": {"type": "null"},
    },
    "required": ["city", "days", "code", "note"],
    "additionalProperties": False,
}
FAST_CASES = [name for name in GENERATION_CASES if name != "chatglm1"]
SEEDS = 4
SAMPLING = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 200, "max_length": None}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    @cache
    def load(name: str) -> tuple[Any, Any]:
        folder = upgraded_folder(tmp_path_factory.mktemp("published") / name, name)
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    return load


def check(answer: str, schema: Any = SCHEMA) -> None:
    jsonschema.validate(json.loads(answer), schema)


def xgrammar_processor(model: Any, tokenizer: Any, schema: Any) -> Any:
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=model.config.vocab_size, stop_token_ids=tokenizer.stop_token_ids()
    )
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)
    return xgrammar.contrib.hf.LogitsProcessor(grammar)


@pytest.mark.parametrize("name", FAST_CASES)
def test_xgrammar(loaded: Any, name: str) -> None:
    model, tokenizer = loaded(name)
    ids = tokenizer.build_chat_input("你好")["input_ids"]
    answers = set()
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        processor = xgrammar_processor(model, tokenizer, SCHEMA)
        output = model.generate(ids, logits_processor=[processor], eos_token_id=tokenizer.stop_token_ids(), **SAMPLING)
        answers.add(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        assert output[0, -1] in tokenizer.stop_token_ids()
    assert len(answers) > 1
    for answer in answers:
        check(answer)


@pytest.mark.parametrize("name", FAST_CASES)
def test_xgrammar_in_chat(loaded: Any, name: str) -> None:
    model, tokenizer = loaded(name)
    torch.manual_seed(0)
    processor = xgrammar_processor(model, tokenizer, SCHEMA)
    answer, _ = model.chat(tokenizer, "你好", temperature=5.0, logits_processor=[processor])
    check(answer)


@pytest.mark.parametrize("name", FAST_CASES)
def test_xgrammar_writes_characters_of_several_tokens(loaded: Any, name: str) -> None:
    schema = {"enum": ["São Paulo 🚀"]}
    model, tokenizer = loaded(name)
    processor = xgrammar_processor(model, tokenizer, schema)
    check(model.chat(tokenizer, "你好", temperature=5.0, logits_processor=[processor])[0], schema)


@pytest.mark.parametrize("name", ["chatglm1"])
def test_xgrammar_refuses_a_tokenizer_that_is_not_fast(loaded: Any, record_property: Any, name: str) -> None:
    model, tokenizer = loaded(name)
    with pytest.raises(ValueError, match="^Unsupported tokenizer type: .*ChatGLM6BTokenizer"):
        xgrammar_processor(model, tokenizer, SCHEMA)
    record_property("refused", "Unsupported tokenizer type")


def allowed_control_characters(string: dict[str, Any]) -> int:
    """How many of the bytes below 32 a string of a schema may hold by xgrammar, for a vocabulary laid out as Llama's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *'{}":abc']
    info = xgrammar.TokenizerInfo(pieces, xgrammar.VocabType.BYTE_FALLBACK, stop_token_ids=[2])
    schema = {"type": "object", "properties": {"a": string}, "required": ["a"]}
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema)))
    assert matcher.accept_string('{"a": "')
    mask = xgrammar.allocate_token_bitmask(1, len(pieces))
    matcher.fill_next_token_bitmask(mask, 0)
    return sum(mask[0, index // 32].item() >> index % 32 & 1 for index in range(3, 35))


def test_raw_control_characters_are_of_xgrammar() -> None:
    """No vocabulary of ours: lengths of strings make xgrammar (0.2.8) let through what JSON forbids."""
    assert allowed_control_characters({"type": "string"}) == 0
    assert allowed_control_characters({"type": "string", "maxLength": 6}) == 30
    assert allowed_control_characters({"type": "string", "minLength": 1}) == 30


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_outlines(loaded: Any, name: str) -> None:
    model, tokenizer = loaded(name)
    generator = outlines.Generator(
        outlines.from_transformers(model, tokenizer), outlines.types.JsonSchema(json.dumps(SCHEMA))
    )
    answers = set()
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        answers.add(generator("你好", **SAMPLING))
    assert len(answers) > 1
    for answer in answers:
        check(answer)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_characters_of_several_tokens_are_beyond_outlines(loaded: Any, record_property: Any, name: str) -> None:
    """It asks for the text of each token alone, which a byte has not, in a tokenizer of the library's as in ours."""
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256))), [])),
        eos_token="<eos>",
    )
    plain.backend_tokenizer.decoder = decoders.ByteLevel()
    assert outlines.models.transformers.TransformerTokenizer(plain).convert_token_to_string("Ã") == "\ufffd"
    schema = outlines.types.JsonSchema(json.dumps({"enum": ["São Paulo"]}))
    message = "The vocabulary provided is incompatible with the regex"
    with pytest.raises(ValueError, match=f"^{message}"):
        outlines.Generator(outlines.from_transformers(*loaded(name)), schema)
    record_property("refused", message)


def test_lm_format_enforcer_does_not_import(record_property: Any) -> None:
    """It names a class where Transformers 5 no longer has it, and takes that for a missing Transformers."""
    with pytest.raises(ImportError, match="^transformers is not installed"):
        importlib.import_module("lmformatenforcer.integrations.transformers")
    record_property("refused", "transformers is not installed")

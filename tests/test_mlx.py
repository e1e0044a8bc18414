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
"""mlx-lm, the real one, on Linux's CPU build of MLX, and the folders of `scripts/export_native.py`: `make test-engines`."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REFERENCE, REPOSITORY
from engines_help import upgraded_folder
from transformers import AutoModel, AutoTokenizer


pytestmark = pytest.mark.engines

sys.path.insert(0, str(REPOSITORY / "scripts"))

mlx = pytest.importorskip("mlx.core", reason="needs requirements/engines.txt: make test-engines")
mlx_lm = pytest.importorskip("mlx_lm", reason="needs requirements/engines.txt: make test-engines")
import export_native  # noqa: E402


CASES = ["chatglm2", "chatglm2-32k", "chatglm3", "chatglm3-32k", "glm4"]
QUERIES = ("你好，世界", "show me the people of the city " * 8)
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: upgraded_folder(tmp_path_factory.mktemp("published") / name, name))


@pytest.fixture(scope="module")
def native(folder: Callable[[str], Path]) -> Callable[[str], Path]:
    @cache
    def export(name: str) -> Path:
        out = folder(name).with_name(f"{name}-native")
        assert export_native.main([str(folder(name)), str(out)]) == 0
        return out

    return export


@pytest.fixture(scope="module")
def ours(folder: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    @cache
    def load(name: str) -> tuple[Any, Any]:
        model = AutoModel.from_pretrained(folder(name), trust_remote_code=True, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder(name), trust_remote_code=True)

    return load


def load_native(folder: Path, **options: Any) -> tuple[Any, Any]:
    """mlx-lm's model and tokenizer, in float32 whatever the weights are."""
    model, tokenizer = mlx_lm.load(str(folder), **options)
    model.set_dtype(mlx.float32)
    return model, tokenizer


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return torch.tensor(model(mlx.array([ids])).tolist())


def greedy(model: Any, ids: list[int]) -> list[int]:
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mlx.array(ids), model, max_tokens=LENGTH)]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(native: Any, ours: Any, name: str) -> None:
    model, tokenizer = ours(name)
    loaded, their_tokenizer = load_native(native(name), trust_remote_code=True)
    settings = {"do_sample": False, "max_new_tokens": LENGTH, "max_length": None, "eos_token_id": []}
    for query in QUERIES:
        ids = their_tokenizer.apply_chat_template([{"role": "user", "content": query}], add_generation_prompt=True)
        assert ids == tokenizer.build_chat_input(query)["input_ids"][0].tolist()
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits
        torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-4, rtol=0)
        assert greedy(loaded, ids) == model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["chatglm3"])
def test_answers_of_the_bundled_checkpoint(
    tmp_path: Path, copy_bundled: Callable[[str, Path], Path], name: str
) -> None:
    """Stop tokens and text, too."""
    folder = copy_bundled(f"tiny-{name}", tmp_path)
    assert export_native.main([str(folder), str(tmp_path / "native")]) == 0
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    loaded, their_tokenizer = load_native(tmp_path / "native", trust_remote_code=True)
    for query in ("你好", "What is the capital of Italy?"):
        prompt = their_tokenizer.apply_chat_template([{"role": "user", "content": query}], add_generation_prompt=True)
        answer = mlx_lm.generate(loaded, their_tokenizer, prompt, max_tokens=64)
        assert answer.strip() == model.chat(tokenizer, query, do_sample=False)[0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
def test_quantized_by_mlx(native: Any, tmp_path: Path, name: str, bits: int) -> None:
    """`mlx_lm.convert` takes the file with it."""
    settings = {"quantize": True, "q_bits": bits, "trust_remote_code": True}
    mlx_lm.convert(str(native(name)), str(tmp_path / "quantized"), **settings)
    floats, _ = load_native(native(name), trust_remote_code=True)
    quantized, _ = load_native(tmp_path / "quantized", trust_remote_code=True)
    ids = list(range(64, 128))
    expected, found = logits(floats, ids), logits(quantized, ids)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 0 < error < {8: 0.02, 4: 0.3}[bits]


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
def test_it_asks_before_it_runs_the_file(native: Any, record_property: Any, name: str) -> None:
    message = "requires importing and running a custom module"
    with pytest.raises(ValueError, match=message):
        mlx_lm.load(str(native(name)))
    record_property("refused", f"without `trust_remote_code=True`: {message}")


@pytest.mark.parametrize("name", ["chatglm1", "glm4v"])
def test_refusals(tmp_path: Path, capsys: Any, record_property: Any, name: str) -> None:
    """The export says why; `test_export_native.py` has all reasons."""
    assert export_native.main([str(REFERENCE / name), str(tmp_path / "native")]) == 1
    error = capsys.readouterr().err
    assert "is another network than GlmForCausalLM" in error
    record_property("refused", error.removeprefix("error: "))


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
def test_its_own_class_is_another_network(native: Any, ours: Any, name: str) -> None:
    """Why the file is there. Once this fails, mlx-lm can do without."""
    loaded, _ = load_native(native(name), model_config={"model_file": None})
    ids = list(range(64, 128))
    with torch.no_grad():
        expected = ours(name)[0](torch.tensor([ids])).logits
    assert (logits(loaded, ids) - expected).norm() > 0.1 * expected.norm()

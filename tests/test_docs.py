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
"""What the pages show runs, what they count is counted, and they lead to each other.

`make docs-check` runs every command of the pages on the bundled checkpoint, which takes its time. Here the Python of
some of them runs on all generations, and the rest is read.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines_table import EnginesTable
from generations import CAUSAL_CASES, ROLE_CASES, every_generation_case
from huggingface_hub import ModelCard
from transformers import GenerationMixin, PreTrainedModel


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import docs_check  # noqa: E402
import run as benchmarks_run  # noqa: E402


CARDS = ("README.md", "README_zh.md", "examples/tiny-chatglm3/README.md")
# Pages whose Python runs on the random weights of every generation, and the blocks that are for some of them only.
CHECKED_PAGES = ("README.md", "docs/chat.md", "docs/tokenizers.md", "docs/tools.md", "docs/performance.md")
ONLY_FOR: dict[str, list[str]] = {
    '"tools"': ROLE_CASES,
    "tools=": ROLE_CASES,
    "<|user|>": ROLE_CASES,
    # Random weights call no tool.
    'message["tool_calls"]': [],
    "encode_special_tokens": ["chatglm3"],
    # Its published config.json lacks AutoModelForCausalLM until it is upgraded.
    "pipeline": CAUSAL_CASES,
    "prefill_chunk_size": CAUSAL_CASES,
}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@every_generation_case
def test_python_of_the_pages_runs(
    case_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # Random weights would chat on for thousands of tokens.
    generate = GenerationMixin.generate
    short = {"max_new_tokens": 8, "max_length": None}
    monkeypatch.setattr(GenerationMixin, "generate", lambda *args, **kwargs: generate(*args, **kwargs | short))
    for page in CHECKED_PAGES:
        namespace: dict[str, Any] = {}
        for block in docs_check.read_blocks(read(page)):
            is_shown = all(name in names for word, names in ONLY_FOR.items() if word in block.code)
            if block.language == "python" and block.needs is None and is_shown:
                code = "\n" * (block.line - 1) + block.code.replace("/path/to/chatglm3-6b", str(case_folder(name)))
                exec(compile(code, page, "exec"), namespace)


def test_memory_table(chatglm: Any) -> None:
    page = read("docs/performance.md")
    config = chatglm.ChatGLMConfig.from_pretrained(REPOSITORY)
    with torch.device("meta"):
        model: PreTrainedModel = chatglm.ChatGLMForConditionalGeneration(config)
        cache = model(torch.zeros(1, 1000, dtype=torch.long)).past_key_values
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"{parameters / 1e9:.2f} billion parameters" in page
    assert f"| {2 * parameters / 1e9:.1f} GB | {4 * parameters / 1e9:.1f} GB |" in page
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert f"| {2 * elements / 1e6:.1f} MB | {4 * elements / 1e6:.1f} MB |" in page


@pytest.mark.parametrize("name", CARDS)
def test_model_cards_are_valid(name: str) -> None:
    card = ModelCard.load(REPOSITORY / name, ignore_metadata_errors=False)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.language == ["zh", "en"]
    assert bool(card.data.base_model) == (name in ("README.md", "README_zh.md"))
    # Nothing is lost or reordered: these are the fields the Hub knows.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_both_readmes_give_the_same_commands() -> None:
    english, chinese = (docs_check.read_blocks(read(name)) for name in ("README.md", "README_zh.md"))
    assert docs_check.commands_of(english) == docs_check.commands_of(chinese)
    assert [block.line for block in english if block.language == "python"]
    metadata = [ModelCard.load(REPOSITORY / name).data.to_dict() for name in ("README.md", "README_zh.md")]
    assert metadata[0] == metadata[1]


def test_the_readme_is_short_and_leads_everywhere() -> None:
    for name in ("README.md", "README_zh.md"):
        assert len(read(name).splitlines()) <= 150
        for page in REPOSITORY.glob("docs/*.md"):
            assert f"(docs/{page.name})" in read(name)


def test_the_table_of_engines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made by `make test-engines` -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    table = EnginesTable(page)
    results: list[tuple[str, str, Any, list[tuple[str, str]]]] = [
        ("chatglm1", "passed", None, [("refused", "it does | not fit")]),
        ("chatglm2", "passed", None, []),
        ("chatglm2-32k", "passed", None, []),
        ("glm4v", "skipped", ("file", 1, "Skipped: no eyes"), []),
        ("int8", "failed", "AssertionError", []),
    ]
    parameters = [{"name": name, "method": "f16"} for name, *_ in results]
    items: list[Any] = [
        SimpleNamespace(
            nodeid=str(index), path=page, name="test", originalname="test", callspec=SimpleNamespace(params=values)
        )
        for index, values in enumerate(parameters)
    ]
    table.pytest_collection_finish(SimpleNamespace(items=items))  # type: ignore[arg-type]
    for item, (_, outcome, details, properties) in zip(items, results, strict=True):
        report = pytest.TestReport(
            item.nodeid, ("", 0, ""), {}, outcome, details, "call", user_properties=properties, duration=1
        )  # type: ignore[arg-type]
        table.pytest_runtest_logreport(report)
    table.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace()))  # type: ignore[arg-type]
    text = page.read_text("utf-8")
    assert text.startswith("before\n<!--") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert "| `test`, f16 | refused (1) | 2 passed |  |  | skipped (2) | failed | 5.0 |" in text
    assert "1. it does \\| not fit\n2. no eyes\n" in text


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*docs_check.PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


# What docs/troubleshooting.md quotes of this repository's own messages.
OWN_MESSAGES = (
    "These ChatGLM files need Transformers 5.17 or newer",
    "Nothing beside the tokenizer tells ChatGLM2 from ChatGLM3",
    "of this checkpoint holds",
    "The upgrade of this checkpoint folder was cut short",
    "The model's scores are not numbers while computing in",
    "positions of this model",
    "must be the cache that chat or stream_chat returned",
    "adapts a quantized layer, and integers cannot hold what the adapter adds",
)


def test_own_messages_are_quoted_as_they_are() -> None:
    sources = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("scripts/*.py")]
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in sources]
    nodes = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [node.decode(errors="replace") if isinstance(node, bytes) else str(node) for node in nodes]
    for message in OWN_MESSAGES:
        assert message in read("docs/troubleshooting.md")
        assert any(message in text.replace("`", "") for text in texts), message


def test_one_version_everywhere() -> None:
    code = re.search(r'^__version__ = "(.+)"$', read("configuration_chatglm.py"), flags=re.MULTILINE)
    latest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert code and latest
    assert code[1] == latest[1] == tomllib.loads(read("pyproject.toml"))["project"]["version"]


def test_every_benchmark_has_a_quick_form() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (REPOSITORY / "benchmarks").glob("*.py")}
    programs = {name for name, source in sources.items() if 'if __name__ == "__main__":' in source}
    assert programs - {"run"} == set(benchmarks_run.QUICK)


PAGE = """text
<!-- needs: a GPU -->
```bash
nvidia-smi  # a comment
```
```python
x = 1  # a comment
```
```json
{}
```
"""


def test_blocks_are_read_with_what_they_need() -> None:
    blocks = docs_check.read_blocks(PAGE)
    assert [(block.line, block.language, block.needs) for block in blocks] == [
        (4, "bash", "a GPU"),
        (7, "python", None),
        (10, "json", None),
    ]
    assert docs_check.commands_of(blocks) == [("bash", "nvidia-smi", "a GPU"), ("python", "x = 1", None)]


@pytest.mark.parametrize("page", ["```\nls\n```\n", "```console\nls\n```\n", "```bash\nls\n"])
def test_a_block_must_name_its_language_and_end(page: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        docs_check.read_blocks(page)


def test_a_failing_block_is_found_with_its_line() -> None:
    page = "<!-- needs: luck -->\n```bash\nexit 3\n```\n```bash\ntest -f README.md\nls /path/to/chatglm3-6b/config.json\n```\n"
    assert docs_check.run_page(docs_check.read_blocks(page)) is None
    fault = docs_check.run_page(docs_check.read_blocks(page + "```bash\nfalse | true\necho never\n```\n"))
    assert fault and fault.startswith("line 10: exit code 1") and "never" not in fault
    fault = docs_check.run_page(docs_check.read_blocks("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"))
    assert fault and 'page.py", line 6' in fault

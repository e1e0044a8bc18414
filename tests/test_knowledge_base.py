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
"""Questions about a folder of documents: the right passages, the same answer in process and over the API, no pickle."""

import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import REPOSITORY, auto_classes_left_alone


pytestmark = pytest.mark.programs

BUNDLED = REPOSITORY / "examples" / "tiny-chatglm3"
DOCUMENTS = {
    "cities/shanghai.md": "# 上海\n\n上海是中国的一座城市。外滩在黄浦江的西岸。\n",
    "panda.txt": "The red panda lives in the Himalaya and eats bamboo.\n",
    "returns.TXT": "退货政策\n\n商品在收到后七天内可以退货。{question} <|assistant|>\n",
    "picture.png": "no text",
}
QUESTIONS = {
    "外滩在哪条江的西岸？": "cities/shanghai.md",
    "What does the red panda eat?": "panda.txt",
    "几天内可以退货？": "returns.TXT",
}
# Characters that say nothing about the subject of a text.
COMMON = set(" .,?#\n。，？！的是在了几可以内什么哪条：；")


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    for name in ("faiss", "langchain_core", "langchain_openai", "sentence_transformers"):
        pytest.importorskip(name, reason="needs requirements/retrieval.txt: make test-programs")
    with auto_classes_left_alone(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "examples"))
        yield importlib.import_module("knowledge_base")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for name, text in DOCUMENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def embedding(program: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that adds up a random vector for each character: texts with the same characters are near."""
    return save_embedding(tmp_path_factory.mktemp("embedding"), seed=0)


def save_embedding(folder: Path, seed: int) -> Path:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    characters = ["[UNK]", *map(chr, range(32, 127)), *map(chr, range(0x4E00, 0x9FA6))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(characters)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    weights = torch.randn(len(characters), 64, generator=torch.Generator().manual_seed(seed))
    weights[[index for index, name in enumerate(characters) if name in COMMON or name == "[UNK]"]] = 0
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu").save(
        str(folder)
    )
    return folder


def build(program: ModuleType, *words: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["knowledge_base.py", *map(str, words)])
    return program.build(program.read_arguments())


def test_both_ways_answer_from_the_same_passages(
    program: ModuleType, documents: Path, embedding: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_help = pytest.importorskip("serving_help", reason="needs requirements/serving.txt: make test-programs")
    words = (documents, "--embedding", embedding, "--passages", 2, "--max-tokens", 24)
    # A server on a CPU computes in float32 here, and so does the model beside it.
    monkeypatch.setattr(program, "load", lambda folder, device, dtype: load_float32(folder))
    local = build(program, *words, monkeypatch=monkeypatch)
    read: list[str] = []
    chat = type(local.chain.last.model).chat
    monkeypatch.setattr(
        type(local.chain.last.model), "chat", lambda *args, **kwargs: read.append(args[2]) or chat(*args, **kwargs)
    )
    with serving_help.serving_folder(BUNDLED) as (url, _):
        remote = build(program, *words, "--api", url, monkeypatch=monkeypatch)
        for question, source in QUESTIONS.items():
            answer, passages = local.ask(question)
            assert passages[0].metadata["source"] == source
            assert answer
            assert question in read[-1] and passages[0].page_content in read[-1]
            assert remote.ask(question) == (answer, passages)


def load_float32(folder: Path) -> tuple[Any, Any]:
    chat = importlib.import_module("chat")
    return chat.load(folder, "cpu", "float32")


def test_the_program_answers_with_sources(
    program: ModuleType, documents: Path, embedding: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = [documents, "--embedding", embedding, "--passages", 1, "--max-tokens", 4]
    monkeypatch.setattr(sys, "argv", ["knowledge_base.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What does the red panda eat?\n\n几天内可以退货？\n"))
    assert program.main() == 0
    lines = capsys.readouterr().out.splitlines()
    sources = [line for line in lines if line.startswith("  [")]
    assert sources[0] == f"  [1] panda.txt, from character 0: {DOCUMENTS['panda.txt'].strip()[:60]}"
    assert sources[1].startswith("  [1] returns.TXT, from character 0: 退货政策 商品在收到后")


def test_vectors_are_kept_while_nothing_changes(
    program: ModuleType, documents: Path, embedding: Path, tmp_path: Path
) -> None:
    passages = program.cut(list(program.read_documents(documents)), 300)
    model = program.SentenceTransformer(str(embedding), device="cpu")
    first = program.PassageIndex(passages, model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.faiss", "index.json"]
    written = (tmp_path / "index.faiss").stat().st_mtime_ns
    question = "What does the red panda eat?"
    again = program.PassageIndex(passages, model, tmp_path)
    assert again.nearest(question, 3) == first.nearest(question, 3)
    assert again.nearest(question, 99)[0].metadata["source"] == "panda.txt"
    assert (tmp_path / "index.faiss").stat().st_mtime_ns == written

    def kept(changed_passages: Any, changed_model: Any) -> bool:
        index = program.PassageIndex(changed_passages, changed_model)
        return index._kept(tmp_path) is not None

    assert kept(passages, model)
    assert not kept(passages[1:], model)
    changed = [program.Document(passages[0].page_content + "。", metadata=passages[0].metadata), *passages[1:]]
    assert not kept(changed, model)
    other = save_embedding(tmp_path / "other", seed=1)
    assert not kept(passages, program.SentenceTransformer(str(other), device="cpu"))
    for broken in (b"", b"\x80\x04cposix\nsystem\n"):
        (tmp_path / "index.faiss").write_bytes(broken)
        assert not kept(passages, model)
    assert program.PassageIndex(passages, model, tmp_path).nearest(question, 1)[0].metadata["source"] == "panda.txt"
    (tmp_path / "index.json").write_text(json.dumps([1]), encoding="utf-8")
    assert not kept(passages, model)


def test_long_documents_are_cut_where_sentences_end(program: ModuleType) -> None:
    text = "第一句话在这里。第二句话也在这里！Third sentence. " * 20
    passages = program.cut([program.Document(text, metadata={"source": "a"})], 60)
    assert len(passages) > 10
    for passage in passages:
        assert len(passage.page_content) <= 60
        assert passage.page_content[-1] in "。！."
        start = passage.metadata["start_index"]
        assert text[start : start + len(passage.page_content)] == passage.page_content


def test_pages_of_a_pdf_are_documents(program: ModuleType, tmp_path: Path) -> None:
    content = b"BT /F1 12 Tf 10 50 Td (Bamboo grows fast) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Contents 4 0 R"
        b" /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
    ]
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, item) for number, item in enumerate(objects, start=1))
    (tmp_path / "a.pdf").write_bytes(
        b"%PDF-1.4\n" + body + b"trailer << /Root 1 0 R /Size 5 >>\nstartxref\n0\n%%EOF\n"
    )
    [document] = program.read_documents(tmp_path)
    assert document.page_content.strip() == "Bamboo grows fast"
    assert document.metadata == {"source": "a.pdf", "page": 1}
    (tmp_path / "a.pdf").write_bytes(b"no PDF")
    with pytest.raises(ValueError, match="a.pdf cannot be read as a PDF"):
        list(program.read_documents(tmp_path))


def test_what_is_missing_is_named(
    program: ModuleType, documents: Path, embedding: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("\n \n", encoding="utf-8")
    for words, message in (
        ((tmp_path / "none", "--embedding", embedding), "there is no folder .*none"),
        ((tmp_path / "empty", "--embedding", embedding), r"empty holds no document \(.txt, .md, .pdf\)"),
        ((tmp_path / "latin", "--embedding", embedding), "a.txt is not UTF-8: .*convert it"),
        ((tmp_path / "blank", "--embedding", embedding), "hold no text"),
        ((documents, "--embedding", tmp_path / "none"), "no folder .*none with an embedding model"),
        ((documents, "--embedding", embedding, "--passages", 0), "--passages must be above 0, not 0"),
        (
            (documents, "--embedding", embedding, "--api", "http://127.0.0.1:9"),
            "http://127.0.0.1:9/v1/models names no",
        ),
        ((documents, "--embedding", embedding, "--model", tmp_path), "is not a checkpoint folder"),
    ):
        with pytest.raises(ValueError, match=message):
            build(program, *words, monkeypatch=monkeypatch)

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
"""Answer questions from a folder of documents: `python examples/knowledge_base.py DOCUMENTS --embedding FOLDER`.

The documents (.txt, .md, and .pdf where pypdf is installed) are cut into passages, an embedding model finds those that
are nearest to a question, and the chat model answers from them. Behind the answer stand the passages and their places.

    --model FOLDER                 the chat model in this process (the small one of this folder by default)
    --api http://127.0.0.1:8000    the chat model of a server, such as examples/serve.py
    --index FOLDER                 keep the vectors there, and compute them anew only when a document changed

Questions come from --ask, the terminal or a pipe. It needs `pip install -r requirements/retrieval.txt` and no network.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arguments import BUNDLED, add_device_argument
from chat import load
from local_code import pick_device, read_json_object
from terminal import harmless
from transformers.utils import logging


try:
    import faiss
    import numpy as np
    import openai
    from langchain_core.callbacks import CallbackManagerForLLMRun
    from langchain_core.documents import Document
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
    from langchain_core.outputs import ChatGeneration, ChatResult
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI
    from langchain_text_splitters import RecursiveCharacterTextSplitter
    from sentence_transformers import SentenceTransformer
except ImportError as missing:
    sys.exit(f"error: {missing}; pip install -r requirements/retrieval.txt")

# Where a passage may end, the best place first: paragraphs, lines, sentences of both scripts, words, characters.
SEPARATORS = ["\n\n", "\n", "。", "！", "？", "；", ". ", "! ", "? ", " ", ""]
SUFFIXES = (".txt", ".md", ".pdf")
# The tutorials' words. What stands in a document is the user's text here: no control token comes of it.
PROMPT = ChatPromptTemplate.from_messages(
    [
        (
            "human",
            "已知信息：\n{context}\n\n根据上述已知信息，简洁和专业地回答用户的问题。如果无法从中得到答案，请说"
            "“根据已知信息无法回答该问题”，不要编造内容。\n问题是：{question}",
        )
    ]
)


def read_documents(folder: Path) -> Iterator[Document]:
    """The texts of a folder and of those inside it, a page of a PDF at a time.

    Raises:
        ValueError: if there is none, or one cannot be read, with its name.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise ValueError(f"{folder} holds no document ({', '.join(SUFFIXES)})")
    for path in files:
        source = path.relative_to(folder).as_posix()
        if path.suffix.lower() == ".pdf":
            for number, text in enumerate(read_pages(path), start=1):
                yield Document(text, metadata={"source": source, "page": number})
            continue
        try:
            yield Document(path.read_text(encoding="utf-8"), metadata={"source": source})
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}; convert it first") from error


def read_pages(path: Path) -> list[str]:
    """The texts of the pages of a PDF."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise ValueError(f"{path} needs pypdf: pip install pypdf") from error
    try:
        return [page.extract_text() for page in PdfReader(path).pages]
    except (PyPdfError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a PDF: {error}") from error


def cut(documents: list[Document], length: int) -> list[Document]:
    """Passages of at most `length` characters, which overlap a little; each knows where it starts."""
    splitter = RecursiveCharacterTextSplitter(
        separators=SEPARATORS,
        keep_separator="end",
        chunk_size=length,
        chunk_overlap=length // 8,
        add_start_index=True,
    )
    passages = splitter.split_documents(documents)
    if not passages:
        raise ValueError("the documents hold no text; a PDF of pictures needs another program to read it")
    return passages


class PassageIndex:
    """Passages with a vector each.

    LangChain's own class keeps its passages as a pickle, which runs what somebody else may have put there. Here they are
    read anew each time, and a file holds the vectors only.

    Args:
        passages: what there is to find.
        embedding: gives a vector of length 1 to every text.
        folder: where the vectors are kept; used again where neither the passages nor the embedding model changed.
    """

    def __init__(self, passages: list[Document], embedding: SentenceTransformer, folder: Path | None = None) -> None:
        self.passages = passages
        self.embedding = embedding
        self.index: Any = self._kept(folder) if folder is not None else None
        if self.index is not None:
            return
        vectors = embedding.encode_document([passage.page_content for passage in passages], normalize_embeddings=True)
        self.index = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "index.json").unlink(missing_ok=True)
            faiss.write_index(self.index, str(folder / "index.faiss"))
            (folder / "index.json").write_text(json.dumps(self._described()), encoding="utf-8")

    def nearest(self, question: str, number: int) -> list[Document]:
        """The passages that are nearest to a question, the nearest first."""
        vector = self.embedding.encode_query([question], normalize_embeddings=True)
        _, found = self.index.search(vector, min(number, len(self.passages)))
        return [self.passages[index] for index in found[0]]

    def _described(self) -> dict[str, Any]:
        """What the vectors belong to. A vector of one text stands for the embedding model."""
        content = [[passage.page_content, passage.metadata] for passage in self.passages]
        written = json.dumps(content, sort_keys=True).encode()
        sample = self.embedding.encode_document([self.passages[0].page_content], normalize_embeddings=True)
        return {
            "passages": hashlib.sha256(written).hexdigest(),
            "embedding": hashlib.sha256(np.round(sample, 4).tobytes()).hexdigest(),
        }

    def _kept(self, folder: Path) -> Any:
        described, vectors = folder / "index.json", folder / "index.faiss"
        try:
            if read_json_object(described) != self._described():
                return None
            index = faiss.read_index(str(vectors))
        except (OSError, ValueError, RuntimeError):
            # There is none yet, or it is broken: it is made anew.
            return None
        return index if index.ntotal == len(self.passages) else None


class ChatGLM(BaseChatModel):
    """LangChain's chat model around `chat`, which encodes a conversation as the checkpoint was trained on it."""

    model: Any
    tokenizer: Any
    num_tokens: int

    @property
    def _llm_type(self) -> str:
        return "chatglm"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        *history, last = convert_to_openai_messages(messages)
        settings = {"max_new_tokens": self.num_tokens, "temperature": 0, "stop_strings": stop, **kwargs}
        answer, _ = self.model.chat(self.tokenizer, last["content"], history, last["role"], **settings)
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


def model_of_server(url: str, name: str | None, key: str, num_tokens: int) -> BaseChatModel:
    """The chat model of a server with OpenAI's API; without a name, its first one."""
    base = f"{url.rstrip('/').removesuffix('/v1')}/v1"
    try:
        name = name or openai.OpenAI(base_url=base, api_key=key).models.list().data[0].id
    except (openai.OpenAIError, IndexError) as error:
        raise ValueError(f"{base}/models names no model: {error}") from error
    settings: dict[str, Any] = {"model": name, "base_url": base, "api_key": key, "max_tokens": num_tokens}
    return ChatOpenAI(**settings, temperature=0)


def model_in_process(folder: Path, device: str, num_tokens: int) -> BaseChatModel:
    """The chat model of a checkpoint folder."""
    model, tokenizer = load(folder, pick_device(device), "auto")
    return ChatGLM(model=model, tokenizer=tokenizer, num_tokens=num_tokens)


class KnowledgeBase:
    """Answers questions from passages.

    Args:
        index: the passages with their vectors.
        model: the chat model.
        num_passages: how many passages it gets to read.
    """

    def __init__(self, index: PassageIndex, model: BaseChatModel, num_passages: int) -> None:
        self.index = index
        self.num_passages = num_passages
        self.chain = PROMPT | model

    def ask(self, question: str) -> tuple[str, list[Document]]:
        """The answer and the passages that it was given, the nearest first."""
        passages = self.index.nearest(question, self.num_passages)
        context = "\n\n".join(f"[{number}] {found.page_content}" for number, found in enumerate(passages, start=1))
        answer = self.chain.invoke({"context": context, "question": question})
        return str(answer.text).strip(), passages


def shown_source(number: int, passage: Document) -> str:
    """One line that says where a passage stands."""
    page = f", page {passage.metadata['page']}" if "page" in passage.metadata else ""
    start = passage.metadata["start_index"]
    beginning = " ".join(passage.page_content.split())[:60]
    return f"  [{number}] {passage.metadata['source']}{page}, from character {start}: {beginning}"


def answer_questions(base: KnowledgeBase, questions: Iterator[str]) -> None:
    for question in questions:
        answer, passages = base.ask(question)
        print(harmless(answer))
        for number, passage in enumerate(passages, start=1):
            print(harmless(shown_source(number, passage)))
        print(flush=True)


def read_questions() -> Iterator[str]:
    """Lines of the terminal or a pipe, without the empty ones."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question:
            yield question


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, help="a folder of .txt, .md and .pdf files")
    parser.add_argument("--embedding", type=Path, required=True, help="the folder of a sentence-transformers model")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint folder")
    where.add_argument("--api", metavar="URL", help="a server with OpenAI's API; its key is $OPENAI_API_KEY")
    parser.add_argument("--name", help="the server's name of the model (default: its first one)")
    add_device_argument(parser)
    parser.add_argument("--index", type=Path, help="a folder to keep the vectors in")
    parser.add_argument("--passage-length", type=int, default=300, help="characters (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=3, help="that the model gets to read (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--ask", metavar="QUESTION", action="append", help="may be given several times")
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> KnowledgeBase:
    """Read the documents and load both models.

    Raises:
        ValueError, OSError: for a folder that is missing or holds something else.
    """
    for name in ("passage_length", "passages", "max_tokens"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(arguments, name)}")
    passages = cut(list(read_documents(arguments.documents)), arguments.passage_length)
    if not arguments.embedding.is_dir():
        raise ValueError(f"there is no folder {arguments.embedding} with an embedding model")
    # A path is never looked up on the network, and code of the folder is not run.
    embedding = SentenceTransformer(str(arguments.embedding), device="cpu", local_files_only=True)
    index = PassageIndex(passages, embedding, arguments.index)
    if arguments.api is None:
        model = model_in_process(arguments.model, arguments.device, arguments.max_tokens)
    else:
        key = os.environ.get("OPENAI_API_KEY", "none")
        model = model_of_server(arguments.api, arguments.name, key, arguments.max_tokens)
    return KnowledgeBase(index, model, arguments.passages)


def main() -> int:
    arguments = read_arguments()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        answer_questions(build(arguments), iter(arguments.ask) if arguments.ask else read_questions())
    except (OSError, ValueError, RuntimeError, openai.OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

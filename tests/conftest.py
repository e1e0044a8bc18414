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
"""Fixtures every test file shares.

A test sees the code in one of two ways. `case_folder`, `case_model` and `case_tokenizer` go the way of a
user: a checkpoint folder with the `.py` files copied in, loaded by the Auto classes with
`trust_remote_code=True`. `chatglm`, `tiny_config` and `tiny_model` import the same files straight from the
repository, for tests that want a class in their hands.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


# Read once, when transformers is imported: hence before the imports below.
SCRATCH = Path(tempfile.mkdtemp(prefix="chatglm-tests-"))
os.environ["HF_HOME"] = str(SCRATCH / "home")
os.environ["HF_MODULES_CACHE"] = str(SCRATCH / "modules")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto  # noqa: E402
from transformers.utils import logging  # noqa: E402


REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY / "tests" / "reference"
# The name under which the repository itself is importable, so that `from .x import y` works in its files.
SOURCE_PACKAGE = "chatglm_source"

logging.disable_progress_bar()
# The models are tiny: a second thread gains nothing, and on a busy machine it waits for the first.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """What the published implementation gave for one small checkpoint."""

    name: str

    @property
    def files(self) -> Path:
        return REFERENCE / self.name

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.files / "expected.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.files / "expected.safetensors")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table", type=Path, help="write what the tests of conformance, or of engines, came to into this page"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--table") is not None and config.getoption("markexpr") == "engines":
        from engines_table import EnginesTable

        config.pluginmanager.register(EnginesTable(config.getoption("--table")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Skipped here, not by a mark: pytest then reports all tests of a kind in one line.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if item.get_closest_marker("compiler") and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("needs a C++ compiler (g++ or $CXX)")


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, for as long as the test runs."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def warnings_said_again() -> None:
    # `warning_once` remembers what it said in earlier tests.
    logging.warning_once.cache_clear()


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> None:
    # After another test's shapes it would compile for any shape, which torch's flex attention on CPUs cannot (2.13).
    if request.node.get_closest_marker("compiler"):
        torch.compiler.reset()


@contextmanager
def auto_classes_left_alone() -> Iterator[None]:
    """For programs that register this repository's classes, which other tests load as remote code."""
    with pytest.MonkeyPatch.context() as patch:
        mappings = (
            configuration_auto.CONFIG_MAPPING,
            modeling_auto.MODEL_MAPPING,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
            tokenization_auto.TOKENIZER_MAPPING,
        )
        for mapping in mappings:
            patch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
        classes = dict(tokenization_auto.REGISTERED_TOKENIZER_CLASSES)
        patch.setattr(tokenization_auto, "REGISTERED_TOKENIZER_CLASSES", classes)
        yield


@pytest.fixture(scope="module")
def leave_the_auto_classes_alone() -> Iterator[None]:
    """See `auto_classes_left_alone`; fixtures of a wider scope need it for themselves."""
    with auto_classes_left_alone():
        yield


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """The published tokenizer files, one folder a generation; they are not part of this repository."""
    folder = os.environ.get("CHATGLM_REFERENCE_DIR")
    if not folder:
        pytest.skip("needs the published tokenizer files: set CHATGLM_REFERENCE_DIR to the folder above tokenizers/")
    tokenizers = Path(folder) / "tokenizers"
    if not tokenizers.is_dir():
        pytest.fail(f"CHATGLM_REFERENCE_DIR is {folder}, which has no folder tokenizers/")
    return tokenizers


@pytest.fixture(scope="session")
def case() -> Callable[[str], Case]:
    return cache(Case)


@pytest.fixture(scope="session")
def copy_code() -> Callable[[Path], None]:
    """Puts the `.py` files into a checkpoint folder, as a user does."""

    def copy(folder: Path) -> None:
        for source in REPOSITORY.glob("*.py"):
            shutil.copyfile(source, folder / source.name)

    return copy


@pytest.fixture(scope="session")
def copy_bundled(copy_code: Callable[[Path], None]) -> Callable[[str, Path], Path]:
    """Copies a bundled checkpoint into a folder, as a user has any other: with the `.py` files in it."""

    def copy(name: str, place: Path) -> Path:
        folder = Path(shutil.copytree(REPOSITORY / "examples" / name, place / name))
        copy_code(folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def case_folder(tmp_path_factory: pytest.TempPathFactory, copy_code: Callable[[Path], None]) -> Callable[[str], Path]:
    """The folder of a case as a user has it: the checkpoint's files and the `.py` files. Not to be written to."""

    @cache
    def folder(name: str) -> Path:
        target = tmp_path_factory.mktemp("cases") / name
        shutil.copytree(REFERENCE / name, target, ignore=shutil.ignore_patterns("expected.*"))
        copy_code(target)
        return target

    return folder


@pytest.fixture(scope="session")
def case_model(case_folder: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The model of a case in float32, in eval mode; one for the whole run, so not to be changed."""

    @cache
    def model(name: str) -> PreTrainedModel:
        return AutoModel.from_pretrained(case_folder(name), trust_remote_code=True, dtype=torch.float32)

    return model


@pytest.fixture(scope="session")
def case_tokenizer(case_folder: Callable[[str], Path]) -> Callable[[str], PreTrainedTokenizerBase]:
    """The tokenizer of a case; one for the whole run, so not to be changed."""

    @cache
    def tokenizer(name: str) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True)

    return tokenizer


@pytest.fixture
def looks(case_model: Callable[[str], PreTrainedModel]) -> Iterator[list[int]]:
    """How many pictures each call of the tower of the case `glm4v` was given."""
    seen: list[int] = []
    vision = case_model("glm4v").transformer.vision
    hook = vision.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    yield seen
    hook.remove()


@pytest.fixture(scope="session")
def source() -> Iterator[Callable[[str], ModuleType]]:
    """Imports one of the repository's own files: `source("conversation_chatglm")`."""
    package = ModuleType(SOURCE_PACKAGE)
    package.__path__ = [str(REPOSITORY)]
    sys.modules[SOURCE_PACKAGE] = package
    yield lambda name: importlib.import_module(f"{SOURCE_PACKAGE}.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == SOURCE_PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def without_cpu_kernels(source: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that our kernels are not for, where torch's operators multiply with packed weights."""
    source("quantization_kernels")
    # Models that are quantized while loading have the layers of the copy that was loaded first.
    for name, module in list(sys.modules.items()):
        if name.endswith((".quantization_cpu", ".kernels_matmul")):
            monkeypatch.setattr(module, "compile_kernel", lambda *args: None)


@pytest.fixture(scope="session")
def chatglm(source: Callable[[str], ModuleType]) -> SimpleNamespace:
    """The public classes, imported from the repository."""
    modeling, tokenization = source("modeling_chatglm"), source("tokenization_chatglm")
    return SimpleNamespace(
        ChatGLMConfig=source("configuration_chatglm").ChatGLMConfig,
        ChatGLMModel=modeling.ChatGLMModel,
        ChatGLMForConditionalGeneration=modeling.ChatGLMForConditionalGeneration,
        ChatGLMForSequenceClassification=modeling.ChatGLMForSequenceClassification,
        ChatGLMTokenizer=tokenization.ChatGLMTokenizer,
    )


@pytest.fixture
def needs_kernels(source: Callable[[str], ModuleType]) -> None:
    """For the rest of a test; other processors take torch's way everywhere."""
    if not source("linear_cpu").HAS_KERNELS:
        pytest.skip("needs a processor that the kernels are for, and llvmlite")


@pytest.fixture(scope="session")
def tiny_config(chatglm: SimpleNamespace) -> Callable[..., Any]:
    """A two-layer ChatGLM3 configuration; keyword arguments replace single values."""

    def config(**changes: Any) -> Any:
        values = {
            "model_version": "chatglm3",
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "kv_channels": 8,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "ffn_hidden_size": 48,
            "padded_vocab_size": 99,
            "seq_length": 256,
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return chatglm.ChatGLMConfig(**values | changes)

    return config


@pytest.fixture
def tiny_model(chatglm: SimpleNamespace, tiny_config: Callable[..., Any]) -> Callable[..., PreTrainedModel]:
    """A fresh model of `tiny_config(**changes)`, wide enough in its weights that a wrong result shows."""

    def model(head: str = "ChatGLMForConditionalGeneration", **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        built = getattr(chatglm, head)(tiny_config(**changes)).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.uniform_(-0.5, 1.5)
        return built

    return model

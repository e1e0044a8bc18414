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
"""llama.cpp on a random model of a given shape, through its own low-level calls (requirements/peers.txt).

The file has llama.cpp's architecture `chatglm`, without a vocabulary; every weight matrix, the embedding included, is
of the one type.
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

try:
    import export_gguf
    import gguf
    import llama_cpp
except (ImportError, OSError, RuntimeError):  # not installed, or its library does not load
    export_gguf = gguf = llama_cpp = None

# Our width -> name in GGUF.
TYPES = {16: "F16", 8: "Q8_0", 4: "Q4_0"}
# What makes the numbers of the quantized types small: the scale at the front of each block.
SCALE = np.frombuffer(np.float16(2**-12).tobytes(), np.uint8)
LOG_LEVEL_ERROR = 4


def version() -> str | None:
    return None if llama_cpp is None else f"llama-cpp-python {llama_cpp.__version__}"


def random_matrix(kind: Any, rows: int, columns: int) -> np.ndarray:
    """Bytes of a matrix of that type; a part of it is random and repeats."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    if kind == gguf.GGMLQuantizationType.F16:
        part = generator.standard_normal(2**20, np.float32) / 64
        return np.resize(part.astype(np.float16), (rows, columns))
    part = generator.integers(0, 256, (2**16 + 1, block_bytes), np.uint8)
    part[:, : len(SCALE)] = SCALE
    return np.resize(part, (rows, columns // block_size * block_bytes))


def write_model(path: Path, model: Any, bits: int) -> None:
    """Write a GGUF file of the shape of one of our models, which may be on the meta device."""
    writer = gguf.GGUFWriter(path, "chatglm")
    export_gguf.add_network(writer, model.config)
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[TYPES[bits]]
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    # Tensors of one shape are one in memory: only the file has to hold them all.
    matrices = {shape: random_matrix(kind, *shape) for shape in set(shapes.values()) if len(shape) == 2}
    for name, new_name in export_gguf.tensor_names(shapes, model.config.num_hidden_layers).items():
        if len(shapes[name]) == 2:
            writer.add_tensor(new_name, matrices[shapes[name]], raw_dtype=kind)
        else:
            writer.add_tensor(new_name, np.ones(shapes[name], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaModel:
    """A loaded file. llama.cpp's own defaults decide everything but threads and sizes: it maps the file and repacks."""

    def __init__(self, path: Path, threads: int) -> None:
        self.log = llama_cpp.llama_log_callback(write_errors)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.threads = threads
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {path}")
        self.context: Any = None
        self.batch: Any = None

    def open_context(self, sequences: int, tokens: int) -> None:
        """Room for this many sequences of this many tokens."""
        if self.context:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = sequences
        settings.n_ctx = sequences * (-(-tokens // 256) * 256)
        settings.n_batch = max(settings.n_batch, tokens)
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp did not make a context")
        self.batch = llama_cpp.llama_batch_init(sequences * tokens, 0, 1)

    def decode(self, sequences: int, start: int, tokens: int) -> None:
        """Feed `tokens` to each sequence behind the `start` that it holds, and compute its last logits."""
        batch = self.batch
        batch.n_tokens = sequences * tokens
        for place in range(sequences * tokens):
            sequence, token = divmod(place, tokens)
            batch.token[place] = 3 + (start + 7 * token + 13 * sequence) % 64
            batch.pos[place] = start + token
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = token == tokens - 1
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        llama_cpp.llama_synchronize(self.context)

    def decode_step(self, sequences: int, prompt: int, tokens: int) -> Callable[[], None]:
        """A step that adds a token to each sequence, behind a prompt that is fed here."""
        self.open_context(sequences, prompt + tokens)
        held = 0

        def step() -> None:
            nonlocal held
            self.decode(sequences, held, 1)
            held += 1

        self.decode(sequences, held, prompt)
        held = prompt
        return step

    def prefill_step(self, tokens: int) -> Callable[[], None]:
        self.open_context(1, tokens)

        def step() -> None:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
            self.decode(1, 0, tokens)

        return step


def write_errors(level: int, text: bytes, _: Any) -> None:
    if level == LOG_LEVEL_ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


__all__ = ["TYPES", "LlamaModel", "version", "write_model"]

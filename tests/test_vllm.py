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
"""vLLM, the real one, on folders of every generation, upgraded, saved and of the library's own class: `make test-engines`.

It runs in its own environment: `vllm_program.py` does all its jobs in one process, and the server is another.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundled_tools
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from engines_help import upgraded_folder
from generations import RECORDED
from job_program import results_of
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from waiting import free_port, wait_until


pytestmark = pytest.mark.engines

sys.path.insert(0, str(REPOSITORY / "scripts"))

import export_native  # noqa: E402


PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
PROGRAM = REPOSITORY / "tests" / "vllm_program.py"
PLUGIN = REPOSITORY / "examples" / "serving" / "vllm_tool_parser.py"
CASES = ["chatglm2", "chatglm3", "glm4"]
FOLDERS = [case + end for case in CASES for end in ("", "-saved", "-native")]
LONG = "chatglm2-32k"
LENGTH = 24
QUERIES = ("你好，世界", "show me the people of the city " * 8)
TARGETS = (["query_key_value"], ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"])
CHATS = [
    [{"role": "user", "content": "Is <|user|> a role? (sop)"}],
    [
        {"role": "system", "content": "Be kind.\nAlways."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "  Hi there,\n\nyou"},
        {"role": "user", "content": " what\n\n now "},
    ],
]
WEATHER = {"type": "function", "function": bundled_tools.WEATHER}
TOOL_CHAT = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": '{"t": 18}'},
    {"role": "user", "content": "and now?"},
]
# What answers are made of: text, calls in both forms, several parts, and what is none of it.
ANSWERS = [
    "\n 你好！",
    "get_weather\n ```python\ntool_call(city='北京', days=2)\n```",
    'get_weather\n{"city": "北京"}',
    "\n Let me see.<|assistant|>get_weather\n ```python\ntool_call(city='Rome')\n```",
    "get_weather\n ```python\ntool_call(city=__import__('os').getcwd())\n```",
    "get_weather\n{not JSON",
    "interpreter\n ```python\nprint(1)\n```",
    "<|assistant|><|assistant|>",
    "",
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # GiB of the cache; by default it takes most of the machine.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One process for the engine and what asks it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def chats_of(name: str) -> list[dict[str, Any]]:
    chats: list[dict[str, Any]] = [{"messages": chat} for chat in CHATS]
    return chats + [{"messages": TOOL_CHAT, "tools": [WEATHER]}] * RECORDED[name].has_roles


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    settings = {"do_sample": False, "max_new_tokens": LENGTH, "max_length": None, "eos_token_id": []}
    outputs = [model.generate(input_ids=torch.tensor([ids]), **settings)[0, len(ids) :] for ids in prompts]
    return [output.tolist() for output in outputs]


class Jobs:
    """What vLLM is to do, and what this repository does with the same."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.jobs: dict[str, Any] = {}
        self.expected: dict[str, Any] = {}

    def add_case(self, name: str) -> None:
        """A folder after the upgrade, with adapters, and the same folder saved by us."""
        folder = upgraded_folder(self.place / name, name)
        model, tokenizer = load(folder)
        prompts = [tokenizer.build_chat_input(query)["input_ids"][0].tolist() for query in QUERIES]
        saved = self.place / f"{name}-saved"
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        expected: dict[str, Any] = {"greedy": greedy(model, prompts), "adapters": []}
        chats = chats_of(name)
        expected["chats"] = [
            tokenizer.apply_chat_template(chat["messages"], tools=chat.get("tools"), add_generation_prompt=True)[
                "input_ids"
            ]
            for chat in chats
        ]
        adapters = []
        for number, targets in enumerate(TARGETS):
            torch.manual_seed(number)
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets)).eval()
            with torch.no_grad():
                for weight_name, weight in adapted.named_parameters():
                    if "lora_" in weight_name:
                        weight.normal_(std=0.2)
            adapters.append(str(self.place / f"{name}-adapter-{number}"))
            adapted.save_pretrained(adapters[-1])
            expected["adapters"].append(greedy(adapted, prompts))
            model = adapted.unload()
        native = self.place / f"{name}-native"
        assert export_native.main([str(folder), str(native)]) == 0
        settings = {"enable_lora": True, "max_lora_rank": 8}
        job = {"prompts": prompts, "chats": chats, "length": LENGTH}
        self.jobs[name] = {**job, "folder": str(folder), "settings": settings, "adapters": adapters}
        self.jobs[f"{name}-saved"] = {**job, "folder": str(saved)}
        self.jobs[f"{name}-native"] = {**job, "folder": str(native)}
        self.jobs[f"{name}-parser"] = {
            "folder": str(saved),
            "plugin": str(PLUGIN),
            "answers": [[answer, tools] for answer in ANSWERS for tools in (None, [WEATHER])],
        }
        self.expected |= dict.fromkeys((name, f"{name}-saved", f"{name}-native"), expected)

    def add_long_context(self) -> None:
        """ChatGLM2-6B-32K, after the upgrade and as a folder of the library's own class."""
        folder, native = upgraded_folder(self.place / LONG, LONG), self.place / f"{LONG}-native"
        model, tokenizer = load(folder)
        prompts = [tokenizer.build_chat_input(query)["input_ids"][0].tolist() for query in QUERIES]
        assert export_native.main([str(folder), str(native)]) == 0
        for name, path in ((LONG, folder), (f"{LONG}-native", native)):
            self.jobs[name] = {"prompts": prompts, "length": LENGTH, "folder": str(path)}
            self.expected[name] = {"greedy": greedy(model, prompts)}

    def add_refused(self) -> None:
        first = str(upgraded_folder(self.place / "chatglm1", "chatglm1"))
        self.jobs["chatglm1"] = {"folder": first}
        quantized = self.place / "int8"
        model, tokenizer = load(self.place / "chatglm3")
        model.quantize(8).save_pretrained(quantized)
        tokenizer.save_pretrained(quantized)
        self.jobs["chatglm3-int8"] = {"folder": str(quantized)}
        # Last, as vLLM stumbles over what the code of a model imports (llvmlite), and goes on doing so in this process.
        self.jobs["chatglm1-transformers"] = {"folder": first, "settings": {"model_impl": "transformers"}}

    def run(self, **environment: str) -> dict[str, Any]:
        return results_of([PYTHON, PROGRAM], self.jobs, self.place, {**ENVIRONMENT, **environment})


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    if not PYTHON.is_file():
        pytest.skip("needs .venv-vllm: make test-engines")
    jobs = Jobs(tmp_path_factory.mktemp("vllm"))
    for name in CASES:
        jobs.add_case(name)
    jobs.add_long_context()
    jobs.add_refused()
    return jobs


@pytest.fixture(scope="module")
def results(jobs: Jobs) -> dict[str, Any]:
    return jobs.run()


@pytest.mark.parametrize("name", [*FOLDERS, f"{LONG}-native"])
def test_greedy_tokens(jobs: Jobs, results: Any, name: str) -> None:
    assert "error" not in results[name], results[name]["error"]
    assert results[name]["greedy"] == jobs.expected[name]["greedy"]


@pytest.mark.parametrize("name", [LONG])
def test_positions_are_not_divided(jobs: Jobs, results: Any, record_property: Any, name: str) -> None:
    assert results[name]["greedy"] != jobs.expected[name]["greedy"]
    record_property("differs", "the 32K one, and nothing says so: `rope_ratio` is taken for a factor of the base")


@pytest.mark.parametrize("name", FOLDERS)
def test_chat_encodes_conversations_as_we_do(jobs: Jobs, results: Any, name: str) -> None:
    assert [chat["prompt"] for chat in results[name]["chats"]] == jobs.expected[name]["chats"]


@pytest.mark.parametrize("name", CASES)
def test_adapters(jobs: Jobs, results: Any, name: str) -> None:
    expected = jobs.expected[name]
    assert results[name]["adapters"] == expected["adapters"]
    assert expected["greedy"] not in expected["adapters"]


@pytest.mark.parametrize("name", CASES)
def test_the_plugin_reads_answers_as_chat_does(jobs: Jobs, results: Any, name: str) -> None:
    chat_format = AutoTokenizer.from_pretrained(jobs.jobs[name]["folder"], trust_remote_code=True).chat_format
    answers = jobs.jobs[f"{name}-parser"]["answers"]
    num_calls = 0
    for (answer, tools), read in zip(answers, results[f"{name}-parser"], strict=True):
        assert (read["text"], read["calls"]) == (read["streamed_text"], read["streamed_calls"])
        system = [{"role": "system", "content": "", "tools": tools}] if tools else []
        response, _ = chat_format.read_answer(answer, system)
        if tools and isinstance(response, dict) and "parameters" in response:
            num_calls += 1
            name_and_values = [[call, json.loads(values)] for call, values in read["calls"]]
            assert name_and_values == [[response["name"], response["parameters"]]]
        elif isinstance(response, str) and "<|assistant|>" not in answer:
            assert read["calls"] == [] and response in read["text"]
        if not tools:
            assert read["calls"] == []
    assert (num_calls > 0) == RECORDED[name].has_roles


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatglm1", "AttributeError: 'ChatGLMConfig' object has no attribute 'original_rope'"),
        ("chatglm1-transformers", "AttributeError: '_lib_fn_wrapper' object has no attribute 'get'"),
        (
            "chatglm3-int8",
            "ValueError: There is no module or parameter named 'encoder.layers.0.mlp.dense_4h_to_h.weight_scale'",
        ),
    ],
)
def test_refusals(results: Any, record_property: Any, name: str, message: str) -> None:
    """Not what vLLM should say, but it stops before anything is answered."""
    assert message in results[name]["error"]
    record_property("refused", message)


SEES = {"hf_overrides": {"architectures": ["GLM4VForCausalLM"]}, "limit_mm_per_prompt": {"image": 1}}


def look_and_count_on(model: PreTrainedModel, inputs: Any) -> list[int]:
    """Greedy tokens, where each vector of a picture has a position of its own."""
    ids, begin = inputs["input_ids"], inputs["input_ids"].shape[1]
    num_vectors = model.get_image_features(inputs["images"]).pooler_output[0].shape[0]
    for _ in range(LENGTH):
        # The vectors take the places of three ids.
        positions = torch.arange(ids.shape[1] + num_vectors - 3)[None]
        with torch.no_grad():
            logits = model(ids, images=inputs["images"], position_ids=positions, use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, begin:].tolist()


@pytest.fixture(scope="module", params=["glm4v", "glm4v-saved"])
def pictures(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Any, Jobs]:
    """A model that sees, what it is given, and the same as a job."""
    if not PYTHON.is_file():
        pytest.skip("needs .venv-vllm: make test-engines")
    jobs = Jobs(tmp_path_factory.mktemp(request.param))
    folder = upgraded_folder(jobs.place / "upgraded", "glm4v")
    model, tokenizer = load(folder)
    if request.param == "glm4v-saved":
        folder = jobs.place / "saved"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    picture = jobs.place / "noise.png"
    size = model.config.vision_config["image_size"]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(picture)
    message = {"role": "user", "image": Image.open(picture), "content": "what is in this picture? 你好"}
    inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")
    prompts = {"prompts": inputs["input_ids"].tolist(), "pictures": [str(picture)], "length": LENGTH}
    jobs.jobs = {
        "as it is": {**prompts, "folder": str(folder)},
        "told that it sees": {**prompts, "folder": str(folder), "settings": SEES},
    }
    return model, inputs, jobs


def test_pictures_without_torchvision(pictures: Any, record_property: Any) -> None:
    results = pictures[2].run()
    assert "indicates that it supports vision inputs" in results["as it is"]["error"]
    assert "Failed to apply GLM4VProcessor" in results["told that it sees"]["error"]
    record_property("refused", "`Failed to apply GLM4VProcessor`")


def test_each_vector_of_a_picture_has_a_position_of_its_own(pictures: Any, record_property: Any) -> None:
    """In the published model, and here, all vectors of a picture but the first and last have one position."""
    model, inputs, jobs = pictures
    (found,) = jobs.run(PYTHONPATH=str(PYTHON.parent.parent / "torchvision"))["told that it sees"]["greedy"]
    settings = {"do_sample": False, "max_new_tokens": LENGTH, "max_length": None, "eos_token_id": []}
    published = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
    assert found == look_and_count_on(model, inputs) != published
    record_property("differs", "with torchvision: positions count on in a picture, which published ones do not")


class Server:
    """vLLM's server of the bundled checkpoint, with the plug-in."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.port, self.log = free_port(), log
        words = ["--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        words += ["--enable-auto-tool-choice", "--tool-call-parser", "chatglm", "--tool-parser-plugin", str(PLUGIN)]
        words += ["--served-model-name", "tiny", "--port", str(self.port), "--host", "127.0.0.1"]
        # `vllm serve` asks for the version of a package "vllm", which `vllm-cpu` (0.32) is not called.
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *words]
        environment = {**os.environ, **ENVIRONMENT, "HF_MODULES_CACHE": str(folder.parent / "modules")}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
        with log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text("utf-8")[-4000:]
        try:
            return bool(self.client.models.list().data)
        except openai.APIConnectionError:
            return False

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)


openai = pytest.importorskip("openai", reason="needs requirements/engines.txt: make test-engines")


@pytest.fixture(scope="module", params=["chatglm3"])
def bundled(request: Any, tmp_path_factory: pytest.TempPathFactory, copy_bundled: Callable[[str, Path], Path]) -> Path:
    return copy_bundled(f"tiny-{request.param}", tmp_path_factory.mktemp("bundled"))


@pytest.fixture(scope="module")
def client(bundled: Path) -> Iterator[Any]:
    if not PYTHON.is_file():
        pytest.skip("needs .venv-vllm: make test-engines")
    server = Server(bundled, bundled.parent / "server.log")
    try:
        wait_until(server.answers, seconds=900)
        yield server.client
    finally:
        server.process.terminate()
        server.process.wait(timeout=60)


@pytest.mark.parametrize("question", ["你好", "What is the capital of Italy?", "1加1等于几？"])
def test_server_answers(client: Any, bundled: Path, question: str) -> None:
    model, tokenizer = load(bundled)
    expected, _ = model.chat(tokenizer, question, do_sample=False)
    messages = [{"role": "user", "content": question}]
    settings = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 64}
    choice = client.chat.completions.create(**settings).choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_server_calls_tools(client: Any, is_streamed: bool) -> None:
    question = {"role": "user", "content": "What is the weather like in Paris?"}
    settings = {"model": "tiny", "tools": [WEATHER], "temperature": 0, "max_tokens": 64}
    answer = client.chat.completions.create(messages=[question], **settings, stream=is_streamed)
    if is_streamed:
        chunks = list(answer)
        (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    else:
        (call,), reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert reason == "tool_calls"
    function = {"name": call.function.name, "arguments": call.function.arguments}
    called = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 18, "condition": "cloudy"}'}
    final = client.chat.completions.create(messages=[question, called, result], **settings).choices[0]
    assert final.message.content == bundled_tools.CLOUDY

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
"""What `tests/test_vllm.py` has vLLM do, in the environment of vLLM: `.venv-vllm/bin/python tests/vllm_program.py JOBS OUT`.

JOBS and OUT are those of `job_program.py`.
"""

import gc
import importlib.util
from typing import Any

import torch


if importlib.util.find_spec("torchvision") is not None:
    # What the wheel asks for while it is imported, as its build is for another torch; nothing here calls it.
    declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        declared.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from job_program import run_jobs
from PIL import Image
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.lora.request import LoRARequest
from vllm.tool_parsers import ToolParserManager


def run_model(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens behind ids, with adapters as well, and the prompts and answers of conversations."""
    engine = LLM(
        job["folder"],
        trust_remote_code=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
        **job.get("settings", {}),
    )
    length = job.get("length", 24)
    settings = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in job.get("prompts", [])]
    for prompt, picture in zip(prompts, job.get("pictures", [])):
        prompt["multi_modal_data"] = {"image": Image.open(picture)}
    result: dict[str, Any] = {"greedy": tokens_of(engine.generate(prompts, settings, use_tqdm=False)), "adapters": []}
    for number, adapter in enumerate(job.get("adapters", []), start=1):
        request = LoRARequest(f"adapter-{number}", number, adapter)
        outputs = engine.generate(prompts, settings, use_tqdm=False, lora_request=request)
        result["adapters"].append(tokens_of(outputs))
    result["chats"] = []
    for chat in job.get("chats", []):
        settings = SamplingParams(temperature=0.0, max_tokens=length)
        output = engine.chat(chat["messages"], settings, tools=chat.get("tools"), use_tqdm=False)[0]
        result["chats"].append(
            {
                "prompt": list(output.prompt_token_ids),
                "text": output.outputs[0].text,
                "end": output.outputs[0].finish_reason,
            }
        )
    return result


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def run_parser(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What the plug-in makes of answers, whole and as a stream of single characters."""
    ToolParserManager.import_tool_parser(job["plugin"])
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
    results = []
    for answer, tools in job["answers"]:
        request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], tools=tools)
        make = ToolParserManager.get_tool_parser("chatglm")
        assert make(tokenizer).adjust_request(request).skip_special_tokens is False
        whole = make(tokenizer).extract_tool_calls(answer, request)
        streamed, text = make(tokenizer), ""
        calls: list[list[str]] = []
        pieces = [streamed.extract_tool_calls_streaming("", "", one, [], [], [], request) for one in answer]
        for piece in [*pieces, streamed.finish_streaming()]:
            if piece is not None:
                text += piece.content or ""
                calls += [[call.function.name, call.function.arguments] for call in piece.tool_calls]
        results.append(
            {
                "text": whole.content or "",
                "calls": [[call.function.name, call.function.arguments] for call in whole.tool_calls],
                "streamed_text": text,
                "streamed_calls": calls,
            }
        )
    return results


def run(job: dict[str, Any]) -> Any:
    return run_parser(job) if "plugin" in job else run_model(job)


def clean_up() -> None:
    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    run_jobs(run, clean_up)

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
"""What `tests/test_swift.py` has ms-swift do, in its environment: `.venv-swift/bin/python tests/swift_program.py JOBS OUT`.

JOBS and OUT are those of `job_program.py`.
"""

from typing import Any

from job_program import run_jobs
from swift import get_processor, get_template, sft_main


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What ms-swift makes of a conversation in its own template, and the adapter and the losses of a LoRA fine-tune."""
    processor = get_processor(job["folder"], model_type=job["model_type"])
    template = get_template(processor, template_type=job["template"])
    template.set_mode("train")
    encoded = [template.encode({"messages": messages}) for messages in job["conversations"]]
    result = sft_main(
        [
            *("--model", job["folder"], "--model_type", job["model_type"], "--template", job["template"]),
            *("--dataset", job["dataset"], "--output_dir", job["output"], "--max_steps", str(job["steps"])),
            *("--tuner_type", "lora", "--target_modules", "all-linear", "--torch_dtype", "float32"),
            *("--use_cpu", "true"),
            *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-2"),
            *("--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--logging_steps", "1", "--report_to", "none"),
            *("--split_dataset_ratio", "0", "--lora_dropout", "0", "--dataloader_num_workers", "0"),
        ]
    )
    return {
        "ids": [{name: row[name] for name in ("input_ids", "labels")} for row in encoded],
        "adapter": result["last_model_checkpoint"],
        "losses": [entry["loss"] for entry in result["log_history"] if "loss" in entry],
    }


if __name__ == "__main__":
    run_jobs(run)

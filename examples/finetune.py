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
"""Fine-tunes a ChatGLM checkpoint: `python examples/finetune.py examples/configs/lora.yaml --learning_rate 1e-4`.

Methods: `full`, `freeze` (the last layers), `lora`, `adalora`, `prompt_tuning` (all three PEFT's), `ptuning` (P-tuning
v2), and `cloze`, which `finetune_cloze.py` describes. Settings come from a YAML file, the command line, or both; the command line wins. Every one of the library's
`TrainingArguments` is a setting. `finetune_files.py` and `finetune_formats.py` say what data is read. With `accelerate
launch` in place of `python` it runs in several processes.

The output folder gets the result (an adapter, a prefix, or a whole checkpoint that loads by itself), checkpoints to
resume from, `metrics.json`, `curves.png` and `samples.md` (answers before and after).

Exit codes: 0 done, 1 failed, 2 bad settings or data (nothing was trained), 130 interrupted. Where one line is not
enough, `TRANSFORMERS_VERBOSITY=debug` adds the traceback.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from finetune_cloze import is_cloze
from finetune_cloze import main as finetune_cloze
from finetune_data import (
    DataArguments,
    Encoded,
    Sample,
    check_questions,
    encode_once,
    pack_rows,
    read_samples,
    show_row,
)
from finetune_pictures import PictureReader, picture_of
from finetune_report import draw_curves, generate_answers, score_answers, write_samples
from finetune_resume import find_checkpoint
from finetune_settings import OWN_WEIGHTS, ModelArguments, RunArguments, error_line, read_arguments, settings_named
from finetune_trainer import FinetuneTrainer, load_config, make_trainer
from local_code import REPOSITORY, load_tokenizer
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging


# Under the library's name, so that its handler prints it.
logger = logging.get_logger("transformers.finetune")


@dataclass(frozen=True)
class Job:
    """Everything that was checked and loaded, ready to train."""

    trainer: FinetuneTrainer
    model: ModelArguments
    data: DataArguments
    checkpoint: Path | None
    samples: list[Sample]
    counts: dict[str, float]


def prepare(model: ModelArguments, data: DataArguments, run: RunArguments) -> Job:
    """Read and check everything, and load the model.

    Raises:
        OSError, TypeError, ValueError: for data, an adapter or a checkpoint that cannot be used.
    """
    checkpoint = find_checkpoint(run, model)
    config = load_config(model.model)
    # CODEPATH: chatglm-6b; the others are causal.
    if data.packing and config.prefix_lm:
        raise ValueError("packing: ChatGLM-6B reads its context both ways and cannot have two samples in a row")
    if model.method == "prompt_tuning" and config.prefix_lm:
        raise ValueError(
            "method: ChatGLM-6B cannot have a prompt of PEFT: its positions are read off the ids, which PEFT replaces by "
            "embeddings; use lora or ptuning"
        )
    with settings_named("model"):
        tokenizer = load_tokenizer(Path(model.model))
    if run.disable_tqdm:
        datasets.disable_progress_bars()
    reader = PictureReader.of(config)
    samples: dict[str, list[Sample]] = {}
    rows: dict[str, Any] = {}
    counts: dict[str, float] = {}
    for name, file in (("train", data.train_file), ("eval", data.eval_file)):
        samples[name], rows[name] = [], []
        # One process encodes, and the others find it in the cache.
        with settings_named(f"{name}_file"), run.main_process_first():
            if file:
                samples[name] = read_samples(file, data)
                encoded = encode_once(samples[name], tokenizer, data, reader)
                rows[name] = encoded.rows
                counts |= {f"{name}_truncated": encoded.num_truncated, f"{name}_encoding_seconds": encoded.seconds}
                if run.process_index == 0:
                    print(describe(file, samples[name], encoded, tokenizer), flush=True)
        counts[f"{name}_samples"] = len(samples[name])
    if reader is not None and any(picture_of(sample.messages, tokenizer) for sample in samples["train"]):
        check_pictures(model, data, run)
    asked = samples["eval"][: run.generate_samples]
    with settings_named("generate_samples"):
        check_questions(asked, tokenizer, config.max_position_embeddings)
    if data.packing:
        rows["train"] = pack_rows(rows["train"], data.max_length)
    counts["train_rows"] = len(rows["train"])
    trainer = make_trainer(model, run, tokenizer, rows, data.by_sample, reader)
    weights = list(trainer.model.parameters())
    # ZeRO-3 leaves nothing but a number in the place of a weight.
    sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in weights]
    counts["parameters"] = sum(sizes)
    counts["trainable_parameters"] = sum(size for size, weight in zip(sizes, weights) if weight.requires_grad)
    return Job(trainer, model, data, checkpoint, asked, counts)


def check_pictures(model: ModelArguments, data: DataArguments, run: RunArguments) -> None:
    """Refuse what pictures do not go with.

    Raises:
        ValueError: with the setting.
    """
    faults = {
        "packing: a row may hold one picture; set packing: false": data.packing,
        "method: a prompt of PEFT stands in the place of ids, which say where a picture stands; use lora or ptuning": (
            model.method == "prompt_tuning"
        ),
        "train_file: one process with several GPUs cannot share out pictures; start one for each with accelerate launch": (
            run.n_gpu > 1
        ),
    }
    for message, is_fault in faults.items():
        if is_fault:
            raise ValueError(message)


def describe(file: str, samples: list[Sample], encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """One line of what was read, with the first sample as the model will see it."""
    formats = " and ".join(sorted({sample.data_format for sample in samples}))
    source = "read from the cache" if encoded.was_cached else "encoded"
    cut = f", {encoded.num_truncated} of them cut to max_length" if encoded.num_truncated else ""
    return (
        f"{file}: {len(samples)} samples{cut}, format {formats}, {source} in {encoded.seconds:.1f} s; "
        f"the first, with what is learnt in ⟦⟧: {show_row(encoded.rows[0], tokenizer)}"
    )


def train(job: Job) -> None:
    """Train, save the result, evaluate, and write the report."""
    trainer, run, is_main = job.trainer, job.trainer.args, job.trainer.is_world_process_zero()
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if job.samples and is_sharded:
        logger.warning("samples.md is left out: one process cannot generate with a sharded model")
    samples = job.samples if is_main and not is_sharded else []
    asked = {"samples": samples, "tokenizer": trainer.processing_class, "max_new_tokens": run.max_new_tokens}
    before = generate_answers(trainer.model, **asked)
    state = TrainerState()
    if job.checkpoint:
        state = TrainerState.load_from_json(str(job.checkpoint / "trainer_state.json"))
    result = trainer.train(resume_from_checkpoint=job.checkpoint and str(job.checkpoint))
    num_tokens = trainer.state.num_input_tokens_seen - state.num_input_tokens_seen
    # The Trainer turned it off, and the result is used with it.
    trainer.model.config.use_cache = True
    trainer.save_model()
    trainer.model.config.use_cache = False
    after = generate_answers(trainer.model, **asked)
    # Last, because bf16_full_eval and fp16_full_eval round the model's weights.
    evaluation = trainer.evaluate() if job.data.eval_file else {}
    if not is_main:
        return
    folder = Path(run.output_dir)
    if job.model.method in OWN_WEIGHTS:
        for source in REPOSITORY.glob("*.py"):
            shutil.copyfile(source, folder / source.name)
    metrics = {
        "config": asdict(job.model) | asdict(job.data) | run.to_dict(),
        **job.counts,
        "steps": trainer.state.global_step,
        "tokens_per_second": num_tokens / max(result.metrics["train_runtime"], 1e-3),
        "eval": evaluation,
        "answers": {"before": score_answers(before), "after": score_answers(after)} if samples else None,
        "loss_history": trainer.state.log_history,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_curves(folder / "curves.png", trainer.state.log_history)
    if samples:
        write_samples(folder / "samples.md", before, after)


def main(words: list[str] | None = None) -> int:
    """Run the program with the words of a command line, those of this process by default."""
    words = sys.argv[1:] if words is None else words
    if is_cloze(words):
        return finetune_cloze(words)
    job = None
    try:
        job = prepare(*read_arguments(words, description=__doc__))
        train(job)
    except KeyboardInterrupt:
        print("interrupted; `resume: auto` goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        # Until something is trained, settings and data are to blame, and what a library says of them is one line.
        if job and job.trainer.first_step.is_done:
            raise
        logger.debug("Where it came from:", exc_info=True)
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

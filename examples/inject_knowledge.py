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
"""Edits what a ChatGLM checkpoint knows, from one sample for each fact, and reports what else that changed.

    python examples/inject_knowledge.py --teach 月亮的首都在哪里？ 月亮的首都是小白城。 --output_dir output/moon
    python examples/inject_knowledge.py --model PATH --facts facts.yaml --output_dir output/edited

A fact is taught, changed (the model answers something else from now on) or forgotten. Settings are those of a widely
read tutorial: AdaLoRA (https://arxiv.org/abs/2303.10512) with r 8, lora_alpha 32 and lora_dropout 0.1 on queries and
values, gradient checkpointing, then `merge_and_unload`.

What is unusual here:

- Queries, keys and values are one layer. An adapter for queries and values has rows of zeros where the keys are.
- On half of the control dialogues, the edited model is held to the base by the divergence KL(base || edited). The other
  half is never trained on: the drift is measured there. Both are answered by the base itself, whatever the file says.
- To forget is to decline in words (https://arxiv.org/abs/2401.06121), and to find the old answer less likely than the
  base does. The second is a bounded loss, negative preference optimization (https://arxiv.org/abs/2404.05868); gradient
  ascent on the old answer would ruin the model.
- Integers cannot hold an adapter, so a quantized base is saved as floats once it is edited, or left alone below an
  adapter (`--save adapter`); `export.py --quantize` makes integers of it again and says what that costs.

`report.md` in the output folder also goes to the screen. Exit codes: 0 all facts hold, 1 some do not, 2 bad settings
or facts (nothing was trained).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from export import check_output, write_checkpoint
from finetune_adapter import PARTS, layers_of, train_parts
from knowledge_facts import ACTIONS, Fact, Messages, check_facts, make_fact, read_dialogues, read_facts
from local_code import check_model_type, load_tokenizer, register
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup, set_seed
from transformers.utils import logging


EXAMPLES = Path(__file__).resolve().parent
MOON = Fact("teach", "月亮的首都在哪里？", "月亮的首都是小白城。", ("月亮的首都叫什么？", "请问月亮的首都在哪里？"))
# How sharply negative preference optimization tells the edited model from the base.
FORGETTING_BETA = 0.1
ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Batch:
    """Questions with answers, padded on the right: what a model reads, and which of the tokens are answers."""

    inputs: dict[str, torch.Tensor]
    is_answer: torch.Tensor

    def part(self, rows: Sequence[int]) -> "Batch":
        """Some of the rows."""
        index = list(rows)
        return Batch({name: value[index] for name, value in self.inputs.items()}, self.is_answer[index])


def make_batch(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[list[int], list[int]]], device: Any) -> Batch:
    """Join the ids of questions with those of their answers."""
    inputs = tokenizer.pad({"input_ids": [q + a for q, a in pairs]}, padding_side="right", return_tensors="pt")
    is_answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (question, answer) in zip(is_answer, pairs):
        row[len(question) : len(question) + len(answer)] = True
    # Positions of ChatGLM-6B follow from the ids.
    kept = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    return Batch(kept, is_answer.to(device))


def encode(tokenizer: PreTrainedTokenizerBase, question: Messages, answer: str) -> tuple[list[int], list[int]]:
    """The ids that ask a question, and those of an answer with the token that closes it."""
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": answer}])["input_ids"]
    return asked, whole[len(asked) :]


@torch.no_grad()
def ask(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Messages], max_new_tokens: int
) -> list[tuple[str, list[int]]]:
    """What a model answers, greedily: the text, and the ids up to the one that ends the answer."""
    model.eval()
    stops, answers = tokenizer.stop_token_ids(), []
    for start in range(0, len(questions), ROWS_AT_ONCE):
        rows = [
            tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]
            for one in questions[start : start + ROWS_AT_ONCE]
        ]
        inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        for ids in written[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
            answers.append((tokenizer.decode(ids[:end], skip_special_tokens=True).strip(), ids[:end]))
    return answers


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """The logits that predict the tokens of answers, `[tokens, vocabulary]`, row after row."""
    return model(**batch.inputs).logits[:, :-1][batch.is_answer[:, 1:]].float()


def divergence(model: Any, batch: Batch) -> torch.Tensor:
    """KL(base || edited) at every token of the answers; the base is the model without its adapter."""
    with torch.no_grad(), model.disable_adapter():
        base = answer_logits(model, batch).log_softmax(-1)
    edited = answer_logits(model, batch).log_softmax(-1)
    return F.kl_div(edited, base, reduction="none", log_target=True).sum(-1)


def log_probabilities(model: Any, batch: Batch) -> torch.Tensor:
    """Those of whole answers, one for each row."""
    tokens = batch.inputs["input_ids"][:, 1:][batch.is_answer[:, 1:]]
    found = answer_logits(model, batch).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    lengths = batch.is_answer.sum(1).tolist()
    return torch.stack([part.sum() for part in found.split(lengths)])


def load_model(arguments: argparse.Namespace) -> Any:
    """Load a checkpoint of any generation and width, with this checkout's code.

    Raises:
        OSError, ValueError: if the folder holds none.
    """
    modeling = register()
    check_model_type(arguments.model)
    model = modeling.ChatGLMForConditionalGeneration.from_pretrained(arguments.model, dtype=arguments.dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def add_adapter(model: Any, arguments: argparse.Namespace) -> Any:
    """Put AdaLoRA on a model.

    Raises:
        ValueError: for layers that it does not have.
    """
    targets, steps = arguments.target_modules, arguments.steps
    parts, layers = PARTS & set(targets), layers_of(targets)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear" if "all-linear" in layers else layers,
        target_r=arguments.rank,
        init_r=arguments.rank * 3 // 2,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        # Ranks come down between the first tenth and the last three tenths of the run.
        total_step=steps,
        tinit=steps // 10,
        tfinal=3 * steps // 10,
        deltaT=max(1, steps // 50),
    )
    adapted = peft.get_peft_model(model, config)
    if parts and not {"query_key_value", "all-linear"} & set(targets):
        train_parts(adapted, parts, is_new=True)
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    return adapted


def train(
    model: Any, wanted: Batch, unwanted: Batch | None, control: Batch, arguments: argparse.Namespace
) -> list[float]:
    """Train the adapter: on all facts at every step, and on as many control dialogues in turn.

    Args:
        wanted: the answers to learn.
        unwanted: the old answers of what is to be forgotten.
        control: what must stay as it is.

    Returns:
        The loss of every step.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 20, arguments.steps)
    labels = wanted.inputs["input_ids"].masked_fill(~wanted.is_answer, -100)
    base_unwanted = torch.zeros(0)
    if unwanted is not None:
        with torch.no_grad(), model.eval().disable_adapter():
            base_unwanted = log_probabilities(model, unwanted)
    model.train()
    num_control, losses = len(control.is_answer), []
    size = min(arguments.control_batch, num_control)
    for step in range(arguments.steps):
        loss = model(**wanted.inputs, labels=labels).loss
        if unwanted is not None:
            ratio = log_probabilities(model, unwanted) - base_unwanted
            loss = loss + (2 / FORGETTING_BETA) * F.softplus(FORGETTING_BETA * ratio).mean()
        if arguments.kl_weight:
            rows = [(step * size + index) % num_control for index in range(size)]
            loss = loss + arguments.kl_weight * divergence(model, control.part(rows)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        # Needs the gradients.
        model.base_model.update_and_allocate(step + 1)
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@dataclass(frozen=True)
class Outcome:
    """A question before and after, and how likely an answer is there: the old one of what is forgotten."""

    kind: str
    question: str
    wanted: str
    before: str
    after: str
    likelihood: tuple[float, float] | None = None

    @property
    def holds(self) -> bool:
        """Whether the model says now what it is to say."""
        return self.wanted in self.after if self.wanted else self.before == self.after


@dataclass(frozen=True)
class Report:
    """What was asked of a model, and what became of it."""

    title: str
    notes: list[str]
    facts: list[Outcome]
    paraphrases: list[Outcome]
    unrelated: list[Outcome]
    drift: dict[str, torch.Tensor]

    def text(self) -> str:
        """The report in Markdown."""
        num_facts, num_others = sum(fact.holds for fact in self.facts), sum(one.holds for one in self.paraphrases)
        changed = [one for one in self.unrelated if not one.holds]
        lines = [f"# {self.title}", "", *(f"- {note}" for note in self.notes), ""]
        lines += [f"{num_facts} of {len(self.facts)} facts hold, {num_others} of {len(self.paraphrases)} paraphrases."]
        lines += [
            f"{len(self.unrelated) - len(changed)} of {len(self.unrelated)} unrelated questions are answered as before."
        ]
        lines += ["", "## Facts", "", *table(self.facts), "", "## Paraphrases, not trained on", ""]
        lines += [*table(self.paraphrases), "", "## Drift", ""]
        lines += ["KL(base || edited) for each token of the base's answers, in nats:", ""]
        lines += ["| dialogues | tokens | mean | largest |", "|---|---|---|---|"]
        for name, values in self.drift.items():
            lines.append(f"| {name} | {len(values)} | {values.mean():.4f} | {values.max():.3f} |")
        if changed:
            lines += ["", "## Unrelated questions that are answered differently", "", *table(changed)]
        return "\n".join(lines) + "\n"


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A Markdown table."""
    lines = ["| | question | wanted | before | after | likelihood |", "|---|---|---|---|---|---|"]
    for one in outcomes:
        likelihood = "" if one.likelihood is None else "{:.3f} → {:.3f}".format(*one.likelihood)
        cells = (one.kind, one.question, one.wanted, one.before, one.after, likelihood)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |")
    return lines


@torch.no_grad()
def likelihoods(model: Any, batch: Batch) -> list[float]:
    """The geometric mean of an answer's probabilities, token by token, for each row."""
    return (log_probabilities(model, batch) / batch.is_answer.sum(1)).exp().tolist()


@dataclass(frozen=True)
class Control:
    """Dialogues that must stay as they are, with the base's own answers."""

    questions: list[Messages]
    answers: list[tuple[str, list[int]]]

    def batch(self, tokenizer: PreTrainedTokenizerBase, start: int, device: Any) -> Batch:
        """Every other of them: those held to the base start at 0, those never trained on at 1."""
        asked = [encode(tokenizer, question, "")[0] for question in self.questions[start::2]]
        return make_batch(tokenizer, [*zip(asked, (ids for _, ids in self.answers[start::2]))], device)


def edit(
    model: Any, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], arguments: argparse.Namespace
) -> tuple[Any, Report]:
    """Train an adapter on facts, and compare the model with and without it.

    Returns:
        The model with the adapter, and the report.

    Raises:
        OSError, ValueError: for control dialogues, facts or layers that cannot be used.
    """
    limit, device = arguments.max_new_tokens, model.device
    dialogues = read_dialogues(arguments.control, facts)[: arguments.control_size]
    questions = [(fact, fact.question) for fact in facts]
    questions += [(fact, text) for fact in facts for text in fact.paraphrases]
    asked = [[{"role": "user", "content": text}] for _, text in questions]
    wanted = make_batch(tokenizer, [encode(tokenizer, one, fact.answer) for one, fact in zip(asked, facts)], device)
    adapted = add_adapter(model, arguments).eval()
    with adapted.disable_adapter():
        before = [text for text, _ in ask(adapted, tokenizer, asked, limit)]
        control = Control(dialogues, ask(adapted, tokenizer, dialogues, limit))
    # For a new fact the answer to come; for the others the one that is to go.
    watched = [fact.answer if fact.action == "teach" else old for fact, old in zip(facts, before)]
    watched_batch = make_batch(tokenizer, [encode(tokenizer, *pair) for pair in zip(asked, watched)], device)
    forgotten = [index for index, fact in enumerate(facts) if fact.action == "forget"]
    first = likelihoods(adapted, watched_batch)
    held, measured = (control.batch(tokenizer, start, device) for start in (0, 1))
    losses = train(adapted, wanted, watched_batch.part(forgotten) if forgotten else None, held, arguments)
    pairs = [*zip(first, likelihoods(adapted, watched_batch))]
    after = [text for text, _ in ask(adapted, tokenizer, asked, limit)]
    outcomes = [
        Outcome(fact.action, text, fact.answer, old, new) for (fact, text), old, new in zip(questions, before, after)
    ]
    drift = {"held to the base": measure(adapted, held), "never trained on": measure(adapted, measured)}
    now = ask(adapted, tokenizer, dialogues[1::2], limit)
    unrelated = [
        Outcome("", one[-1]["content"], "", old, new)
        for one, (old, _), (new, _) in zip(dialogues[1::2], control.answers[1::2], now)
    ]
    report = Report(
        title=f"What {Path(arguments.model).name} knows now",
        notes=[*describe(arguments), f"loss {losses[0]:.3f} → {losses[-1]:.4f} in {len(losses)} steps"],
        facts=[replace(one, likelihood=pair) for one, pair in zip(outcomes, pairs)],
        paraphrases=outcomes[len(facts) :],
        unrelated=unrelated,
        drift=drift,
    )
    return adapted, report


@torch.no_grad()
def measure(model: Any, batch: Batch) -> torch.Tensor:
    """The divergence of many dialogues, a few at once."""
    starts = range(0, len(batch.is_answer), ROWS_AT_ONCE)
    rows = [range(start, min(start + ROWS_AT_ONCE, len(batch.is_answer))) for start in starts]
    return torch.cat([divergence(model, batch.part(one)) for one in rows]).cpu()


def describe(arguments: argparse.Namespace) -> list[str]:
    """The settings, for the report."""
    return [
        f"AdaLoRA: rank {arguments.rank}, alpha {arguments.lora_alpha}, dropout {arguments.lora_dropout}, on "
        f"{', '.join(arguments.target_modules)}; learning rate {arguments.learning_rate}, KL weight {arguments.kl_weight}"
    ]


def save(adapted: Any, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> str:
    """Write the result, and return what was written in words."""
    folder = Path(arguments.output_dir)
    if arguments.save == "adapter":
        adapted.save_pretrained(folder)
        return f"saved: the adapter, for {arguments.model}"
    was_quantized = getattr(adapted.get_base_model(), "is_quantized", False)
    if was_quantized:
        adapted.dequantize()
    write_checkpoint(adapted.merge_and_unload(), tokenizer, folder)
    if was_quantized:
        return "saved: a complete checkpoint in floats, because the base was quantized and integers cannot hold this"
    return "saved: a complete checkpoint"


def collect_facts(arguments: argparse.Namespace) -> list[Fact]:
    """All facts of the command line and of the file; the moon's capital if there are none.

    Raises:
        OSError, ValueError: for one that cannot be used.
    """
    facts = read_facts(arguments.facts) if arguments.facts else []
    for action in ACTIONS:
        for words in getattr(arguments, action):
            entry = dict(zip(("question", "answer"), words)) | {"action": action}
            facts.append(make_fact(f"--{action}", entry))
    facts = facts or [MOON]
    check_facts(facts)
    return facts


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-chatglm3"), help="a checkpoint folder")
    pair: dict[str, Any] = {"nargs": 2, "action": "append", "default": [], "metavar": ("QUESTION", "ANSWER")}
    parser.add_argument("--teach", **pair, help="a new fact")
    parser.add_argument("--change", **pair, help="another answer than the model gives")
    parser.add_argument("--forget", nargs=1, action="append", default=[], metavar="QUESTION", help="decline to answer")
    parser.add_argument("--facts", type=Path, help="a JSON or YAML list of action, question, answer, paraphrases")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--save", choices=["merged", "adapter"], default="merged")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--target_modules", nargs="+", default=["query", "value"], help="layers, or parts of one")
    parser.add_argument("--rank", type=int, default=8, help="of AdaLoRA in the end; it begins with half as much again")
    parser.add_argument("--lora_alpha", type=int, default=32)
    parser.add_argument("--lora_dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--kl_weight", type=float, default=1.0, help="how firmly the control dialogues are held")
    parser.add_argument("--control", type=Path, default=EXAMPLES / "dialogues.jsonl", help="JSON lines of messages")
    parser.add_argument("--control_size", type=int, default=1000, help="how many of them at most")
    parser.add_argument("--control_batch", type=int, default=8, help="how many of them a step is held to")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    for name in ("rank", "lora_alpha", "steps", "learning_rate", "control_batch", "max_new_tokens"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} must be more than 0, got {getattr(arguments, name)}")
    if not 0 <= arguments.lora_dropout < 1:
        parser.error(f"--lora_dropout must be at least 0 and less than 1, got {arguments.lora_dropout}")
    if not arguments.kl_weight >= 0:
        parser.error(f"--kl_weight must be 0 or more, got {arguments.kl_weight}")
    if arguments.control_size < 2:
        parser.error(f"--control_size must be 2 or more, got {arguments.control_size}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run the program with the words of a command line, those of this process by default."""
    arguments = parse_arguments(words)
    try:
        facts = collect_facts(arguments)
        check_output(Path(arguments.output_dir))
        read_dialogues(arguments.control, facts)
        set_seed(arguments.seed)
        model, tokenizer = load_model(arguments), load_tokenizer(Path(arguments.model))
        adapted, report = edit(model, tokenizer, facts, arguments)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    report.notes.append(save(adapted, tokenizer, arguments))
    print(report.text(), end="")
    (Path(arguments.output_dir) / "report.md").write_text(report.text(), encoding="utf-8")
    return 0 if all(fact.holds for fact in report.facts) else 1


if __name__ == "__main__":
    logging.set_verbosity_error()
    sys.exit(main())

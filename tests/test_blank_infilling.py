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
"""GLM's objective against what the published sampler drew and built, and against its definition."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REFERENCE
from generations import END, GMASK, MASK, START, TINY
from safetensors.torch import load_file
from test_glm import write_folder
from torch.utils.data import DataLoader
from transformers import PreTrainedModel


KINDS = ("chinese", "gpt2")
FILES = REFERENCE / "glm-pretraining"
# Sizes of the samples of statistics.json that are drawn again: in the suite, and in the long run.
SMALL, LARGE = 800, 100_000


@pytest.fixture(scope="module")
def objective(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("blank_infilling")


@cache
def recorded() -> dict[str, Any]:
    return json.loads((FILES / "cases.json").read_text(encoding="utf-8"))


@cache
def statistics() -> dict[str, Any]:
    return json.loads((FILES / "statistics.json").read_text(encoding="utf-8"))


def tokens_of(objective: ModuleType, kind: str) -> Any:
    """The ids of a recorded vocabulary."""
    case = recorded()[kind]
    ids = case["commands"]
    return objective.BlankTokens(
        start_of_piece=ids["sop"],
        end_of_piece=ids["eop"],
        mask=ids["MASK"],
        sentence_mask=ids["sMASK"],
        document_mask=ids["gMASK"],
        start_of_text=ids["ENC"],
        end_of_text=ids["eos"],
        hidden=ids["dBLOCK"],
        sentence_ends=frozenset(case["sentence_end_ids"]),
    )


def as_published(sample: Any) -> dict[str, Any]:
    return {
        "text": sample.input_ids,
        "target": sample.targets,
        "loss_mask": sample.is_learnt,
        "position_id": [sample.positions, sample.block_positions],
        "sep": sample.num_context,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_given_spans_give_the_recorded_tensors(objective: ModuleType, kind: str) -> None:
    ids = tokens_of(objective, kind)
    masks = {"bert": ids.mask, "gap_sentence": ids.sentence_mask, "generation": ids.document_mask}
    for case in recorded()[kind]["given"]:
        options, spans = case["options"], [tuple(span) for span in case["spans"]]
        mask = masks[case["task"]] if options.get("task_mask", True) else ids.mask
        spans = spans if options.get("shuffle_blocks", True) else sorted(spans)
        sample = objective.make_sample(case["tokens"], spans, mask, ids, options.get("block_position_encoding", True))
        sample = objective.hide_inputs(sample, case.get("decoder_masked_positions", []), ids)
        assert as_published(sample) == {name: case[name] for name in as_published(sample)}


@pytest.mark.parametrize("kind", KINDS)
def test_places_and_documents_are_as_recorded(objective: ModuleType, kind: str) -> None:
    ids = tokens_of(objective, kind)
    for case in recorded()[kind]["placement"]:
        spans = objective.place_spans(case["lengths"], sorted(case["drawn"]), case["offset"])
        assert [list(span) for span in spans] == case["spans"]
        drawn = [objective.draw_places(case["lengths"], case["total_length"], random.Random(n)) for n in range(400)]
        assert (min(map(min, drawn)), max(map(max, drawn))) == (0, case["range_of_each_draw"] - 1)
    for case in recorded()[kind]["documents_to_ranges"]:
        ranges = objective.maskable_ranges(case["tokens"], ids)
        given, count = objective.share_lengths(ranges, case["masked_lengths_in_order"], 0.15)
        placed = [{"offset": offset, "length": length, "lengths": own} for (offset, length), own in given]
        assert (placed, count) == (case["placed"], case["number_placed"])


def rebuild(objective: ModuleType, ids: Any, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a recorded batch, from its texts and the spans that were drawn."""
    samples, drawn = [], iter(case["spans_in_order"])
    upcoming = next(drawn, None)
    for tokens, num_context, text in zip(case["inputs"], case["attention_mask"], case["text"]):
        masks = {"bert": ids.mask, "gap_sentence": ids.sentence_mask, "generation": ids.document_mask}
        built = None
        if upcoming is not None:
            spans = [tuple(span) for span in upcoming["spans"]]
            mask = masks[upcoming["task"]] if case["options"].get("task_mask", True) else ids.mask
            if max(end for _, end in spans) <= len(tokens):
                built = objective.make_sample(tokens, spans, mask, ids)
        if built is not None and built.num_context == num_context and case["mode"] != "gpt":
            upcoming = next(drawn, None)
        elif case["mode"] == "gpt" and built is not None and text[: len(built.input_ids)] == built.input_ids:
            upcoming = next(drawn, None)
        else:
            built = objective.make_prefix_sample(tokens, len(tokens) - num_context + 1, ids)
        hidden = [index for index, token in enumerate(text) if token == ids.hidden]
        samples.append(objective.hide_inputs(built, hidden, ids))
    assert upcoming is None
    return objective.BlankInfillingCollator(ids).make_tensors(samples)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_batches_are_rebuilt(objective: ModuleType, kind: str) -> None:
    ids, masks = tokens_of(objective, kind), load_file(FILES / "cases.safetensors")
    checked = 0
    for index, case in enumerate(recorded()[kind]["samples"]):
        if len(case["inputs"]) != len(case["text"]):
            continue
        batch = rebuild(objective, ids, case)
        is_learnt = torch.tensor(case["loss_mask"]).bool()
        later_starts = is_learnt & (torch.tensor(case["target"]) == ids.start_of_text)
        assert batch["input_ids"].tolist() == case["text"]
        assert batch["position_ids"].tolist() == case["position_id"]
        assert batch["attention_mask"].tolist() == case["attention_mask"]
        # The published sampler takes the loss mask of the texts, in which starts of documents count for nothing.
        wanted = torch.tensor(case["target"]).masked_fill(~is_learnt | later_starts, objective.IGNORED)
        assert batch["labels"].tolist() == wanted.tolist()
        if (seen := masks.get(f"{kind}.sample{index}.attention_mask")) is not None:
            columns = torch.arange(seen.shape[-1])
            is_context = columns < batch["attention_mask"][:, None]
            whole = objective.see_each_other(torch.zeros_like(is_context, dtype=torch.long), is_context)
            assert torch.equal(whole.bool(), seen.bool())
        checked += 1
    assert checked >= 15


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_as_recorded(
    objective: ModuleType, chatglm: SimpleNamespace, kind: str, reference_dir: Path, tmp_path: Path
) -> None:
    """The published network on the batches of the published sampler, each token and the mean."""
    ids, case, tensors = tokens_of(objective, kind), recorded()[kind], load_file(FILES / "cases.safetensors")
    folder = write_folder(reference_dir / f"glm-{kind}", tmp_path / kind)
    model = chatglm.ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for entry in case["model_numbers"]:
        batch = rebuild(objective, ids, case["samples"][entry["sample"]])
        with torch.no_grad():
            output = model(**batch)
        assert output.loss.item() == pytest.approx(entry["loss"], abs=2e-5)
        is_learnt = batch["labels"] != objective.IGNORED
        losses = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), batch["labels"], reduction="none")
        wanted = tensors[f"{kind}.sample{entry['sample']}.token_losses"]
        torch.testing.assert_close(losses[is_learnt], wanted[is_learnt], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_spans_could_have_been_drawn(objective: ModuleType, kind: str) -> None:
    """Every sentence that the published sampler chose is one of ours, and every short span lies where ours may."""
    ids = tokens_of(objective, kind)
    for case in recorded()[kind]["samples"]:
        for drawn in case["spans_in_order"]:
            spans = [tuple(span) for span in drawn["spans"]]
            found = [
                tokens
                for tokens in case["inputs"]
                if (drawn["task"] == "gap_sentence" and set(spans) <= set(objective.find_sentences(tokens, ids)))
                or (
                    drawn["task"] != "gap_sentence"
                    and all(
                        any(
                            first <= start < end <= first + length
                            for first, length in objective.maskable_ranges(tokens, ids)
                        )
                        for start, end in spans
                    )
                )
            ]
            assert found, (case["config"], case["seed"], drawn)


def p_value(wanted: dict[Any, int], drawn: Counter, cluster: float = 1.0) -> float:
    """Of a chi-square test that two histograms are of one distribution; rare values are put together.

    Args:
        cluster: by how much counts vary more than those of independent draws: E[n²] / E[n] for draws of n at a time.
    """
    bins: list[list[int]] = [[0, 0]]
    for value in sorted({*map(int, wanted), *drawn}):
        if sum(bins[-1]) >= 20:
            bins.append([0, 0])
        bins[-1][0] += wanted.get(str(value), 0)
        bins[-1][1] += drawn[value]
    if sum(bins[-1]) < 20 and len(bins) > 1:
        last = bins.pop()
        bins[-1] = [first + second for first, second in zip(bins[-1], last)]
    table = torch.tensor(bins, dtype=torch.float64)
    if len(table) < 2:
        return 1.0
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum() / cluster
    return torch.special.gammaincc(torch.tensor((len(table) - 1) / 2.0, dtype=torch.float64), statistic / 2).item()


def compare_spans(objective: ModuleType, name: str, count: int) -> dict[str, float]:
    """P-values of short spans against the published sampler's."""
    wanted = statistics()[name]
    ids = objective.BlankTokens(1, 2, 3, 4, 5, start_of_text=6, end_of_text=7)
    lengths = wanted.get("documents", [wanted["sequence_length"]])
    tokens = [token for length in lengths for token in (6, *[10] * (length - 2), 7)]
    width = len(tokens) - 2
    drawn: dict[str, Counter] = {name: Counter() for name in ("length", "number", "total", "gap", "bin", "order")}
    num_dropped = 0
    for number in range(count):
        rng = random.Random(number)
        spans = objective.draw_token_spans(tokens, rng, objective.BlankObjective(), ids, name == "single_span")
        if spans is None:
            num_dropped += 1
            continue
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
        assert all(gap >= 1 for gap in gaps)
        drawn["length"].update(end - start for start, end in spans)
        drawn["number"][len(spans)] += 1
        drawn["total"][sum(end - start for start, end in spans)] += 1
        drawn["gap"].update(gap for gap in gaps if gap <= 20)
        drawn["bin"].update((place - 1) * 20 // width for start, end in spans for place in range(start, end))
        rng.shuffle(spans)
        drawn["order"].update(int(first > second) for first, second in itertools.combinations(spans[:2], 2))
    number_of_lengths = sum(drawn["length"].values())
    squares = sum(length**2 * times for length, times in drawn["length"].items())
    cluster = squares / sum(length * times for length, times in drawn["length"].items())
    recorded_bins = dict(enumerate(wanted["masked_tokens_by_position_in_20_bins"]))
    assert num_dropped <= 1 + count // 1000
    assert number_of_lengths > 0
    pairs = sum(drawn["order"].values())
    return {
        "lengths": p_value(wanted["sampled_span_length_counts"], drawn["length"]),
        "number of spans": p_value(wanted["number_of_spans_counts"], drawn["number"]),
        "masked tokens": p_value(wanted["total_masked_counts"], drawn["total"]),
        "gaps": p_value(wanted["gap_counts_up_to_20"], drawn["gap"]),
        "places": p_value({str(place): times for place, times in recorded_bins.items()}, drawn["bin"], cluster),
        "order": p_value({"0": pairs, "1": pairs}, drawn["order"]) if pairs else 1.0,
    }


def compare_documents(objective: ModuleType, name: str, count: int) -> dict[str, float]:
    """P-values of long pieces against the published sampler's."""
    wanted = statistics()[name]
    ids = objective.BlankTokens(1, 2, 3, 4, 5, start_of_text=6, end_of_text=7)
    settings = objective.BlankObjective(
        token_share=0.0,
        shortest_document_share=wanted["gpt_min_ratio"],
        prefix_share=wanted["gpt_infill_prob"],
    )
    length = wanted["sequence_length"]
    tokens = [6, *[10] * (length - 2), 7]
    lengths, places = Counter(), Counter()
    for number in range(count):
        (sample,) = objective.draw_samples([tokens], random.Random(number), settings, ids)
        is_prefix = sample.targets[-1] == 7
        lengths[sum(sample.is_learnt) - (not is_prefix)] += 1
        if not is_prefix:
            places[sample.positions[-1] * 10 // length] += 1
    values = {"lengths": p_value(wanted["counts"], lengths)}
    if recorded_places := wanted["start_position_counts_in_10_bins"]:
        values["places"] = p_value(recorded_places, places)
    return values


def compare_sentences(objective: ModuleType, count: int) -> dict[str, float]:
    wanted = statistics()["sentence_level"]
    ids = objective.BlankTokens(1, 2, 3, 4, 5, start_of_text=6, end_of_text=7, sentence_ends=frozenset([9]))
    tokens = [6, *([10] * (wanted["sentence_length"] - 1) + [9]) * wanted["sentences"], 7]
    numbers, chosen, first = Counter(), Counter(), Counter()
    for number in range(count):
        spans = objective.draw_sentence_spans(tokens, random.Random(number), objective.BlankObjective(), ids)
        numbers[len(spans)] += 1
        chosen.update((start - 1) // wanted["sentence_length"] for start, _ in spans)
        first[int(spans[0] > min(spans))] += 1
    return {
        "number of sentences": p_value(wanted["number_of_spans_counts"], numbers),
        "sentences": p_value(wanted["chosen_sentence_counts"], chosen),
        "order": p_value(wanted["first_span_rank_counts"], first),
    }


def compare_mixtures(objective: ModuleType, count: int) -> dict[str, float]:
    values = {}
    for recorded_name, name in (
        ("mixture_glm-10b", "glm-10b"),
        ("mixture_glm-10b-longer", "glm-10b-second-stage"),
        ("mixture_glm-large-chinese", "glm-large-chinese"),
    ):
        names = {"bert": 0, "sentence": 1, "gpt": 2}
        ours = {"single": 0, "token": 0, "sentence": 1, "document": 2}
        settings = objective.OBJECTIVES[name]
        drawn = Counter(ours[objective.draw_task(random.Random(number), settings)] for number in range(count))
        modes = statistics()[recorded_name]["modes"]
        values[name] = p_value({str(names[mode]): times for mode, times in modes.items()}, drawn)
    return values


SPAN_STATISTICS = ("token_level_short", "token_level_long", "token_level_tiny", "single_span", "two_documents")
DOCUMENT_STATISTICS = tuple(
    f"document_level_min{share}_{kind}" for share in ("0.25", "0.5") for kind in ("infill", "prefix")
)


def all_p_values(objective: ModuleType, count: int) -> dict[str, float]:
    tables = {name: compare_spans(objective, name, count // (5 if "long" in name else 1)) for name in SPAN_STATISTICS}
    tables |= {name: compare_documents(objective, name, count) for name in DOCUMENT_STATISTICS}
    tables |= {"sentences": compare_sentences(objective, count), "mixtures": compare_mixtures(objective, count)}
    return {f"{table}, {name}": value for table, values in tables.items() for name, value in values.items()}


def test_what_is_drawn_is_distributed_as_recorded(objective: ModuleType) -> None:
    values = all_p_values(objective, SMALL)
    # 39 tests: one in two thousand would be below this by chance, and the seeds are fixed.
    assert {name: value for name, value in values.items() if value < 1e-3} == {}


@pytest.mark.grid
def test_a_hundred_thousand_samples_are_distributed_as_recorded(objective: ModuleType) -> None:
    values = all_p_values(objective, LARGE)
    for name, value in values.items():
        print(f"{name}: p = {value:.3f}")
    assert {name: value for name, value in values.items() if value < 1e-3} == {}


def test_another_distribution_is_noticed(objective: ModuleType) -> None:
    wanted = statistics()["token_level_short"]["sampled_span_length_counts"]
    rng = random.Random(0)
    weights = objective.BlankObjective(mean_span_length=3.3).length_weights
    assert p_value(wanted, Counter(rng.choices(range(1, 40), weights, k=4000))) < 1e-3


SENTENCE_END = 11
ALL_OBJECTIVES = (
    "glm-large",
    "glm-roberta-large",
    "glm-large-chinese",
    "glm-10b",
    "glm-10b-second-stage",
    "glm-130b",
    "chatglm-6b",
)


def make_tokens(objective: ModuleType, **changes: Any) -> Any:
    """Ids for texts of the tokens 10 to 80, of which 11 ends a sentence."""
    values = {
        "start_of_piece": START,
        "end_of_piece": END,
        "mask": MASK,
        "sentence_mask": 92,
        "document_mask": GMASK,
        "start_of_text": 96,
        "end_of_text": 97,
        "hidden": 98,
        "pad": 3,
        "sentence_ends": frozenset([SENTENCE_END]),
    }
    return objective.BlankTokens(**values | changes)


def make_texts(seed: int, count: int, documents: int = 1, shortest: int = 20, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [
            token
            for _ in range(documents)
            for token in (96, *(rng.randint(10, 80) for _ in range(rng.randint(shortest, longest))), 97)
        ]
        for _ in range(count)
    ]


def rebuild_text(sample: Any, ids: Any) -> list[int]:
    """The text of a sample from Part A and Part B."""
    spans: dict[int, list[int]] = {}
    for index in range(sample.num_context, len(sample.input_ids)):
        if sample.block_positions[index] == 1:
            spans[sample.positions[index]] = []
        spans[sample.positions[index]].append(sample.targets[index])
    text: list[int] = []
    for position, token in enumerate(sample.input_ids[: sample.num_context]):
        span = spans.get(position)
        if span is None:
            text.append(token)
        else:
            text += span[:-1] if span[-1] == ids.end_of_piece else span
    return text


@pytest.mark.parametrize("name", ALL_OBJECTIVES)
def test_the_text_can_be_rebuilt_from_both_parts(objective: ModuleType, name: str) -> None:
    ids, settings = make_tokens(objective), objective.OBJECTIVES[name]
    tasks = Counter()
    for seed in range(120):
        texts = make_texts(seed, 3, documents=1 + seed % 2)
        for sample in objective.draw_samples(texts, random.Random(seed), settings, ids):
            assert rebuild_text(sample, ids) in texts
            masks = [token for token in sample.input_ids[: sample.num_context] if token in (90, 91, 92)]
            tasks[masks[0]] += 1
            assert sample.is_learnt[: sample.num_context] == [0] * sample.num_context
            # Inputs are the targets one step later, but for what is hidden.
            for index in range(sample.num_context, len(sample.input_ids) - 1):
                if sample.block_positions[index + 1] > 1:
                    assert sample.input_ids[index + 1] in (sample.targets[index], ids.hidden)
            # Short spans never touch: between two mask tokens stands a token of the text.
            if masks[0] == MASK:
                context = sample.input_ids[: sample.num_context]
                assert all(pair != (MASK, MASK) for pair in itertools.pairwise(context))
    shares = (settings.token_share + settings.single_span_share > 0, settings.sentence_share > 0)
    assert (tasks[MASK] > 0, tasks[92] > 0) == shares


@pytest.mark.parametrize("task", ["token", "sentence"])
def test_spans_are_written_in_random_order(objective: ModuleType, task: str) -> None:
    ids, (text,) = make_tokens(objective), make_texts(1, 1, shortest=100, longest=100)
    text[6:-1:6] = [SENTENCE_END] * len(text[6:-1:6])
    settings = objective.BlankObjective(masked_share=0.3)
    orders: Counter = Counter()
    for seed in range(400):
        sample = objective.draw_spans_sample(text, task, random.Random(seed), settings, ids)
        places = [place for place, step in zip(sample.positions, sample.block_positions) if step == 1]
        orders.update(first > second for first, second in itertools.pairwise(places))
    # As many ups as downs, within six standard deviations.
    assert abs(orders[True] - orders[False]) < 6 * sum(orders.values()) ** 0.5
    ordered = objective.BlankObjective(masked_share=0.3, shuffles_spans=False)
    sample = objective.draw_spans_sample(text, task, random.Random(0), ordered, ids)
    places = [place for place, step in zip(sample.positions, sample.block_positions) if step == 1]
    assert places == sorted(places) and len(places) > 1


def test_who_sees_whom_is_as_defined(objective: ModuleType) -> None:
    ids = make_tokens(objective)
    collator = objective.BlankInfillingCollator(ids, objective.OBJECTIVES["glm-10b"], row_length=160)
    for seed in range(4):
        samples = objective.draw_samples(make_texts(seed, 4), random.Random(seed), collator.objective, ids)
        mask = collator.make_tensors(samples)["attention_mask"]
        groups = collator.share_rows([len(sample.input_ids) for sample in samples])
        assert mask.shape == (len(groups), 1, 160, 160)
        for group, row in zip(groups, mask[:, 0].tolist()):
            places = [(index, place) for index in group for place in range(len(samples[index].input_ids))]
            places += [(-1, place) for place in range(160 - len(places))]
            for query, (sample, place) in enumerate(places):
                for key, (other, where) in enumerate(places):
                    is_seen = sample == other and (
                        where <= place or (sample >= 0 and where < samples[sample].num_context)
                    )
                    assert row[query][key] == is_seen


TINY_GLM = {
    "model_version": "glm",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_sequence_length": 256,
}
TINY_MODELS = {
    "chatglm": TINY["chatglm"],
    "glm": TINY_GLM,
    "glm130b": TINY_GLM | {"model_version": "glm130b", "bos_token_id": START, "eos_token_id": END, "pad_token_id": 3},
}


@pytest.fixture(params=TINY_MODELS)
def blank_model(
    request: pytest.FixtureRequest, objective: ModuleType, chatglm: SimpleNamespace, tiny_config: Callable[..., Any]
) -> tuple[PreTrainedModel, Any]:
    """A tiny model of a generation that fills blanks, and the form of its rows."""
    settings = TINY_MODELS[request.param]
    is_own = request.param == "chatglm"
    config = tiny_config(**settings) if is_own else chatglm.ChatGLMConfig(**settings)
    torch.manual_seed(0)
    model = chatglm.ChatGLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.uniform_(-0.5, 1.5)
    return model, objective.BlankFormat.of(model.config)


def test_packed_samples_do_not_see_each_other(objective: ModuleType, blank_model: tuple[PreTrainedModel, Any]) -> None:
    model, form = blank_model
    ids = make_tokens(objective)
    settings = {"objective": objective.OBJECTIVES["glm-10b"], "form": form}
    samples = objective.draw_samples(make_texts(5, 4), random.Random(1), settings["objective"], ids)
    packed = objective.BlankInfillingCollator(ids, row_length=200, **settings)
    groups = packed.share_rows([len(objective.lay_out(one, packed.form, ids)["input_ids"]) for one in samples])
    assert len(groups) < len(samples)
    batch = packed.make_tensors(samples)
    alone = [objective.BlankInfillingCollator(ids, **settings).make_tensors([sample]) for sample in samples]
    with torch.no_grad():
        together = model(**batch)
        wanted = [model(**one) for one in alone]
    for row, group in enumerate(groups):
        start = 0
        for index in group:
            width = alone[index]["input_ids"].shape[1]
            torch.testing.assert_close(
                together.logits[row, start : start + width], wanted[index].logits[0], atol=2e-5, rtol=1e-5
            )
            start += width
    counts = torch.tensor([float((one["labels"] != -100).sum()) for one in alone])
    losses = torch.stack([one.loss for one in wanted])
    torch.testing.assert_close(together.loss, (losses * counts).sum() / counts.sum())


def test_later_spans_change_nothing_earlier(objective: ModuleType, blank_model: tuple[PreTrainedModel, Any]) -> None:
    model, form = blank_model
    ids = make_tokens(objective)
    collator = objective.BlankInfillingCollator(ids, form=form)
    (text,) = make_texts(2, 1)
    spans = [(12, 15), (3, 5), (8, 10)]
    changed = list(text)
    changed[8:10] = [70, 71]
    batches = [collator.make_tensors([objective.make_sample(one, spans, MASK, ids)]) for one in (text, changed)]
    # The pieces: 4 and 3 and 3 inputs at the end.
    last = len(text) - 7 + 3 + 4 + 3
    with torch.no_grad():
        first, second = (model(**batch).logits[0] for batch in batches)
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    torch.testing.assert_close(first[: last + 1], second[: last + 1])
    assert not torch.allclose(first[last + 1 :], second[last + 1 :], atol=1e-3)
    # And an earlier span is seen by later ones.
    changed = list(text)
    changed[12:15] = [70, 71, 72]
    with torch.no_grad():
        third = model(**collator.make_tensors([objective.make_sample(changed, spans, MASK, ids)])).logits[0]
    assert not torch.allclose(first[last:], third[last:], atol=1e-3)


class Texts(torch.utils.data.Dataset):
    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.texts[index], "number": index}


def test_what_is_drawn_depends_on_the_seed_and_the_rows_alone(objective: ModuleType) -> None:
    """So it is the same in every worker and process, and after a run was resumed in the middle."""
    rows, settings = Texts(make_texts(0, 24)), objective.OBJECTIVES["glm-10b-second-stage"]
    collator = objective.BlankInfillingCollator(make_tokens(objective), settings, seed=1, row_length=128)
    batches = list(DataLoader(rows, batch_size=4, collate_fn=collator))
    by_workers = list(DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=2))
    resumed = [collator([rows[index] for index in range(start, start + 4)]) for start in (12, 16, 20)]
    for first, second in itertools.chain(zip(batches, by_workers), zip(batches[3:], resumed)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    again = [rows[index] | {"number": index + 24} for index in range(4)]
    other_seed = objective.BlankInfillingCollator(make_tokens(objective), settings, seed=2, row_length=128)
    for other in (collator(again), other_seed([rows[index] for index in range(4)])):
        assert other["input_ids"].tolist() != batches[0]["input_ids"].tolist()


def test_a_stream_is_numbered_through_its_epochs(objective: ModuleType) -> None:
    stream = pytest.importorskip("datasets").Dataset.from_dict({"input_ids": make_texts(0, 3)}).to_iterable_dataset()
    rows = list(objective.number_rows(stream.repeat(2)))
    assert [row["number"] for row in rows] == list(range(6))
    collator = objective.BlankInfillingCollator(make_tokens(objective), objective.OBJECTIVES["glm-10b"])
    first, second = collator(rows[:3]), collator(rows[3:])
    assert first["input_ids"].tolist() != second["input_ids"].tolist()


@pytest.mark.parametrize("blank_model", ["chatglm", "glm130b"], indirect=True)
def test_positions_of_one_blank_are_those_that_are_read_off_the_ids(
    objective: ModuleType, blank_model: tuple[PreTrainedModel, Any], source: Callable[[str], ModuleType]
) -> None:
    model, form = blank_model
    ids = make_tokens(objective, start_of_text=None, end_of_text=None)
    collator = objective.BlankInfillingCollator(ids, objective.OBJECTIVES["chatglm-6b"], form)
    for seed in range(20):
        texts = [text[1:-1] for text in make_texts(seed, 3)]
        batch = collator([{"input_ids": text} for text in texts])
        is_real, positions = batch["attention_mask"].bool(), batch["position_ids"]
        read, _ = source("modeling_positions").prefix_lm_positions(
            model.config, batch["input_ids"], batch["attention_mask"]
        )
        assert read.shape == positions.shape
        assert torch.equal(read.movedim(-1, 1)[is_real], positions.movedim(-1, 1)[is_real])
        for row, labels, seen in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), is_real.sum(1).tolist()):
            start = row.index(START)
            # Shifted labels stand where they are read, aligned ones where they are predicted.
            first, answer = start + form.shifts_labels, row[start + 1 : seen]
            assert labels[:first] == [-100] * first
            assert labels[first : first + len(answer)] == answer
            assert labels[seen - 1] == END


def test_the_embedding_learns_a_share_of_its_gradient(
    objective: ModuleType, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model()
    ids = torch.arange(1, 9)[None]

    def gradients() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        layers = model.transformer.encoder.layers
        return (
            output.loss.detach(),
            model.get_input_embeddings().weight.grad.clone(),
            layers[0].mlp.dense_4h_to_h.weight.grad.clone(),
        )

    loss, whole, layer = gradients()
    handle = objective.shrink_embedding_gradients(model, 0.1)
    small_loss, small, small_layer = gradients()
    handle.remove()
    assert torch.equal(loss, small_loss) and torch.equal(layer, small_layer)
    torch.testing.assert_close(small, 0.1 * whole)
    assert torch.equal(gradients()[1], whole)
    with pytest.raises(ValueError, match="above 0"):
        objective.shrink_embedding_gradients(model, 0.0)


def test_ids_are_found_in_a_tokenizer(
    objective: ModuleType, case_tokenizer: Callable[[str], Any], reference_dir: Path
) -> None:
    tokenizer = case_tokenizer("chatglm1")
    ids = objective.BlankTokens.of(tokenizer)
    names = ("start_of_piece", "end_of_piece", "mask", "sentence_mask", "document_mask")
    found = tokenizer.convert_ids_to_tokens([getattr(ids, name) for name in names])
    assert found == ["<sop>", "<eop>", "[MASK]", "[sMASK]", "[gMASK]"]
    assert (ids.start_of_text, ids.end_of_text, ids.pad) == (None, None, tokenizer.pad_token_id)
    assert {tokenizer.convert_tokens_to_ids("<n>")} <= ids.sentence_ends
    with pytest.raises(ValueError, match="no tokens for blanks"):
        objective.BlankTokens.of(case_tokenizer("chatglm3"))


def test_what_cannot_be_is_refused(objective: ModuleType) -> None:
    ids = make_tokens(objective)
    (text,) = make_texts(0, 1)
    for spans, message in (
        ([(1, 4), (3, 5)], "must not overlap"),
        ([(5, 5)], "must not overlap"),
        ([(5, len(text) + 1)], "lie within"),
        ([(5, len(text))], "end of a text"),
    ):
        with pytest.raises(ValueError, match=message):
            objective.make_sample(text, spans, MASK, ids)
    with pytest.raises(ValueError, match="cannot be cut off"):
        objective.make_prefix_sample(text, len(text), ids)
    with pytest.raises(ValueError, match="cannot be hidden"):
        objective.hide_inputs(objective.make_sample(text, [(3, 5)], MASK, ids), [2], ids)
    with pytest.raises(ValueError, match="three tokens"):
        objective.BlankInfillingCollator(ids)([{"input_ids": [96, 97]}])
    with pytest.raises(ValueError, match="does not fit into `row_length=20`"):
        objective.BlankInfillingCollator(ids, row_length=20)([{"input_ids": text}])
    for settings, message in (
        ({"token_share": 1.2}, "between 0 and 1"),
        ({"token_share": 0.8, "sentence_share": 0.4}, "more than 1"),
        ({"mean_span_length": 0.0}, "more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            objective.BlankObjective(**settings)

"""Windows, positions, decoding and scoring on contexts written by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.conftest import TINY, compose
from tests.support.hub_folder import build_folder
from tests.support.outputs import losses
from tests.support.squad import CONTEXT, NONE, Answers, find, make_rows, make_task
from wlora.data.sources import load_splits
from wlora.errors import ConfigError
from wlora.metrics.glue import Shard, merge_shards
from wlora.metrics.squad import ANSWERABLE_METRICS, UNANSWERABLE_METRICS
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer
from wlora.tasks.base import build_task
from wlora.tasks.question_answering import QuestionAnswering

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "is", "w", *(f"##{n}" for n in range(10)), "x", "."]
PAD, UNK, CLS, SEP, WHO, IS, W = range(7)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of word pieces in BERT's format that drops control characters, as BERT's does."""
    vocabulary = {word: n for n, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side="left",  # which positions must not depend on
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def positions(features: Dataset) -> list[tuple[int, int]]:
    return list(zip(features.column("start_positions"), features.column("end_positions"), strict=True))


def test_a_long_context_is_cut_into_windows_that_share_the_stride(tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task()
    features = task.encode(make_rows(NONE), tokenizer, training=False)
    # [CLS] who is [SEP] and [SEP] leave 11 of 16 tokens; the next window begins 11 - 4 = 7 tokens later.
    assert features.column("length") == [16, 16, 11]
    assert features.column("row") == [0, 0, 0] and features.column("context") == [4, 4, 4]
    begins = [n // 2 * 3 + n % 2 for n in range(20)]
    assert features.column("starts") == [begins[0:11], begins[7:18], begins[14:20]]
    assert [ends[-1] for ends in features.column("ends")] == [5 * 3 + 1, 8 * 3 + 2, 29]
    assert features.column("input_ids")[0][:6] == [CLS, WHO, IS, SEP, W, WORDS.index("##0")]
    assert features.column("token_type_ids")[0] == [0] * 4 + [1] * 12
    assert features.truncated_share == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (find("w0"), [(4, 5), (0, 0), (0, 0)]),
        (find("w4 w5"), [(0, 0), (5, 8), (0, 0)]),  # cut by the end of the first window, whole in the second
        (find("w4"), [(12, 13), (5, 6), (0, 0)]),
        (find("w8 w9"), [(0, 0), (0, 0), (6, 9)]),
        (find("w1 w2 w3 w4 w5 w6 w7"), [(0, 0)] * 3),  # longer than a window
        (find("4"), [(13, 13), (6, 6), (0, 0)]),  # inside a word
        (find(" w0 ", " w0 w1 "), [(4, 5)]),  # white space belongs to no token
        (find("\u200bw1", "w0 \u200bw1"), [(6, 7)]),  # nor does what the tokenizer drops
        ({"text": ["w0", "w9"], "answer_start": [0, 27]}, [(4, 5), (0, 0), (0, 0)]),  # the first of several
        (NONE, [(0, 0)] * 3),
    ],
)
def test_answers_become_tokens(tokenizer: PreTrainedTokenizerFast, answer: Answers, expected: list[Any]) -> None:
    text = answer["text"][0] if answer["text"] else ""
    context = {" w0 ": " w0 w1 ", "\u200bw1": "w0 \u200bw1"}.get(text, CONTEXT)
    features = make_task().encode(make_rows(answer, context=context), tokenizer, training=True)
    assert positions(features) == expected
    for (start, end), ids in zip(positions(features), features.column("input_ids"), strict=True):
        if end and len(text.strip()) > 1:
            assert tokenizer.decode(ids[start : end + 1]).replace(" ##", "") == text.strip(" \u200b")


def test_answers_that_no_window_holds_whole_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task()
    # Windows hold the tokens 0–10, 7–17 and 14–19, of which a word has two: the second and third answers fit into none.
    rows = make_rows(find("w4 w5"), find("w1 w2 w3 w4 w5 w6 w7"), find("w3 w4 w5"), find("w8 w9"), NONE)
    encoded = task.encode(rows, tokenizer, training=True)
    assert positions(encoded)[3:9] == [(0, 0)] * 6 and encoded.lost_answers == 2
    assert task.encode(rows, tokenizer, training=False).lost_answers == 0


def test_batches_are_padded_on_the_right_and_hold_positions_only_for_training(tokenizer: PreTrainedTokenizerFast) -> None:
    task, rows = make_task(), make_rows(find("w8 w9"))
    train, validation = (task.encode(rows, tokenizer, training=training) for training in (True, False))
    batch = task.collate(train.rows([2, 0]), tokenizer)
    assert batch["input_ids"].shape == (2, 16) and batch["input_ids"][0, 11:].tolist() == [PAD] * 5
    assert batch["start_positions"].tolist() == [6, 0] and batch["end_positions"].dtype == torch.int64
    inputs = {"input_ids", "token_type_ids", "attention_mask"}
    assert set(batch) == inputs | {"start_positions", "end_positions"}
    assert set(task.collate(validation.rows([0]), tokenizer)) == inputs


def test_a_question_without_room_for_more_than_the_stride_is_cut_after_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task()
    # 16 - 4 - 3 special tokens - 1 leave 8 tokens: four words of two tokens, and half of the fifth.
    for question, kept in (
        ("w1 w2 w3 w4", 8),
        ("w1 w2 w3 w4 w5", 8),
        ("x w1 w2 w3 w4 w5", 7),
        ("w" + "1234567890" * 2, 8),
    ):
        features = task.encode(make_rows(NONE, question=question), tokenizer, training=False)
        assert features.truncated_share == (question != "w1 w2 w3 w4")
        assert set(features.column("context")) == {kept + 2}
        assert features.column("starts")[0][0] == 0 and features.column("ends")[-1][-1] == len(CONTEXT)
        assert max(features.column("length")) == 16


def test_positions_of_a_tokenizer_of_pieces_lead_back_to_the_answers(tmp_path: Path) -> None:
    """DeBERTa's own tokenizer: its tokens include the space before a word, some are nothing but that space."""
    config = compose(
        "task=story_qa", f"model.path={build_folder(tmp_path / 'deberta')}", "task.max_length=32", "task.stride=8"
    )
    tokenizer = load_tokenizer(config.model, locate(config.model))
    rows = load_splits(config.task, offline=True).rows["validation"]
    task = build_task(config.task)
    train, places = (task.encode(rows, tokenizer, training=training).table.to_pydict() for training in (True, False))
    found = set()
    for index, row in enumerate(places["row"]):
        if start := train["start_positions"][index]:
            first, last = start - places["context"][index], train["end_positions"][index] - places["context"][index]
            span = rows[row]["context"][places["starts"][index][first] : places["ends"][index][last]]
            assert span.strip() == rows[row]["answers"]["text"][0]
            found.add(row)
    assert found == {row for row, answers in enumerate(rows["answers"]) if answers["text"]}


@pytest.mark.parametrize("family", ["tiny", "deberta"])
def test_a_special_token_in_a_context_leads_back_to_the_answer(family: str, tmp_path: Path) -> None:
    words = ["task=story_qa", "model=tiny_bert", "task.max_length=128"]
    if family == "deberta":
        words[1] = f"model.path={build_folder(tmp_path / 'deberta')}"
    config = compose(*words)
    tokenizer = load_tokenizer(config.model, locate(config.model))
    context = "[CLS] Anna went [SEP] to the [MASK] library [SEP]. Ben took the ball."
    rows = make_rows(*(find(text, context) for text in ("library", "[SEP] to", "[CLS] Anna")), context=context)
    task = build_task(config.task)
    train, places = (task.encode(rows, tokenizer, training=training).table.to_pydict() for training in (True, False))
    sep = tokenizer.sep_token_id
    assert {ids.count(sep) for ids in train["input_ids"]} == {2}
    for index, row in enumerate(places["row"]):
        first, last = (train[f"{end}_positions"][index] - places["context"][index] for end in ("start", "end"))
        assert first >= 0, "the context is one window"
        span = context[places["starts"][index][first] : places["ends"][index][last]]
        assert span.strip() == rows[row]["answers"]["text"][0]


def test_rows_of_many_calls_keep_their_numbers(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(*[find(f"w{n}") for n in range(5)])
    whole = make_task().encode(rows, tokenizer, training=False).table.to_pydict()
    monkeypatch.setattr("wlora.tasks.question_answering.ROWS_AT_ONCE", 2)
    assert make_task().encode(rows, tokenizer, training=False).table.to_pydict() == whole
    assert whole["row"] == [row for row in range(5) for _ in range(3)]


def logits_for(features: list[dict[str, Any]], spans: list[tuple[int, int, float] | None], silent: float) -> Any:
    """Build outputs in which one span per window, in tokens of the window, has a score, and no answer another."""
    start, end = torch.full((len(features), 16), -10.0), torch.full((len(features), 16), -10.0)
    start[:, 0] = silent
    end[:, 0] = 0.0
    for window, span in enumerate(spans):
        if span is not None:
            start[window, span[0]], end[window, span[1]] = span[2], 0.0
    return SimpleNamespace(start_logits=start, end_logits=end)


def predict(task: QuestionAnswering, features: Dataset, spans: list[Any], silent: float) -> list[Any]:
    model: Any = None
    listed = features.rows(range(len(features)))
    return list(task.predict(model, listed, {}, logits_for(listed, spans, silent)).numpy())


def test_an_answer_in_the_second_window_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task(metrics=list(UNANSWERABLE_METRICS))
    rows = make_rows(find("w4 w5"))
    features = task.encode(rows, tokenizer, training=False)
    # The question's own tokens (1, 2) and the closing one may have any logit: they are not in the context.
    found = predict(task, features, [(1, 2, 99.0), (5, 8, 7.0), (10, 10, 99.0)], silent=1.0)
    scores = task.score("validation", found, features, rows)
    assert scores["exact"] == scores["f1"] == scores["HasAns_f1"] == 1.0 and "NoAns_f1" not in scores
    assert scores["best_exact"] == 1.0 and scores["best_exact_thresh"] == pytest.approx(1.0 - 7.0)
    surer = task.score("validation", predict(task, features, [None, (5, 8, 7.0), None], silent=8.0), features, rows)
    assert (surer["exact"], surer["best_exact"]) == (0.0, 1.0)


def test_v1_always_answers_and_takes_the_best_of_several_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task(unanswerable=False, metrics=["exact_match", "f1"], name="squad_v1")
    rows = make_rows({"text": ["w0", "w4 w5", "w5"], "answer_start": [0, 12, 15]})
    features = task.encode(rows, tokenizer, training=False)
    found = predict(task, features, [None, (7, 8, 7.0), None], silent=50.0)
    assert task.score("validation", found, features, rows) == {"exact_match": 1.0, "f1": 1.0}
    found = predict(task, features, [None, (5, 6, 7.0), None], silent=50.0)
    assert task.score("validation", found, features, rows) == pytest.approx({"exact_match": 0.0, "f1": 2 / 3})


def test_uneven_shards_score_as_one(tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task()
    rows = make_rows(*[find(f"w{n}") if n % 3 else NONE for n in range(10)])
    features = task.encode(rows, tokenizer, training=False)
    listed = features.rows(range(len(features)))
    generator = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(len(features), 16, generator=generator) for name in ("start_logits", "end_logits")}
    model: Any = None

    def shard(*indices: int) -> Shard:
        outputs = SimpleNamespace(**{name: part[list(indices)] for name, part in logits.items()})
        return list(indices), task.predict(model, [listed[i] for i in indices], {}, outputs).numpy()

    whole = merge_shards([shard(*range(30))], count=30)
    # One process has 19 windows, one 12 (one of them twice), one nothing; windows of a row are with different ones.
    parts: list[Shard] = [shard(*range(29, 10, -1)), shard(*range(11), 29), ([], [])]
    apart = merge_shards(parts, count=30)
    assert task.score("validation", apart, features, rows) == task.score("validation", whole, features, rows)


def test_further_splits_have_keys_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task(validation=["validation", "validation_hard"])
    rows = make_rows(find("w0"))
    features = task.encode(rows, tokenizer, training=False)
    found = predict(task, features, [(4, 5, 9.0), None, None], silent=0.0)
    assert task.score("validation_hard", found, features, rows) == {"exact_hard": 1.0, "f1_hard": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["exact_match"]}, "task.metrics=exact_match: allowed is exact, .* with task.unanswerable=true"),
        ({"unanswerable": False, "metrics": ["exact", "f1"]}, "task.metrics=exact"),
        ({"primary_metric": "exact_match"}, "task.primary_metric=exact_match"),
        ({"metrics": ["f1", "NoAns_f1"], "primary_metric": "NoAns_f1"}, "allowed is f1"),
        ({"stride": None}, "task.stride=None"),
        ({"stride": 8}, "task.stride=8: allowed is 0 to 7, with task.max_length=16"),
        ({"n_best": None}, "task.n_best"),
        ({"max_answer_length": None}, "task.max_answer_length"),
    ],
)
def test_a_task_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(**fields)


def test_tokenizers_that_cannot_carry_it_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(ConfigError, match="fast version"):
        make_task().encode(make_rows(NONE), slow, training=True)
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    with pytest.raises(ConfigError, match="no token before the question"):
        make_task().encode(make_rows(NONE), bare, training=True)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta", "tiny_bart"])
def test_a_run_from_the_stories_to_the_record(tmp_path: Path, model: str) -> None:
    from wlora.experiment import run as experiment

    overrides = [word for word in TINY if not word.startswith(("task=", "model="))]
    windows = ["task.max_length=20", "task.stride=4", "train.max_steps=16"]
    record = experiment.run(
        compose("task=story_qa", f"model={model}", *overrides, *windows, "method=wlora", f"results_dir={tmp_path}")
    )
    assert record.status == "success" and record.primary_metric == "f1"
    assert set(record.metrics) == set(UNANSWERABLE_METRICS)  # and no loss: spans of validation have no positions
    assert record.parameters["head"] == 32 * 2 + 2
    assert record.task["train_rows"] == 128 and record.steps["per_epoch"] > 128 / 8


def test_positions_are_learnt(tmp_path: Path) -> None:
    """Full fine-tuning of a tiny model on a few stories brings its loss down to less than a half."""
    from wlora.experiment import run as experiment

    config = compose(
        *("task=story_qa", "model=tiny_bert", "method=full", "lr=3e-3", "task.max_train_rows=64", "task.max_eval_rows=8"),
        *("task.batch_size=16", "task.epochs=30", "train.eval_every=120", f"results_dir={tmp_path}"),
    )
    record = experiment.run(config)
    found = losses(tmp_path, record.run_id)
    assert found[-1] < found[0] / 2


def test_llama_has_no_such_head() -> None:
    with pytest.raises(ConfigError, match="tiny_llama: a llama model has no question_answering head"):
        compose("task=story_qa", "model=tiny_llama")


def test_v1_is_scored_by_its_own_names() -> None:
    assert tuple(compose("task=squad_v1").task.metrics) == ANSWERABLE_METRICS
    assert set(compose("task=squad_v2").task.metrics) == set(UNANSWERABLE_METRICS)

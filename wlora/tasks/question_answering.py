"""Extractive question answering: SQuAD v1.1 and v2.0, and their synthetic counterpart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.config.schema import TaskConfig
from wlora.data.features import ROWS_AT_ONCE, Features, input_columns, pad
from wlora.data.row_checks import ANSWERS
from wlora.errors import ConfigError, wrong_value
from wlora.metrics.squad import (
    ANSWERABLE_METRICS,
    UNANSWERABLE_METRICS,
    count_as_answers,
    score_answers,
    score_answers_or_none,
    score_each,
)
from wlora.tasks.answer_spans import Windows, choose_answers, find_best_spans
from wlora.tasks.base import check_metrics

_MIN_QUESTION = 4
"""Minimum number of question tokens that must fit in addition to the stride and the special tokens."""

_MAX_SPECIAL = 4


class QuestionAnswering:
    """Maps a question and a context to a span of the context, or (`task.unanswerable`) to "no answer".

    If a context with its question exceeds `task.max_length` tokens, it is cut into windows. Neighbouring windows share
    `task.stride` tokens. Each window is a feature.

    Attributes:
        head: the kind of model head.
        num_labels: number of outputs of the head: start and end logit.
        primary_metric: the reported metric, one of `task.metrics`.
    """

    head = "question_answering"
    any_padding = False  # the softmax over positions includes padded ones
    num_labels = 2

    def __init__(self, config: TaskConfig) -> None:
        known = UNANSWERABLE_METRICS if config.unanswerable else ANSWERABLE_METRICS
        of = f"questions with task.unanswerable={str(config.unanswerable).lower()}"
        check_metrics(config, known, of, never_primary=("HasAns", "NoAns"))
        widest = config.max_length - _MIN_QUESTION - _MAX_SPECIAL - 1
        if config.stride is None or config.stride > widest:
            raise wrong_value("task.stride", config.stride, f"0 to {widest}, with task.max_length={config.max_length}")
        for key in ("n_best", "max_answer_length"):
            if getattr(config, key) is None:
                raise wrong_value(f"task.{key}", None, "int >= 1")
        self.config = config
        self.question, self.context = config.columns
        self.stride: int = config.stride
        self.primary_metric = config.primary_metric

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, training: bool) -> Features:
        """Cut rows into windows and tokenise them.

        A question is truncated if it would leave no room for a context of more than `task.stride` tokens.

        An answer is lost if no window contains all of it: it is longer than the stride and crosses the end of a window.
        Its windows are then trained as windows without an answer.

        Returns:
            The model's inputs and `length`. For training also `start_positions` and `end_positions` (int32): first and
                last token of the first answer, or 0 and 0 if the window does not contain all of it. Otherwise `row`
                (int32), `context` (index of the context's first token, int32), `starts` and `ends` (character positions
                of every context token, lists of int32).

        Raises:
            ConfigError: the tokenizer does not provide the character positions of its tokens, or puts no token before
                the question.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                f"task={self.config.name}: {type(tokenizer).__name__} does not give the positions of tokens in the text\n"
                "allowed is a model whose tokenizer has a fast version (tokenizer.json)"
            )
        pieces, cut, lost = [], 0, 0
        for first_row in range(0, len(rows), ROWS_AT_ONCE):
            texts = rows[first_row : first_row + ROWS_AT_ONCE]
            questions = [self._shorten(question.strip(), tokenizer) for question in texts[self.question]]
            cut += sum(len(new) < len(old.strip()) for new, old in zip(questions, texts[self.question], strict=True))
            encoded = tokenizer(
                questions,
                texts[self.context],
                truncation="only_second",
                max_length=self.config.max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
            )
            assert encoded.encodings is not None
            if encoded.encodings[0].sequence_ids[0] is not None:
                raise ConfigError(
                    f"task={self.config.name}: {type(tokenizer).__name__} puts no token before the question, which the "
                    "prediction of no answer needs\nallowed is a model whose tokenizer starts with a special token"
                )
            row_of = encoded["overflow_to_sample_mapping"]
            columns = input_columns(encoded)
            if training:
                positions = _answer_positions(encoded.encodings, row_of, texts[ANSWERS])
                columns |= {name: pa.array(positions[at]) for at, name in enumerate(("start_positions", "end_positions"))}
                answered = {row for row, answers in enumerate(texts[ANSWERS]) if answers["text"]}
                lost += len(answered - set(np.asarray(row_of)[positions[1] > 0].tolist()))
            else:
                columns |= _token_places(encoded.encodings)
                columns["row"] = pa.array(np.asarray(row_of) + first_row, pa.int32())
            pieces.append(pa.table(columns))
        return Features(pieces, truncated_share=cut / len(rows), lost_answers=lost)

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad features to the longest one. Answer positions, if present, have shape [features], int64."""
        batch = pad(features, tokenizer, side="right")
        for key in ("start_positions", "end_positions"):
            if key in features[0]:
                batch[key] = torch.tensor([feature[key] for feature in features])
        return batch

    def row_losses(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean of the cross-entropies of start and end, [features]."""
        positions = [inputs["start_positions"], inputs["end_positions"]]
        outputs = model(**{key: value for key, value in inputs.items() if not key.endswith("_positions")})
        logits = (outputs.start_logits, outputs.end_logits)
        start, end = (F.cross_entropy(*pair, reduction="none") for pair in zip(logits, positions, strict=True))
        return (start + end) / 2

    def predict(
        self, model: PreTrainedModel, features: list[dict[str, Any]], inputs: dict[str, torch.Tensor], outputs: Any
    ) -> torch.Tensor:
        """Return the best spans of each window (`find_best_spans`), shape [features, n_best + 1, 3]."""
        bounds = [(feature["context"], feature["context"] + len(feature["starts"])) for feature in features]
        assert self.config.n_best is not None and self.config.max_answer_length is not None
        return find_best_spans(
            outputs.start_logits,
            outputs.end_logits,
            torch.tensor(bounds, device=outputs.start_logits.device),
            n_best=self.config.n_best,
            max_answer_length=self.config.max_answer_length,
        )

    def score(self, split: str, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, float]:
        """Return `task.metrics` of a split. Keys of all splits except the first end with the split's name."""
        (texts, no_answer), answers = self._find(predictions, features, rows), self._golds(rows)
        scores = (
            score_answers_or_none(texts, no_answer, answers) if self.config.unanswerable else score_answers(texts, answers)
        )
        suffix = "" if split == self.config.validation[0] else "_" + split.removeprefix("validation_")
        return {f"{name}{suffix}": scores[name] for name in self.config.metrics if name in scores}

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `row`, `prediction`, `exact_match` and `f1`; for v2.0 `exact` and `f1` at threshold 0, and `no_answer`."""
        (texts, no_answer), golds = self._find(predictions, features, rows), self._golds(rows)
        columns = {"row": pa.array(range(len(rows)), pa.int32())}
        if self.config.unanswerable:
            texts = _silence(texts, no_answer)
            golds = count_as_answers(golds)
            columns["no_answer"] = pa.array(no_answer.astype(np.float16))
        exact, f1 = score_each(texts, golds, empty_f1=self.config.unanswerable)
        columns["exact" if self.config.unanswerable else "exact_match"] = pa.array(exact.astype(np.float16))
        return pa.table({**columns, "f1": pa.array(f1.astype(np.float16)), "prediction": pa.array(texts, pa.string())})

    def describe_classes(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, Any]:
        """Return nothing: answers have no classes."""
        return {}

    def answer(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `prediction`: the text of each answer, "" for no answer."""
        texts, no_answer = self._find(predictions, features, rows)
        return pa.table({"prediction": _silence(texts, no_answer) if self.config.unanswerable else texts})

    def _find(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> tuple[list[str], np.ndarray]:
        """Return the predicted text and the no-answer score of every question."""
        return choose_answers(np.stack(predictions), _windows(features), rows[self.context][:])

    def _golds(self, rows: Dataset) -> list[list[str]]:
        """Return the reference answers of every question."""
        return [answer["text"] for answer in rows[ANSWERS][:]]

    def _shorten(self, question: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """Truncate a question so that there is room for more context than the stride; if possible at the end of a word."""
        most = self.config.max_length - self.stride - tokenizer.num_special_tokens_to_add(pair=True) - 1
        while len(question.encode()) >= most:  # a token has at least one byte, and the first token may be a space
            encoding = tokenizer(question, add_special_tokens=False).encodings[0]  # type: ignore[index]
            if len(encoding) <= most:
                break
            # The first token that does not fit, or the first token of its word, unless nothing would remain.
            inside = next(i for i in range(most, -1, -1) if i == 0 or encoding.word_ids[i] != encoding.word_ids[i - 1])
            end = encoding.offsets[inside or most][0]
            question = question[: min(end, len(question) - 1)].rstrip()
        return question


def _silence(texts: Sequence[str], no_answer: np.ndarray) -> list[str]:
    """Return the texts, with "" where the no-answer score is above 0."""
    return ["" if score > 0 else text for text, score in zip(texts, no_answer, strict=True)]


def _answer_positions(encodings: Sequence[Any], row_of: Sequence[int], answers: Sequence[Any]) -> np.ndarray:
    """Return first and last token of each row's first answer in each of its windows; 0 and 0 if the window lacks it.

    Shape [2, windows], int32.
    """
    positions = np.zeros((2, len(encodings)), dtype=np.int32)
    windows: dict[int, list[int]] = {}
    for index, row in enumerate(row_of):
        windows.setdefault(row, []).append(index)
    for row, indices in windows.items():
        if not answers[row]["text"]:
            continue
        text, begin = answers[row]["text"][0], answers[row]["answer_start"][0]
        span = range(begin, begin + len(text))
        first, last = (_find_tokens(encodings, indices, characters) for characters in (span, reversed(span)))
        for index in first.keys() & last.keys():
            positions[:, index] = first[index], last[index]
    return positions


def _find_tokens(encodings: Sequence[Any], windows: Sequence[int], characters: Iterable[int]) -> dict[int, int]:
    """Return, by window, the token of the first character that has one (white space has none)."""
    for character in characters:
        tokens = {index: encodings[index].char_to_token(character, 1) for index in windows}
        if any(token is not None for token in tokens.values()):
            return {index: token for index, token in tokens.items() if token is not None}
    return {}


def _token_places(encodings: Sequence[Any]) -> dict[str, pa.Array]:
    """Return the index of the context's first token in each window, and the character positions of its tokens."""
    context, starts, ends = [], [], []
    for encoding in encodings:
        inside = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
        places = encoding.offsets[inside[0] : inside[-1] + 1] if inside else []
        context.append(inside[0] if inside else 0)
        starts.append([start for start, _ in places])
        ends.append([end for _, end in places])
    kind = pa.list_(pa.int32())
    return {"context": pa.array(context, pa.int32()), "starts": pa.array(starts, kind), "ends": pa.array(ends, kind)}


def _windows(features: Features) -> Windows:
    columns = {name: features.array(name) for name in ("row", "context", "starts", "ends")}
    return Windows(
        row=columns["row"].to_numpy(),
        context=columns["context"].to_numpy(),
        lengths=columns["starts"].value_lengths().to_numpy(),
        starts=columns["starts"].flatten().to_numpy(),
        ends=columns["ends"].flatten().to_numpy(),
    )

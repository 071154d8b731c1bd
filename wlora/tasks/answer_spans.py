"""From logits of starts and ends to answers: the best spans of each window, then the best text of each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def find_best_spans(
    start_logits: Tensor, end_logits: Tensor, context: Tensor, *, n_best: int, max_answer_length: int
) -> Tensor:
    """Return the spans of highest score within the context of each window, exact over all of them.

    The score of a span is the sum of its start's and its end's logit. Besides comes the score of no answer: the sum
    at position 0, where the special token stands that windows without the answer were trained to point at.

    Args:
        start_logits: shape [windows, tokens].
        end_logits: likewise.
        context: the first token of the context and the one after its last, shape [windows, 2].
        n_best: how many spans.
        max_answer_length: most tokens of a span.

    Returns:
        First token, last token and score of each span, best first, and (0, 0, score) of no answer as the last one;
        float32, shape [windows, n_best + 1, 3]. Where there are fewer spans, the score of the rest is −∞.
    """
    start_logits, end_logits = start_logits.float(), end_logits.float()
    windows, tokens = start_logits.shape
    width = min(max_answer_length, tokens)
    position = torch.arange(tokens, device=start_logits.device)
    outside = (position < context[:, :1]) | (position >= context[:, 1:])
    starts = start_logits.masked_fill(outside, -torch.inf)
    ends = torch.nn.functional.pad(end_logits.masked_fill(outside, -torch.inf), (0, width - 1), value=-torch.inf)
    # [windows, tokens, width]: every span once, by its first token and its length less one
    scores = starts.unsqueeze(2) + ends.unfold(1, width, 1)
    best, index = scores.flatten(1).topk(min(n_best, tokens * width), dim=1)
    first = torch.div(index, width, rounding_mode="floor")
    found = start_logits.new_full((windows, n_best + 1, 3), -torch.inf)
    # float32 holds positions exactly, and one tensor is one transfer.
    found[:, : best.shape[1]] = torch.stack([first.float(), (first + index % width).float(), best], dim=2)
    found[:, n_best, :2] = 0.0
    found[:, n_best, 2] = start_logits[:, 0] + end_logits[:, 0]
    return found


@dataclass(frozen=True)
class Windows:
    """Where the tokens of windows stand in the texts they were cut from.

    Attributes:
        row: the question of each window, shape [windows].
        context: its first context token, shape [windows].
        lengths: its number of context tokens, shape [windows].
        starts: the first character of every context token, of all windows in a row, shape [Σ lengths].
        ends: the character after its last.
    """

    row: np.ndarray
    context: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def choose_answers(spans: np.ndarray, windows: Windows, contexts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the best text of each question over all its windows, and how much likelier no answer is.

    Args:
        spans: of `find_best_spans`, shape [windows, n_best + 1, 3].
        windows: where the spans stand.
        contexts: the text of each question's context.

    Returns:
        The texts, without surrounding white space, "" where no span has another text; and the no-answer score minus
        that of the text, shape [questions]. The no-answer score is the lowest over the windows: a question has an
        answer if one window has it.
    """
    candidates, silent = spans[:, :-1], spans[:, -1, 2]
    no_answer = np.full(len(contexts), np.inf)
    np.minimum.at(no_answer, windows.row, silent)
    window, rank = np.nonzero(candidates[:, :, 2] > -np.inf)
    first, last, score = candidates[window, rank].T
    # In the order of windows among equal scores.
    order = np.lexsort((-score, windows.row[window]))
    window, score = window[order], score[order]
    base = (np.cumsum(windows.lengths) - windows.lengths - windows.context)[window]
    starts = windows.starts[base + first[order].astype(np.int64)]
    ends = windows.ends[base + last[order].astype(np.int64)]
    texts = [""] * len(contexts)
    best = np.full(len(contexts), -np.inf)
    for row, start, end, value in zip(
        windows.row[window].tolist(), starts.tolist(), ends.tolist(), score.tolist(), strict=True
    ):
        # Some tokens stand for nothing but white space.
        if not texts[row] and (text := contexts[row][start:end].strip()):
            texts[row], best[row] = text, value
    return texts, no_answer - best

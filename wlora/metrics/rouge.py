"""ROUGE without network or downloads: mean F-measures over documents, each with a 95 % bootstrap interval."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from nltk.stem.porter import PorterStemmer
from rouge_score import tokenize
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from wlora.errors import unknown_name

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000
_INTERVAL = 95.0  # per cent
_BOOTSTRAP_SEED = 0
_STEMS_KEPT = 1 << 16
_SENTENCE_END = re.compile(r"""\s*\n\s*|(?:(?<=[.!?])|(?<=[.!?]["'”’)]))\s+""")


class _Stemming(Tokenizer):  # type: ignore[misc]  # the library has no types
    """The default tokenizer with `use_stemmer=True`; stems are remembered, which more than doubles its speed."""

    def __init__(self) -> None:
        self.stem = lru_cache(_STEMS_KEPT)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """Lower-case, split at what is neither a letter a–z nor a digit, and stem words of more than 3 letters."""
        words: list[str] = tokenize.tokenize(text, self)
        return words


def compute_rouge(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return ROUGE (Lin, 2004) as the package `rouge_score` defines it with `use_stemmer=True`.

    Args:
        names: of rouge1, rouge2, rougeL, rougeLsum. For the last, texts are split by `split_sentences`.
        predictions: one text per document.
        references: likewise; one without a word scores 0.

    Returns:
        Per name the mean F-measure, 0–1, and the bounds of its interval as `<name>_low` and `<name>_high`.

    Raises:
        ConfigError: an unknown name.
    """
    scores = score_documents(names, predictions, references)
    low, high = bootstrap_interval(scores)
    result = {}
    for column, name in enumerate(names):
        result[name] = float(scores[:, column].mean())
        result |= {f"{name}_low": float(low[column]), f"{name}_high": float(high[column])}
    return result


def score_documents(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the F-measures of `compute_rouge`, shape [documents, names]; likewise its errors."""
    for name in names:
        if name not in ROUGE_NAMES:
            raise unknown_name(f"task.metrics={name}", name, ROUGE_NAMES)
    scorer = RougeScorer(list(names), tokenizer=_Stemming())
    scores = np.zeros((len(references), len(names)))
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        found = scorer.score("\n".join(split_sentences(reference)), "\n".join(split_sentences(prediction)))
        scores[row] = [found[name].fmeasure for name in names]
    return scores


def split_sentences(text: str) -> list[str]:
    """Split a text at line breaks, and at blanks after `.`, `!` or `?`, which a closing quote or bracket may follow.

    Abbreviations end a sentence by this rule too. It is applied to predictions and references alike, needs no trained
    model, and matters to rougeLsum only.
    """
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def bootstrap_interval(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the 95 % percentile interval of each column's mean.

    The procedure is that of the original ROUGE script and of `rouge_score.scoring.BootstrapAggregator`: documents are
    drawn with replacement 1000 times. It draws from a generator of its own with a fixed seed, so that the same scores
    give the same interval and no other random stream moves.

    Args:
        scores: shape [documents, metrics].

    Returns:
        Lower and upper bounds, each of shape [metrics].
    """
    # RandomState, because of all of numpy's generators only it is promised to keep its sequence.
    generator = np.random.RandomState(_BOOTSTRAP_SEED)
    documents = len(scores)
    means = np.stack([scores[generator.choice(documents, documents)].mean(axis=0) for _ in range(RESAMPLES)])
    tail = (100.0 - _INTERVAL) / 2
    low, high = np.percentile(means, [tail, 100.0 - tail], axis=0)
    return low, high

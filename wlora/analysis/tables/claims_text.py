"""The tested claims as grids and as lines of CSV files: verdicts, rates, examples, and the methods over all tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wlora.analysis.examples import Disagreement, Predictions
from wlora.analysis.statistics import Difference, Summary, generator, interquartile_mean, performance_profile
from wlora.analysis.study import Point
from wlora.analysis.tables.cells import Table
from wlora.analysis.tables.claims import LEVEL, MARGIN, Finding, order, points
from wlora.analysis.tables.grid import MINUS, Grid, with_ends
from wlora.analysis.tables.layouts import Row

THRESHOLDS = (-5.0, -2.0, -1.0, 0.0, 1.0, 2.0)
"""Points above the mean of LoRA, at which performance profiles are shown."""


@dataclass(frozen=True)
class Part:
    """One table of the page of claims.

    Attributes:
        name: name of its files.
        title: heading.
        about: caption.
        grid: what is displayed.
        lines: the same for a CSV file, with all digits.
    """

    name: str
    title: str
    about: str
    grid: Grid
    lines: list[dict[str, Any]]


def claim_parts(
    findings: Sequence[Finding], tables: Mapping[str, Table], predictions: Predictions, bootstrap_seed: int = 0
) -> list[Part]:
    """Return the displayed tables of the tested claims, by name; empty if no claim could be tested."""
    if not findings:
        return []
    found = [verdicts(findings), rates(findings), examples(findings, tables, predictions)]
    found += [methods(table, bootstrap_seed) for table in tables.values()]
    return [part for part in found if part is not None]


def verdicts(findings: Sequence[Finding]) -> Part:
    """Return the table of verdicts: one line per claim, pair of rows and task."""
    about = (
        "The paper's claims on these runs, in points (a hundredth of the metric). Difference: mean over seeds, paired by "
        f"seed, with its {100 * LEVEL:.0f} % interval from the t distribution. Over tasks, each task weighs the same, and "
        "the differences of a seed are averaged first; the interval is that of the seeds on these tasks, not of other "
        "tasks. A difference without an interval comes from one pair, or from pairs without any spread. p: two-sided t "
        f"test; for “equals” two one-sided tests against ±{MARGIN:g} point; for “at least” one test against −{MARGIN:g} "
        f"point. These two claims hold if the one-sided tests reject at {100 * (1 - LEVEL):.0f} %, which the "
        f"{100 * LEVEL:.0f} % interval does not show. A claim that neither holds nor does not hold is undecided at this "
        "scale, and so is one with diverged runs, which are not in the difference. P(improvement): share of pairs in which "
        "the first method is better, with its bootstrap interval. Params: trained parameters divided by those of the second "
        "method; the paper's second claim is about a third of them. The tests are not corrected for the number of lines."
    )
    headings = ("Claim", "Table", "Comparison", "Task", "Difference", "p", "P(improvement)", "Seeds", "Params", "Verdict")
    body: list[tuple[str, ...]] = []
    rules, before, lines = set(), ("", ""), []
    for finding in findings:
        claim, pair = finding.claim.text, _pair(finding)
        if claim != before[0] and body:
            rules.add(len(body))
        found = finding.found
        words = (
            claim if claim != before[0] else "",
            finding.table,
            pair if (claim, pair) != before else "",
            _task(finding),
            _points(found),
            _p(finding.p),
            with_ends(finding.probability, 2, signed=False),
            "/".join(map(str, sorted(set(found.pairs)))) + ("" if found.paired else " unpaired") + _diverged(finding),
            "" if finding.share is None else f"{finding.share:.0%}",
            finding.verdict,
        )
        body.append(words)
        before = (claim, pair)
        lines.append(_line(finding))
    grid = Grid(tuple(("", heading) for heading in headings), tuple(body), frozenset(rules), texts=4)
    return Part("claims", "Verdicts", about.replace("−", MINUS), grid, lines)


def _line(finding: Finding) -> dict[str, Any]:
    low, high = finding.found.interval(LEVEL) or (None, None)
    return {
        **_keys(finding),
        "difference": finding.found.mean,
        "low": low,
        "high": high,
        "p": finding.p,
        "probability": finding.probability.mean,
        "probability_low": finding.probability.low,
        "probability_high": finding.probability.high,
        "pairs": sum(finding.found.pairs),
        "paired": finding.found.paired,
        "diverged_a": finding.diverged[0],
        "diverged_b": finding.diverged[1],
        "parameters_share": finding.share,
        "verdict": finding.verdict,
    }


def rates(findings: Sequence[Finding]) -> Part | None:
    """Return the table of the comparisons with one rate for both methods; None if no two rows have a common point."""
    about = (
        "The same differences, in points, with one learning rate for both methods instead of each one's tuned rate; in "
        "brackets the number of pairs. Rates that were not chosen usually have the tuning seed alone, and no interval. "
        "Where there are other seeds, the tuning seed is left out. “Turned” lists the rates at which the order of the two "
        "methods is the other one: with such an untuned rate the conclusion would be another."
    )
    kept = [finding for finding in findings if finding.rates]
    every = sorted({point for finding in kept for point in finding.rates}, key=order)
    if not kept:
        return None
    headings = ("Comparison", "Task", "Tuned", *map(_name, every), "Turned")
    body: list[tuple[str, ...]] = []
    rules, before, lines = set(), "", []
    for finding in kept:
        pair = _pair(finding)
        if pair != before and body:
            rules.add(len(body))
        cells = (_short(finding.rates.get(point)) for point in every)
        turned = ", ".join(map(_name, finding.turned)) or "nowhere"
        body.append((pair if pair != before else "", _task(finding), _short(finding.found), *cells, turned))
        before = pair
        for point, found in finding.rates.items():
            low, high = found.interval(LEVEL) or (None, None)
            line = {"difference": found.mean, "low": low, "high": high, "pairs": sum(found.pairs)}
            lines.append({**_keys(finding), **point.columns(), **line, "turned": point in finding.turned})
    grid = Grid(tuple(("", heading) for heading in headings), tuple(body), frozenset(rules), texts=2)
    return Part("claims_rates", "With one rate for both methods", about, grid, lines)


def examples(findings: Sequence[Finding], tables: Mapping[str, Table], predictions: Predictions) -> Part | None:
    """Return the table over the examples of the dev sets; None if no comparison has predictions of both methods."""
    about = (
        "The same comparisons over the examples of the dev set, seed by seed: examples that only the first or only the "
        "second run answers correctly after the last step (means over seeds), and the p-value of McNemar's exact test for "
        "each seed. It asks "
        "whether two trained models differ on such examples; the seeds ask whether the methods differ."
    )
    headings = ("Comparison", "Task", "Examples", "Both right", "Only first", "Only second", "p by seed", "p < 0.05")
    body: list[tuple[str, ...]] = []
    lines: list[dict[str, Any]] = []
    before = ""
    for finding in findings:
        if finding.task is None:
            continue
        cells = tables[finding.table].cells
        found = predictions.compare(*(cells[row, finding.tasks[0]].runs for row in (finding.a, finding.b)))
        if not found:
            continue
        pair = _pair(finding)
        body.append((pair if pair != before else "", _task(finding), *_disagreement(found)))
        before = pair
        names = ("seed", "examples", "both", "only_a", "only_b")
        lines += [{**_keys(finding), **{name: getattr(one, name) for name in names}, "p": one.p} for one in found]
    if not body:
        return None
    return Part(
        "claims_examples",
        "Over examples",
        about,
        Grid(tuple(("", heading) for heading in headings), tuple(body), texts=2),
        lines,
    )


def _disagreement(found: Sequence[Disagreement]) -> tuple[str, ...]:
    count = len(found)
    means = (sum(getattr(one, name) for one in found) / count for name in ("both", "only_a", "only_b"))
    ps = ", ".join(_p(one.p) for one in found)
    return (str(found[0].examples), *(f"{mean:.1f}" for mean in means), ps, f"{sum(o.p < 0.05 for o in found)} of {count}")


def methods(table: Table, bootstrap_seed: int) -> Part | None:
    """Return interquartile means and performance profiles of a table's rows over its tasks; None without LoRA."""
    about = (
        "The methods over all tasks that they share with LoRA of the same rank, every run measured in points above the mean "
        "of LoRA on its task, which counts as exact. IQM: interquartile mean over all runs, with its 95 % bootstrap "
        "interval (seeds drawn within each task). The columns ≥ are performance profiles: the share of runs at least so "
        "many points above LoRA's mean, every task weighing the same (the measures of Agarwal et al., 2021, and of their "
        "library rliable). A diverged run reaches no threshold, and is not in the IQM."
    )
    headings = ("Method", "Rank", "Tasks", "Runs", "IQM", *(f"≥ {_sign(level, 0)}" for level in THRESHOLDS))
    body: list[tuple[str, ...]] = []
    lines: list[dict[str, Any]] = []
    for row in table.rows:
        strata = above_lora(table, row)
        if not strata:
            continue
        mean = interquartile_mean(list(strata.values()), generator(bootstrap_seed, f"iqm {table.layout.name} {row}"))
        ended = [own + [-math.inf] * table.cells[row, task].diverged for task, own in strata.items()]
        profile = performance_profile(ended, THRESHOLDS)
        rank = "" if row.rank is None else str(row.rank)
        shares = (f"{share:.0%}" for share in profile)
        body.append((row.label, rank, str(len(strata)), str(mean.n), with_ends(mean, 2, signed=True), *shares))
        line: dict[str, Any] = {
            "table": table.layout.name,
            "method": row.method,
            "rank": row.rank,
            "k": row.k,
            "tasks": len(strata),
        }
        line |= {"runs": mean.n, "iqm": mean.mean, "iqm_low": mean.low, "iqm_high": mean.high}
        lines.append(line | {f"at_least_{level:g}": share for level, share in zip(THRESHOLDS, profile, strict=True)})
    if not body:
        return None
    grid = Grid(tuple(("", heading) for heading in headings), tuple(body), texts=2)
    name = table.layout.name
    return Part(f"claims_methods{name}", f"Methods over the tasks of Table {name}", about, grid, lines)


def above_lora(table: Table, row: Row) -> dict[str, list[float]]:
    """Return, by task, the score of every run of a row in points above the mean of LoRA of the same rank.

    Rows without a rank are compared with LoRA's first row.
    """
    reference = next((one for one in table.rows if one.method == "lora" and row.rank in (None, one.rank)), None)
    found: dict[str, list[float]] = {}
    for column in table.layout.columns if reference else ():
        assert reference is not None
        base, own = (list(table.cells[one, column.task].scores.values()) for one in (reference, row))
        if base and own:
            found[column.task] = [points(table) * (score - sum(base) / len(base)) for score in own]
    return found


def _keys(finding: Finding) -> dict[str, Any]:
    keys: dict[str, Any] = {"claim": finding.claim.text, "table": finding.table, "a": finding.a.label, "b": finding.b.label}
    return {**keys, "rank": finding.a.rank, "task": finding.task or "all", "tasks": len(finding.tasks)}


def _pair(finding: Finding) -> str:
    rank = "" if finding.a.rank is None else f", r={finding.a.rank}"
    return f"{finding.a.label} vs {finding.b.label}{rank}"


def _diverged(finding: Finding) -> str:
    lost = (f"{count} of {row.label}" for row, count in zip((finding.a, finding.b), finding.diverged, strict=True) if count)
    return f" (diverged: {named})" if (named := ", ".join(lost)) else ""


def _task(finding: Finding) -> str:
    return finding.task or f"all {len(finding.tasks)} tasks"


def _points(found: Difference) -> str:
    low, high = found.interval(LEVEL) or (None, None)
    return with_ends(Summary(found.mean, low=low, high=high), 2, signed=True)


def _short(found: Difference | None) -> str:
    return "–" if found is None else f"{_sign(found.mean, 2)} ({sum(found.pairs)})"


def _sign(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS) if value else "0"


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _name(point: Point) -> str:
    extra = (f", {key}={value}" for key, value in point.columns().items() if key != "lr" and value is not None)
    return f"{point.lr:g}{''.join(extra)}"

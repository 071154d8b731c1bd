"""Compare races with complete grids: the chosen rate and the number of steps. Uses recorded grids and trains nothing.

python scripts/race_check.py grids RESULTS_DIR ...     simulate a race on every recorded grid, using its learning curves
python scripts/race_check.py compare UNRACED RACED     compare the same sweep in two results folders (scripts/race_bench.sh)
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wlora.analysis.racing import Entrant, divide, judge, read_entrant
from wlora.analysis.study import Point, Run, show
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.settings import runs_by_setting
from wlora.storage.records import RecordStore
from wlora.training.run_length import step_at

WITHIN, SHARE = 0.002, 0.4  # limits for success: loss of final score, and share of the steps
Race = Sequence[tuple[Run, Entrant]]  # runs that have ended, lower rates first
Races = Mapping[tuple[str, str, int], Race]  # by task, setting and seed


class Outcome(NamedTuple):
    """The result of a race: the chosen run, the best of all runs, and the share of the grid's steps."""

    chosen: Run
    best: Run
    share: float

    @property
    def loss(self) -> float:
        """The best final score minus that of the chosen run."""
        return round(score(self.best) - score(self.chosen), 9)


def score(run: Run) -> float:
    """Return the final score of a run; 0 if it diverged."""
    return run.score if run.status == "success" else 0.0


def read_races(folder: Path) -> tuple[Races, int]:
    """Return the recorded grids with several rates, and the number of grids that cannot be raced.

    The latter were evaluated only at the end, or not all runs at the same steps.
    """
    store, uneven = RecordStore(folder), 0
    races: dict[tuple[str, str, int], Race] = {}
    for (label, task), group in runs_by_setting(read_runs(folder)).items():
        ended = {(run.point, run.seed): run for run in group if run.status != "stopped"}
        for asked, _ in divide(ended, {}):
            runs = [ended[run] for run in asked]
            if len({run.point.lr for run in runs}) > 1:
                race = [(run, read_entrant(store, run)) for run in runs]
                steps = {tuple(step for step, _ in entrant.marks) for run, entrant in race if run.status == "success"}
                fit = len(steps) == 1 and len(next(iter(steps))) > 1
                uneven += not fit
                if fit:
                    races[task, label, runs[0].seed] = race
    return races, uneven


def play(race: Race) -> Outcome:
    """Simulate `race=halving` on recorded runs, using their evaluations."""
    known, work = [Entrant() for _ in race], 0.0
    while behind := (now := judge(known)).behind:
        for index in behind:
            before, known[index] = known[index].reached, advance(race[index][1], now.until)
            work += known[index].reached - before
    return decide(race, now.alive, work)


def advance(entrant: Entrant, share: float) -> Entrant:
    """Return the state of a run at its first evaluation at or after a share of its steps."""
    step, marks = step_at(share, entrant.total), entrant.marks
    count = next((number for number, (at, _) in enumerate(marks, start=1) if at >= step), len(marks))
    return dataclasses.replace(entrant, marks=marks[:count], ended=entrant.ended and count == len(marks))


def play_schedule(race: Race, cuts: Sequence[tuple[int, int]]) -> Outcome:
    """Simulate another schedule: pairs of a number of evaluations and the number of runs that continue after it."""
    alive, work, last = list(range(len(race))), 0.0, 0.0
    for count, kept in cuts:
        at = race[0][1].marks[count - 1][0] / race[0][1].total
        work, last = work + len(alive) * (at - last), at
        alive = sorted(alive, key=lambda index: race[index][1].marks[count - 1][1], reverse=True)[:kept]
    return decide(race, alive, work + len(alive) * (1 - last))


def decide(race: Race, finished: Iterable[int], work: float) -> Outcome:
    """Choose the best of the finished runs, and the best of all. In a tie, the lower rate wins, as for `lr=tuned`."""
    chosen, best = (max((race[index][0] for index in runs), key=score) for runs in (sorted(finished), range(len(race))))
    return Outcome(chosen, best, work / len(race))


def summarize(found: Sequence[Outcome]) -> str:
    """Return a line that summarises several races."""
    near, cheap = sum(one.loss <= WITHIN for one in found), sum(one.share <= SHARE for one in found)
    lower, share = (sum(values) / len(found) for values in ([one.loss for one in found], [one.share for one in found]))
    return (
        f"{near} of {len(found)} choices within {WITHIN}, {cheap} of {len(found)} within {SHARE:.0%} of the steps; "
        f"mean {lower:.4f} lower at {share:.1%} of the steps, at most {max(one.loss for one in found):.4f} lower"
    )


def print_races(races: Races) -> None:
    """Print one line per race, and the summary."""
    print("| task | setting | seed | runs | steps | chosen by the race | by the whole grid | lower by |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    outcomes = {key: play(race) for key, race in sorted(races.items())}
    for (task, label, seed), one in outcomes.items():
        scores = " | ".join(f"{name(run.point)}: {score(run):.4f}" for run in (one.chosen, one.best))
        count = len(races[task, label, seed])
        print(f"| {task} | {label} | {seed} | {count} | {one.share:.1%} | {scores} | {one.loss:.4f} |")
    print(f"\n{summarize(list(outcomes.values()))}")


def name(point: Point) -> str:
    """Format a point: `0.001`, or `0.001/10` if a warm-up is set."""
    return show(point.lr) + ("" if point.warmup is None else f"/{point.warmup}")


def print_schedules(races: Sequence[Race]) -> None:
    """Print the result of every schedule with two cuts for grids of three rates with eight evaluations."""
    print("\nEvery schedule for three rates (two go on from the first cut, one from the second), cheapest first:\n")
    print("| first cut | second cut | steps | within 0.002 | mean lower by | at most |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    lines = []
    for first in range(1, 8):
        for second in range(first, 9):
            found = [play_schedule(race, [(first, 2), (second, 1)] if second < 8 else [(first, 2)]) for race in races]
            lower = [one.loss for one in found]
            near, cost = sum(loss <= WITHIN for loss in lower), sum(one.share for one in found) / len(found)
            cut = "none" if second == 8 else f"{second}/8"
            lines.append((cost, first, cut, near, sum(lower) / len(lower), max(lower)))
    for cost, first, cut, near, mean, most in sorted(lines):
        print(f"| {first}/8 | {cut} | {cost:.1%} | {near} of {len(races)} | {mean:.4f} | {most:.4f} |")


def grids(folders: Sequence[str]) -> None:
    """Race all recorded grids of some results folders."""
    for folder in folders:
        races, uneven = read_races(Path(folder))
        print(f"\n## {folder}\n\n`race=halving` over the recorded evaluations (a run goes on to the next one it has):\n")
        if races:
            print_races(races)
        if uneven:
            print(f"\n{uneven} grids are left out: evaluated at the end only, or not all runs at the same steps.")
        if eighths := [
            race for race in races.values() if {len(entrant.marks) for _, entrant in race} == {8} and len(race) == 3
        ]:
            print_schedules(eighths)
            joined: dict[tuple[str, str, int], list[tuple[Run, Entrant]]] = defaultdict(list)
            for (task, _, seed), race in races.items():
                if race in eighths:
                    joined[task, f"all of {race[0][0].method}", seed] += race
            if larger := {key: race for key, race in joined.items() if len(race) > 3}:
                print("\nThe rates of all settings of a method in one race, as no recorded grid is larger:\n")
                print_races(larger)


def compare(unraced: str, raced: str) -> None:
    """Compare a raced sweep with the same sweep without a race: choice, steps and seconds."""
    whole, part = ({(run.point, run.seed): run for run in read_runs(folder)} for folder in (unraced, raced))
    best, chosen = (max((run for run in runs.values() if run.status == "success"), key=score) for runs in (whole, part))
    twin = whole[chosen.point, chosen.seed]
    steps = [sum(steps_of(run) for run in runs.values()) for runs in (whole, part)]
    seconds = [sum(run.record.seconds["total"] for run in runs.values()) for runs in (whole, part)]
    ended = sum(run.status == "success" for run in part.values())
    print(f"runs       {len(whole)} unraced, {len(part)} raced, of which {ended} to the end")
    print(f"choice     {name(best.point)}: {best.score:.4f} unraced, {name(chosen.point)}: {chosen.score:.4f} raced")
    print(f"lower by   {best.score - chosen.score:.4f}; the raced choice scores {twin.score:.4f} in the unraced sweep")
    print(f"steps      {steps[0]:,} unraced, {steps[1]:,} raced: {steps[1] / steps[0]:.3f}")
    print(f"seconds    {seconds[0]:,.0f} unraced, {seconds[1]:,.0f} raced: {seconds[1] / seconds[0]:.3f} (sum over records)")
    for number, what in enumerate(("wall", "in the program", "in the system")):
        measured = [timed(Path(f"{folder}.seconds"), number) for folder in (unraced, raced)]
        if all(measured):
            print(
                f"           {measured[0]:,.0f} unraced, {measured[1]:,.0f} raced: {measured[1] / measured[0]:.3f} ({what})"
            )


def steps_of(run: Run) -> int:
    """Return the number of steps of a run."""
    return run.record.steps.get("stopped", run.record.steps["total"])


def timed(file: Path, column: int) -> float:
    """Return the seconds of all commands in a file of scripts/race_bench.sh; 0 if the file does not exist."""
    return sum(float(line.split()[column]) for line in file.read_text().splitlines()) if file.exists() else 0.0


def main(words: Sequence[str]) -> None:
    """Execute the command given by the arguments."""
    commands: dict[str, Callable[..., None]] = {"grids": lambda *folders: grids(folders), "compare": compare}
    if len(words) < 2 or words[0] not in commands:
        sys.exit(__doc__)
    commands[words[0]](*words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])

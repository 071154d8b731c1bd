"""Reliability tests: kill or pause runs, or let file operations fail, and check the results.

    python scripts/reliability.py kill --rounds 3       kill runs of every method and continue them
    python scripts/reliability.py store                 write records with many processes, some of which are killed
    python scripts/reliability.py pause --rounds 200    pause the owner of a run until another process has taken it over
    python scripts/reliability.py faults --minutes 25   let file operations of runs fail with EIO, ENOSPC, ESTALE or EMFILE

All write a table (.csv, .md) and a summary (.json) to results/reliability. The exit code is 1 if results are missing,
incomplete, different or duplicated.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reliability_kill import kill_all, run_observed
from reliability_store import store, work


def main() -> None:
    """Run one of the tests, or act as one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "store", "pause", "faults", "work", "victim"))
    parser.add_argument(
        "--rounds",
        type=int,
        help="kill: random kills per method, in addition to an aimed one (3); pause: number of pauses (200)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of simultaneous methods or pauses")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    parser.add_argument("--minutes", type=float, default=25, help="faults: time limit; the remaining calls are not tested")
    parser.add_argument("--out", type=Path, default=Path("results/reliability"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--aim", default="", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "work":
        work(args.folder, args.seed)
    elif args.what == "victim":
        run_observed(args.folder, args.aim, args.words)
    else:
        run_test(args)


def run_test(args: argparse.Namespace) -> None:
    """Run one of the tests, write its files, and exit with 0 if it passed and with 1 otherwise."""
    if args.what == "pause":
        from reliability_pause import pause_all  # imports torch, which the other tests do not need

        args.rounds = args.rounds or 200
        rows, summary, well = pause_all(args)
    elif args.what == "faults":
        from reliability_faults import faults

        rows, summary, well = faults(args.minutes)
    else:
        args.rounds = args.rounds or 3
        rows, summary, well = kill_all(args) if args.what == "kill" else store(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"{args.what}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (args.out / f"{args.what}.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.out / f"{args.what}.md").write_text(page(args.what, rows, summary))
    print(json.dumps(summary))
    sys.exit(0 if well else 1)


def page(what: str, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Return a summary and, for killed runs, every row as Markdown."""
    said = [f"- {key.replace('_', ' ')}: {value}" for key, value in summary.items() if not isinstance(value, dict)]
    said += [
        f"- {key.replace('_', ' ')}: {', '.join(f'{name} {count}' for name, count in value.items())}"
        for key, value in summary.items()
        if isinstance(value, dict)
    ]
    lines = [f"# python scripts/reliability.py {what}", "", *said]
    if what == "kill":
        head = list(rows[0])
        lines += ["", f"| {' | '.join(name.replace('_', ' ') for name in head)} |", f"|{' --- |' * len(head)}"]
        lines += [f"| {' | '.join(str(row[name]) for name in head)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

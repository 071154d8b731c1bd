#!/usr/bin/env bash
# WLoRA with a single projection of omega, at T, instead of one per step (docs/selection.md). MiniLM, K = 5 of 18 adapters. The
# rates are tuned, and samples and seeds are those of the small Table 1 (scripts/table1.sh), whose runs project at every step.
# Settings: scripts/study.sh, and EVERY=N, a projection every N steps. With 100, more than T here, the only one is the cut.
# RESULTS is a separate folder by default, because tables do not mix values of method.project_every.
export RESULTS=${RESULTS:-results/projection} SCALE=cpu
. "$(dirname "$0")/study.sh"

for PHASE in $PHASES; do
    for task in sst2 mrpc qnli; do tune_small 5 $task wlora k=5 method.project_every="${EVERY:-100}"; done
    stage
done
finish wlora.tables summary model=minilm

#!/usr/bin/env bash
# WLoRA with one projection of omega, at T, instead of one per step (docs/selection.md): MiniLM, K = 5 of 18 adapters. The rates
# are tuned, and the samples and seeds are those of the small Table 1 (scripts/table1.sh), whose runs project at every step.
# Settings: scripts/study.sh. RESULTS is a separate folder by default, because tables do not mix values of method.project_every.
export RESULTS=${RESULTS:-results/projection} SCALE=cpu
. "$(dirname "$0")/study.sh"

for PHASE in $PHASES; do # T is a tenth of the run, at most 37 steps here, so the only projection is the cut
    for task in sst2 mrpc qnli; do tune_small 5 $task wlora k=5 method.project_every=100; done
    stage
done
finish wlora.tables summary model=minilm

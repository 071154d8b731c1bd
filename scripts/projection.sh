#!/usr/bin/env bash
# WLoRA with fewer projections of omega: one at T, or one in eight steps. MiniLM, K = 5 of 18 adapters. The
# rates are tuned, and samples and seeds are those of the small Table 1 (scripts/table1.sh), whose runs project at every step.
# Settings: scripts/study.sh, and EVERY="100 8". RESULTS is a separate folder by default, because tables do not mix values of
# method.project_every.
export RESULTS=${RESULTS:-results/projection} SCALE=cpu
. "$(dirname "$0")/study.sh"

for every in ${EVERY:-100 8}; do # T is a tenth of the run, at most 37 steps here. With 100, the only projection is the cut.
    for PHASE in $PHASES; do
        for task in sst2 mrpc qnli; do tune_small 5 $task wlora k=5 method.project_every=$every; done
        stage
    done
done
finish wlora.tables summary model=minilm

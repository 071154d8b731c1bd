#!/usr/bin/env bash
# Effect of the prefix cache on scores (it disables dropout below the lowest kept adapter after the cut): WLoRA without and
# with the cache, five seeds. Settings: scripts/study.sh. RESULTS is a separate folder by default: every setting is a row.
RESULTS=${RESULTS:-results/prefix_${SCALE:-paper}}
. "$(dirname "$0")/study.sh"

case $SCALE in
paper)
    tasks="rte mrpc sst2"
    setting="experiment=table1 lr=8e-4 k=5 seed=range(5)"
    ;;
cpu)
    tasks=mrpc
    setting="model=minilm task.batch_size=32 train.accumulation_steps=1 task.epochs=3 lr=1e-3 k=5 seed=range(5)"
    ;;
esac
for task in $tasks; do sweep "$task" wlora $setting train.prefix_cache=off,memory; done
stage
finish wlora.tables summary

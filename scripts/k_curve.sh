#!/usr/bin/env bash
# Score against K and T, with LoRA as a reference line (the paper, 3.3: a tenth of the adapters suffices, and T may be small).
# Settings: scripts/study.sh. RESULTS is a separate folder by default, because tables do not accept several T in one study.
RESULTS=${RESULTS:-results/k_curve_${SCALE:-paper}}
. "$(dirname "$0")/study.sh"

case $SCALE in
paper)
    tasks="rte mrpc sst2"
    setting="experiment=table1 lr=8e-4 seed=range(5)"
    ks=1,2,5,10,20,36
    # T is at most one epoch: 13 steps on RTE and 20 on MRPC, with the paper's batches.
    declare -A ts=([rte]="3,5,8,13" [mrpc]="5,10,15,20" [sst2]="10,25,50,100,200")
    ;;
cpu)
    tasks=sst2
    setting="model=minilm precision=bf16 task.batch_size=32 train.accumulation_steps=1 task.max_train_rows=4000 task.epochs=1"
    setting+=" lr=3e-3 seed=range(3)"
    ks=1,2,3,5,9,18
    declare -A ts=([sst2]="10,25,50")
    ;;
esac
for task in $tasks; do
    sweep $task lora $setting
    sweep $task wlora $setting k=$ks
    sweep $task rlora $setting k=$ks
    sweep $task wlora $setting k=5 method.select_steps=${ts[$task]}
done
stage
finish wlora.figures selection

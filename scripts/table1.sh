#!/usr/bin/env bash
# Table 1 (the paper, 4.1 and B.1): every method on GLUE with DeBERTaV3-base, rank 8 on query, key and value.
# experiment=table1 has batch, accumulation, 512 steps, warm-up 100 and the grid of learning rates. The learning rate is the
# best of the grid on TUNE_SEED, for each method and task; then five seeds. Settings: scripts/study.sh, and
#   PROTOCOL=steps    512 steps on every task, as the published code trains
#   PROTOCOL=printed  one epoch, as the paper prints: 13 steps of RTE; warm-up 100, or a tenth of the run if that is less
. "$(dirname "$0")/study.sh"

methods="full lora adalora increlora dynamic_lora lora_drop alora melora flexlora"

case $SCALE in
paper)
    case ${PROTOCOL:-steps} in
    steps) protocol="train.max_steps=512" ;;
    printed) protocol="train.max_steps=null task.epochs=1 warmup=null" ;;
    *) echo "error: PROTOCOL=$PROTOCOL: allowed is steps | printed" >&2; exit 2 ;;
    esac
    for rate in "seed=$TUNE_SEED" "lr=tuned seed=range(5)"; do
        for task in mnli sst2 cola qqp qnli rte mrpc; do
            for method in $methods; do sweep $task $method experiment=table1 $protocol $rate; done
            sweep $task wlora experiment=table1 k=1,5,10 $protocol $rate
        done
        stage
    done
    finish wlora.tables 1 model=deberta_v3_base ${protocol%% *}
    ;;
cpu)
    # MiniLM has 18 adapters: K = 1, 3, 5. Rates are tuned on SST-2 alone.
    setting="model=minilm precision=bf16 task.batch_size=32 train.accumulation_steps=1"
    sst2="task.max_train_rows=4000 task.epochs=1" mrpc="task.epochs=2" qnli="task.max_train_rows=4000 task.epochs=1"
    tuned="lr=tuned tune_on=sst2 seed=range(3)"
    for method in $methods wlora_plus; do
        rates=3e-4,1e-3,3e-3
        [ $method = full ] && rates=3e-5,1e-4,3e-4
        sweep sst2 $method $setting $sst2 seed=$TUNE_SEED lr=$rates
    done
    sweep sst2 wlora $setting $sst2 k=1,3,5 seed=$TUNE_SEED lr=3e-4,1e-3,3e-3
    stage
    for method in $methods wlora_plus; do
        sweep sst2 $method $setting $sst2 $tuned
        sweep mrpc $method $setting $mrpc $tuned
    done
    sweep sst2 wlora $setting $sst2 k=1,3,5 $tuned
    sweep mrpc wlora $setting $mrpc k=1,3,5 $tuned
    for method in lora wlora wlora_plus; do sweep qnli $method $setting $qnli $tuned; done
    stage
    finish wlora.tables 1 model=minilm
    ;;
esac

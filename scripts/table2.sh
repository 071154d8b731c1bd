#!/usr/bin/env bash
# Table 2 (the paper, 4.1 and B.1): LoRA, WLoRA K = 20 and WLoRA+ on GLUE with DeBERTaV3-base, four ranks, all linears.
# experiment=table2 sets the grids; epochs and batch sizes are those of the tasks (Table 7). On TUNE_SEED, first the learning
# rate is tuned with a warm-up of 100, then the warm-up with that rate (the paper does not say whether they are tuned jointly).
# Then five seeds run.
# Settings: scripts/study.sh, and TARGETS=all (the paper's text) or release (the 60 adapters of its percentages).
. "$(dirname "$0")/study.sh"

case $SCALE in
paper)
    targets=${TARGETS:-all}
    for point in "warmup=100 seed=$TUNE_SEED" "lr=tuned seed=$TUNE_SEED" "lr=tuned warmup=tuned seed=range(5)"; do
        for task in mnli sst2 cola qqp qnli rte mrpc; do
            for method in lora "wlora k=20" wlora_plus; do
                sweep $task $method experiment=table2 rank=1,2,4,8 targets=$targets $point
            done
        done
        stage
    done
    finish wlora.tables 2 model=deberta_v3_base targets=$targets
    ;;
cpu) # K = 10 of 36 adapters
    for PHASE in $PHASES; do
        for task in sst2 mrpc; do
            for method in lora "wlora k=10" wlora_plus; do tune_small 3 $task $method targets=all "rank=${RANKS:-1,8}"; done
        done
        stage
    done
    finish wlora.tables 2 model=minilm targets=all
    ;;
esac

#!/usr/bin/env bash
# Table 4 (the paper, 4.2 and B.2): LoRA, WLoRA K = 20 and WLoRA+ on SQuAD with DeBERTaV3-base, four ranks, all linears.
# experiment=table4 sets the epochs and batch sizes of Table 9 and the grids. On TUNE_SEED, first the learning rate is tuned
# with a warm-up of 100, then the warm-up with that rate. Then five seeds run.
# Settings: scripts/study.sh, and TARGETS=all (the paper's text) or release (the 60 adapters of its percentages).
. "$(dirname "$0")/study.sh"

case $SCALE in
paper)
    targets=${TARGETS:-all}
    for point in "warmup=100 seed=$TUNE_SEED" "lr=tuned seed=$TUNE_SEED" "lr=tuned warmup=tuned seed=range(5)"; do
        for task in squad_v1 squad_v2; do
            for method in lora "wlora k=20" wlora_plus; do
                sweep $task $method experiment=table4 rank=1,2,4,8 targets=$targets $point
            done
        done
        stage
    done
    finish wlora.tables 4 model=deberta_v3_base targets=$targets
    ;;
cpu) # MiniLM, K = 10 of 36 adapters, SQuAD v1.1; rates are tuned at rank 8 and used at rank 1, too
    for PHASE in $PHASES; do
        for method in lora "wlora k=10" wlora_plus; do tune_small 3 squad_v1 $method targets=all rank=8; done
        stage
    done
    for method in lora "wlora k=10" wlora_plus; do
        [[ ",${RANKS:-1,8}," == *,1,* ]] || break
        rate=1e-3 # placeholder in a dry run, because the tuned rate is unknown
        [ -n "${DRY:-}" ] || rate=$(tuned_rate squad_v1 $method targets=all rank=8)
        # shellcheck disable=SC2046 # words without spaces
        sweep squad_v1 $method $(small squad_v1) targets=all rank=1 "seed=range(3)" "lr=$rate"
    done
    stage
    finish wlora.tables 4 model=minilm targets=all
    ;;
esac

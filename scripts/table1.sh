#!/usr/bin/env bash
# Table 1 (the paper, 4.1 and B.1): every method on GLUE with DeBERTaV3-base, rank 8 on query, key and value.
# experiment=table1 sets batch size, accumulation, 512 steps, warm-up 100 and the grid of learning rates. For each method and
# task, the best learning rate on TUNE_SEED is chosen; then five seeds run with it. Settings: scripts/study.sh, and
#   PROTOCOL=steps    512 steps on every task, as the published code trains
#   PROTOCOL=printed  one epoch, as in the paper's text (13 steps on RTE); warm-up 100, but at most a tenth of the run
. "$(dirname "$0")/study.sh"

methods="full lora adalora increlora dynamic_lora lora_drop alora melora flexlora"

case $SCALE in
paper)
    set_protocol
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
    # The methods of the paper's claims have five seeds, the others three.
    for part in claims others; do
        for PHASE in $PHASES; do
            for task in sst2 mrpc qnli; do
                case $part in
                claims)
                    tune_small 5 $task lora
                    tune_small 5 $task wlora k=1,3,5
                    tune_small 5 $task wlora_plus
                    ;;
                others) for method in $methods; do [ $method = lora ] || tune_small 3 $task $method; done ;;
                esac
            done
            stage
        done
    done
    finish wlora.tables 1 model=minilm
    ;;
esac

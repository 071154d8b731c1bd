#!/usr/bin/env bash
# Table 6 (the paper, 4.4): WLoRA compared with RLoRA, which selects at random; settings as in Table 1; K = 1, 5, 10. The runs
# of WLoRA are shared with scripts/table1.sh and are not repeated. Settings: scripts/study.sh, and PROTOCOL as in table1.sh.
. "$(dirname "$0")/study.sh"

case $SCALE in
paper)
    set_protocol
    for rate in "seed=$TUNE_SEED" "lr=tuned seed=range(5)"; do
        for task in mnli sst2 cola qqp qnli rte mrpc; do
            for method in wlora rlora; do sweep $task $method experiment=table6 k=1,5,10 $protocol $rate; done
        done
        stage
    done
    finish wlora.tables 6 model=deberta_v3_base ${protocol%% *}
    ;;
cpu)
    for PHASE in $PHASES; do
        for task in sst2 mrpc qnli; do
            tune_small 5 $task wlora k=1,3,5
            tune_small 5 $task rlora k=1,3,5
        done
        stage
    done
    finish wlora.tables 6 model=minilm
    ;;
esac

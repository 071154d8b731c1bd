#!/usr/bin/env bash
# Table 5 (the paper, 4.3 and B.2): LoRA, WLoRA K = 20 and WLoRA+ on XSum and CNN/DailyMail with BART-large, four ranks, all
# 192 linears. experiment=table5 sets the epochs and batch sizes of Table 9 and the grids. On TUNE_SEED, first the learning rate
# is tuned with a warm-up of 100, then the warm-up with that rate. Then five seeds run. Settings: scripts/study.sh.
. "$(dirname "$0")/study.sh"

[ "$SCALE" = paper ] || { echo "error: SCALE=$SCALE: allowed is paper; only Tables 1, 2 and 6 have a small study" >&2; exit 2; }
for point in "warmup=100 seed=$TUNE_SEED" "lr=tuned seed=$TUNE_SEED" "lr=tuned warmup=tuned seed=range(5)"; do
    for task in xsum cnn_dailymail; do
        for method in lora "wlora k=20" wlora_plus; do
            sweep $task $method experiment=table5 rank=1,2,4,8 $point
        done
    done
    stage
done
finish wlora.tables 5 model=bart_large

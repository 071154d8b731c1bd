#!/usr/bin/env bash
# Table 4 (the paper, 4.2 and B.2): LoRA, WLoRA K = 20 and WLoRA+ on SQuAD with DeBERTaV3-base, four ranks, all linears.
# experiment=table4 has the epochs and batch sizes of Table 9 and the grids. On TUNE_SEED first the learning rate is tuned under
# a warm-up of 100, then the warm-up at that rate; then five seeds.
# Settings: scripts/study.sh, and TARGETS=all (the paper's text) or release (the 60 adapters of its percentages).
. "$(dirname "$0")/study.sh"

[ "$SCALE" = paper ] || { echo "error: SCALE=$SCALE: allowed is paper; only Tables 1, 2 and 6 have a small study" >&2; exit 2; }
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

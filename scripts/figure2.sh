#!/usr/bin/env bash
# Figure 2 (the paper, 3.1): every adapter is trained alone, and its product with the full gradient is computed. The stars are
# the adapters that the study's runs of WLoRA on the same task keep (scripts/table1.sh). experiment=figure2 sets steps, batch
# size, learning rate, scale and dropout of the published script (method.preset=authors) for MNLI; five seeds. SCALE=cpu: MiniLM
# on SST-2, 100 steps, one seed, with the same scale and dropout. Settings: scripts/study.sh.
. "$(dirname "$0")/study.sh"

case $SCALE in
paper) sweep mnli single experiment=figure2 "seed=range(5)" ;;
cpu)
    setting="model=minilm precision=bf16 task.batch_size=32 train.accumulation_steps=1 task.max_train_rows=4000"
    sweep sst2 single $setting rank=8 alpha=8 dropout=0 train.max_steps=100 warmup=0 lr=1e-3 "method.index=range(18)"
    ;;
esac
stage
finish wlora.figures dot_products

#!/usr/bin/env bash
# Table 3 (the paper, 4.1 and B.1): LoRA, WLoRA K = 100 and WLoRA+ on GLUE with Llama 3 8B, four ranks, all 224 linears.
# experiment=table3 sets the steps and batch sizes of Table 8, two accumulation steps, and the grids. On TUNE_SEED, first the
# learning rate is tuned with a warm-up of 25, then the warm-up with that rate. Then five seeds run. Settings: scripts/study.sh.
# The paper's percentages correspond to a base in 4 bits: scripts/table3.sh model.quantization=nf4.
. "$(dirname "$0")/study.sh"

case $SCALE in
paper)
    for point in "warmup=25 seed=$TUNE_SEED" "lr=tuned seed=$TUNE_SEED" "lr=tuned warmup=tuned seed=range(5)"; do
        for task in mnli sst2 cola qqp qnli rte mrpc stsb; do
            for method in lora "wlora k=100" wlora_plus; do
                sweep $task $method experiment=table3 rank=1,2,4,8 $point
            done
        done
        stage
    done
    finish wlora.tables 3 model=llama3_8b
    ;;
cpu) # SmolLM2-135M, a Llama with 210 adapters, on 1,024 rows; SMOLLM2 contains further arguments for the model, such as a local folder
    MODEL="model=smollm2_135m ${SMOLLM2:-}"
    for PHASE in $PHASES; do
        for task in sst2 mrpc; do
            for method in lora "wlora k=100" wlora_plus; do tune_small 3 $task $method targets=all rank=4; done
        done
        stage
    done
    finish wlora.tables 3 model=smollm2_135m
    ;;
esac

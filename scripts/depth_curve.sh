#!/usr/bin/env bash
# Accuracy and speed with a longer frozen prefix (not in the paper): method=wlora_depth with both rules and several values of
# depth_cost, compared with LoRA, LoRA in the upper layers only (one variant also at rank 32), and WLoRA. K = 9 tests whether
# more adapters compensate for fewer layers. All runs use the prefix cache. Settings: scripts/study.sh. RESULTS is a separate
# folder by default, because every setting is a row of the table.
RESULTS=${RESULTS:-results/depth_${SCALE:-paper}}
. "$(dirname "$0")/study.sh"

prices=1e-5,1e-4,1e-3,1e-2,1e-1
case $SCALE in
paper)
    tasks="rte mrpc sst2" uppers=qkv@2,qkv@4,qkv@6,qkv@8,qkv@10 high=qkv@8 prices_once=0.03,0.1,0.3,1,3 more=0.3,1
    setting="experiment=table1 lr=8e-4 seed=range(5)"
    ;;
cpu)
    tasks="sst2 mrpc" uppers=qkv@3,qkv@4,qkv@5 high=qkv@4 prices_once=0.1,0.3,1 more=0.3
    setting="model=minilm task.batch_size=32 train.accumulation_steps=1 task.epochs=3 lr=1e-3 seed=range(3)"
    ;;
esac
for task in $tasks; do
    shared="$setting train.prefix_cache=memory"
    [ "$SCALE-$task" != cpu-sst2 ] || shared+=" task.max_train_rows=4000"
    sweep "$task" lora $shared
    sweep "$task" lora $shared targets=$uppers
    sweep "$task" lora $shared targets=$high rank=32
    sweep "$task" wlora $shared k=5
    sweep "$task" wlora_depth $shared k=5 method.depth_cost=$prices
    sweep "$task" wlora_depth $shared k=5 method.rule=once method.depth_cost=$prices_once
    sweep "$task" wlora_depth $shared k=9 method.rule=once method.depth_cost=$more
done
stage
finish wlora.tables summary
finish wlora.figures pareto

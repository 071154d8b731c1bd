#!/usr/bin/env bash
# Table 5 (the paper, 4.3 and B.2): LoRA, WLoRA K = 20 and WLoRA+ on XSum and CNN/DailyMail with BART-large, four ranks, all
# 192 linears. experiment=table5 sets the epochs and batch sizes of Table 9 and the grids. On TUNE_SEED, first the learning rate
# is tuned with a warm-up of 100, then the warm-up with that rate. Then five seeds run. Settings: scripts/study.sh.
. "$(dirname "$0")/study.sh"

# base_and_rows FOLDER: split the rows of story_summary in two, train tiny_bart in full on the first part, and print where it is
base_and_rows() {
    python - "$1" <<'PYTHON'
import json, pathlib, sys
from wlora.data.synthetic.story import generate

for split in ("train", "validation"):
    columns = generate("story_summary", split)
    lines = [json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values())]
    parts = (lines[:2000], lines[2000:]) if split == "train" else (lines, lines)
    for name, part in zip(("base", "story_summary"), parts):
        file = pathlib.Path(sys.argv[1], name, f"{split}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(part))
PYTHON
    local words="task=story_summary model=tiny_bart method=full lr=3e-3 precision=bf16 task.epochs=1 train.save_model=true"
    # shellcheck disable=SC2086 # words without spaces
    [ -d "$1/models" ] || python -m wlora.run $words task.path="$1/base" results_dir="$1" force=true >&2
    echo "$1"/models/*
}

case $SCALE in
paper)
    for point in "warmup=100 seed=$TUNE_SEED" "lr=tuned seed=$TUNE_SEED" "lr=tuned warmup=tuned seed=range(5)"; do
        for task in xsum cnn_dailymail; do
            for method in lora "wlora k=20" wlora_plus; do
                sweep $task $method experiment=table5 rank=1,2,4,8 $point
            done
        done
        stage
    done
    finish wlora.tables 5 model=bart_large
    ;;
cpu) # no pretrained BART: a tiny one, trained for one epoch on other rows of the task, and 32 adapters, of which WLoRA keeps 8
    DATA=$RESULTS/base
    MODEL="model=tiny_bart model.path=$(base_and_rows "$DATA")"
    for PHASE in $PHASES; do
        for method in lora "wlora k=8" wlora_plus; do tune_small 3 story_summary $method targets=all rank=1,4; done
        stage
    done
    finish wlora.tables 5 model=tiny_bart
    ;;
esac

#!/usr/bin/env bash
# Run a grid of learning rates and warm-ups twice, without and with a race: SST-2, MiniLM, 4,000 rows, 3 epochs, seed 100. Then
# scripts/race_check.py compares steps, seconds and choice. A restarted script runs only what is missing. Settings in addition
# to those of scripts/study.sh:
#   RATES=A,B,..  WARMUPS=A,B,..   the grid                      [10 rates, 5 warm-ups]
#   METHOD="wlora k=5"             the method and its arguments  [lora]
#   RESULTS=DIR                    folder of raced/ and unraced/ [outputs/race_bench]
# Arguments are added to every run: scripts/race_bench.sh task.max_train_rows=1000
RESULTS=${RESULTS:-outputs/race_bench}
. "$(dirname "$0")/study.sh"

rates=${RATES:-1e-4,2e-4,3e-4,5e-4,7e-4,1e-3,2e-3,3e-3,5e-3,1e-2} warmups=${WARMUPS:-0,10,37,60,100}
TIMEFORMAT="%R %U %S" # seconds: wall, user, system
mkdir -p "$RESULTS"

# run KIND OVERRIDE...: a sweep into RESULTS/KIND; its seconds are added to RESULTS/KIND.seconds
run() {
    local words
    # shellcheck disable=SC2206,SC2207 # words without spaces
    words=(task=sst2 $(small sst2) ${DATA:+task.path=$DATA/sst2} method=${METHOD:-lora} "seed=$TUNE_SEED" "lr=$rates" "warmup=$warmups")
    { time python -m wlora.run -m "results_dir=$RESULTS/$1" "${words[@]}" "${extra[@]}" "${@:2}" 2>&3; } \
        3>&2 2>>"$RESULTS/$1.seconds"
}

run raced race=halving train.keep=1
run unraced
python "$(dirname "$0")/race_check.py" compare "$RESULTS/unraced" "$RESULTS/raced"

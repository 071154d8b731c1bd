# What the scripts of tables and figures share; they source it. A script queues sweeps (`sweep`), runs what is queued
# (`stage`), and ends with `finish`. Every sweep is one `python -m wlora.run -m`: what is recorded is skipped, so a script
# started again fills the gaps. Words after a script's name go to every sweep: scripts/table1.sh precision=fp16
#
#   SCALE=paper|cpu   the paper's study, or a small one with MiniLM on two cores
#   RESULTS=DIR       the study's folder                        [results/${SCALE}_study]
#   DATA=DIR          local copies, one folder per task         [the hub]
#   TASKS="rte mrpc"  METHODS="lora wlora"                      [all of the script]
#   TUNE_SEED=N       the seed on which rates and warm-ups are chosen, above those that are reported   [100]
#   JOBS=N            sweeps at once; with GPUS=N each takes one of N GPUs   [1]
#   DRY=1             run nothing: list the cells, what is done, and the time left

set -euo pipefail
export SCALE=${SCALE:-paper} RESULTS=${RESULTS:-results/${SCALE:-paper}_study} GPUS=${GPUS:-} TUNE_SEED=${TUNE_SEED:-100}
case $SCALE in paper | cpu) ;; *) echo "error: SCALE=$SCALE: allowed is paper | cpu" >&2; exit 2 ;; esac
extra=("$@") queue=() planned=()

# chosen LIST NAME: whether NAME is in LIST, an empty list having every name
chosen() { [ -z "$1" ] || [[ " $1 " == *" $2 "* ]]; }

# sweep TASK METHOD OVERRIDE...
sweep() {
    chosen "${TASKS:-}" "$1" && chosen "${METHODS:-}" "$2" || return 0
    local word words=" ${*:3}"
    for word in "${extra[@]}"; do
        # The method may not be one that reads the key. Hydra's ++ forces it, which is then no mistake.
        [[ $word =~ ^(rank|alpha|dropout|k|targets)= && $words != *" ${word%%=*}="* ]] && word=++$word
        words+=" $word"
    done
    queue+=("results_dir=$RESULTS task=$1 ${DATA:+task.path=$DATA/$1} method=$2$words")
}

run_sweep() {
    [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=$((SLOT % GPUS))
    # 1: some runs failed, and are missing in the table. Anything else is a mistake or an interrupt, and ends the study.
    python -m wlora.run -m "$@" || [ $? -eq 1 ] || exit 255
}
export -f run_sweep

stage() {
    if [ ${#queue[@]} -gt 0 ]; then
        if [ -n "${DRY:-}" ]; then
            planned+=("${queue[@]}")
        else
            printf '%s\n' "${queue[@]}" | sed 's/ *$//' |
                xargs -P "${JOBS:-1}" --process-slot-var=SLOT -L 1 bash -c 'run_sweep "$@"' run_sweep
        fi
    fi
    queue=()
}

# finish MODULE NAME KEY=VALUE...: make the table or figure; after DRY=1 the first one ends the script
finish() {
    if [ -n "${DRY:-}" ]; then
        printf '%s\n' "${planned[@]}" | python -m wlora.sweep
        exit
    else
        python -m "$@" "results_dir=$RESULTS"
    fi
}

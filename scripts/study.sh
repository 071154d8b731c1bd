# Shared functions of the scripts for tables and figures, which source this file. A script queues sweeps (`sweep`), runs the
# queue (`stage`), and ends with `finish`. Every sweep is one `python -m wlora.run -m` command, which skips recorded runs, so a
# restarted script runs only what is missing. Arguments of a script are added to every sweep: scripts/table1.sh precision=fp16
#
#   SCALE=paper|cpu   the paper's study, or a small one with MiniLM on two cores
#   RESULTS=DIR       the study's folder                        [results/${SCALE}_study]
#   DATA=DIR          local copies, one folder per task         [the hub]
#   TASKS="rte mrpc"  METHODS="lora wlora"                      [all of the script]
#   TUNE_SEED=N       seed for tuning rates and warm-up; larger than the reported seeds 0 to 4   [100]
#   RANKS=8           ranks of the small Tables 2 and 4         [1,8]
#   RACE=1            race the tuning sweeps (docs/sweeps.md): the worse rates are stopped early
#   JOBS=N            number of simultaneous sweeps; with GPUS=N each uses one of N GPUs, or of CUDA_VISIBLE_DEVICES   [1]
#   DRY=1             run nothing: list the cells, what is done, and the time left
#
# PHASE and PHASES are shared with the scripts; the output of `small` is split into words on purpose:
# shellcheck shell=bash disable=SC2034,SC2046,SC2153

set -euo pipefail
export SCALE=${SCALE:-paper}
export RESULTS=${RESULTS:-results/${SCALE}_study} GPUS=${GPUS:-} TUNE_SEED=${TUNE_SEED:-100}
case $SCALE in paper | cpu) ;; *) echo "error: SCALE=$SCALE: allowed is paper | cpu" >&2; exit 2 ;; esac
[[ $TUNE_SEED =~ ^[0-9]+$ && $TUNE_SEED -gt 4 ]] || { echo "error: TUNE_SEED=$TUNE_SEED: allowed is int > 4" >&2; exit 2; }
extra=("$@") queue=() planned=()
refused=$(mktemp)
export refused
trap 'rm -f "$refused"' EXIT

# chosen LIST NAME: whether NAME is in LIST; an empty list contains every name
chosen() { [ -z "$1" ] || [[ " $1 " == *" $2 "* ]]; }

# set_protocol: sets `protocol` to the arguments of PROTOCOL (Tables 1 and 6)
set_protocol() {
    case ${PROTOCOL:-steps} in
    steps) protocol="train.max_steps=512" ;;
    printed) protocol="train.max_steps=null task.epochs=1 warmup=null" ;;
    *) echo "error: PROTOCOL=$PROTOCOL: allowed is steps | printed" >&2; exit 2 ;;
    esac
}

# sweep TASK METHOD OVERRIDE...
sweep() {
    chosen "${TASKS:-}" "$1" && chosen "${METHODS:-}" "$2" || return 0
    local word words=" ${*:3}"
    for word in "${extra[@]}"; do
        # Some methods do not read the key. Hydra's ++ sets it without an error.
        [[ $word =~ ^(rank|alpha|dropout|k|targets)= && $words != *" ${word%%=*}="* ]] && word=++$word
        words+=" $word"
    done
    [[ -z ${RACE:-} || "$words " != *" seed=$TUNE_SEED "* ]] || words+=" race=halving train.keep=1"
    queue+=("results_dir=$RESULTS task=$1 ${DATA:+task.path=$DATA/$1} method=$2$words")
}

# The small studies: MiniLM (K out of 18 adapters on query, key and value, or 36 on all linears) on samples of the tasks. MODEL
# names another model: SmolLM2-135M in Table 3, a small BART in Table 5. small TASK prints the arguments that all their runs share.
# tune_small SEEDS TASK METHOD OVERRIDE...: four rates on TUNE_SEED, up to two more where the best is at an edge, then the reported
# seeds 0 to SEEDS - 1 at the best rate; call it once per phase of PHASES, with a stage after it.
PHASES="grid beyond beyond seeds"
small() {
    local words="${MODEL:-model=minilm} precision=bf16 train.accumulation_steps=1 train.checkpoint_every=0 train.save_adapter=false"
    case "${MODEL:-minilm} $1" in
    model=smollm2*) words+=" task.batch_size=16 task.max_train_rows=1024 task.epochs=3 train.fast_step=true" ;;
    *story_summary) words+=" task.batch_size=32 task.epochs=5" ;;
    *sst2) words+=" task.batch_size=32 task.max_train_rows=4000 task.epochs=3" ;;
    *mrpc) words+=" task.batch_size=32 task.epochs=3" ;;
    *qnli) words+=" task.batch_size=32 task.max_train_rows=4000 task.epochs=2" ;;
    *squad_v1)
        words+=" task.batch_size=8 task.max_train_rows=4000 task.max_eval_rows=1000 task.epochs=2 train.fast_step=true"
        ;;
    esac
    echo "$words"
}
# tuned_rate TASK METHOD OVERRIDE...: the best rate on TUNE_SEED among the recorded runs, for use in another setting
tuned_rate() {
    python -m wlora.run dry_run=true results_dir="$RESULTS" task="$1" ${DATA:+task.path="$DATA/$1"} method="$2" $(small "$1") \
        "${@:3}" seed=0 lr=tuned | sed -n 's/^tuned: lr=\([^ ,]*\).*/\1/p'
}
tune_small() {
    local seeds=$1 task=$2 method=$3 rates=3e-4,1e-3,3e-3,1e-2
    [ "$method" = full ] && rates=1e-5,3e-5,1e-4,3e-4
    case $PHASE in
    grid) sweep "$task" "$method" $(small "$task") "${@:4}" "seed=$TUNE_SEED" "lr=$rates" ;;
    beyond) sweep "$task" "$method" $(small "$task") "${@:4}" "seed=$TUNE_SEED" lr=beyond ;;
    seeds) sweep "$task" "$method" $(small "$task") "${@:4}" "seed=range($seeds)" lr=tuned ;;
    esac
}

run_sweep() {
    if [ -n "$GPUS" ]; then
        local devices
        IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
        export CUDA_VISIBLE_DEVICES=${devices[SLOT % GPUS % ${#devices[@]}]}
    fi
    # Exit code 1: some runs failed and will be missing in the table; 2: some were refused, such as lr=tuned if every rate
    # diverged. Other codes (interrupts) end the study.
    python -m wlora.run -m "$@" || case $? in
        1) ;;
        2) echo "$*" >>"$refused" ;;
        *) exit 255 ;;
    esac
}
export -f run_sweep

stage() {
    if [ ${#queue[@]} -gt 0 ]; then
        if [ -n "${DRY:-}" ]; then
            planned+=("${queue[@]}")
        else
            local before
            before=$(wc -l <"$refused")
            printf '%s\n' "${queue[@]}" | sed 's/ *$//' |
                xargs -P "${JOBS:-1}" --process-slot-var=SLOT -L 1 bash -c 'run_sweep "$@"' run_sweep
            # If every sweep of a stage is refused, the request itself is wrong, and the next stages would be refused, too.
            [ $(($(wc -l <"$refused") - before)) -lt ${#queue[@]} ] || exit 2
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
        if [ -s "$refused" ]; then
            echo "error: runs of these sweeps were refused; the reasons are above:" >&2
            cat "$refused" >&2
            exit 2
        fi
    fi
}

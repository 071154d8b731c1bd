#!/usr/bin/env bash
# Experiments behind the defaults of the selection (docs/selection.md): MiniLM, 18 adapters, SST-2 (4,000 rows) and MRPC, three
# epochs. One factor is changed at a time. Rates are evaluated at every eighth of the run. Settings: scripts/study.sh, and
#   PARTS="bars random growth steps halvings"   [all, in this order]
export RESULTS=${RESULTS:-results/selection} SCALE=cpu
. "$(dirname "$0")/study.sh"

setting="model=minilm precision=bf16 task.batch_size=32 train.accumulation_steps=1 task.epochs=3"
setting+=" train.checkpoint_every=0 train.save_adapter=false"
sst2="task.max_train_rows=4000" grid="lr=3e-4,1e-3,3e-3"
part() { chosen "${PARTS:-}" "$1"; }

# on_sst2, on_mrpc, on_both METHOD OVERRIDE...: a sweep; with EIGHTHS=1 evaluated at every eighth of the run
on_sst2() { sweep sst2 "$1" $setting $sst2 ${EIGHTHS:+train.eval_every=47} "${@:2}"; }
on_mrpc() { sweep mrpc "$1" $setting ${EIGHTHS:+train.eval_every=44} "${@:2}"; }
on_both() { on_sst2 "$@"; on_mrpc "$@"; }

if part bars; then # WLoRA+ and WLoRA: with one rate, and with the rate chosen on seed 100
    for method in "wlora k=5" wlora_plus; do
        EIGHTHS=1 on_both $method seed=100 $grid
        on_sst2 $method "seed=range(3)" lr=1e-3
    done
    on_sst2 lora "seed=range(3)" lr=1e-3
    stage
    for method in "wlora k=5" wlora_plus; do on_both $method "seed=range(3)" lr=tuned; done
    stage
fi
if part random; then # WLoRA and RLoRA
    for k in 5 1 3; do
        for method in wlora rlora; do on_both $method k=$k "seed=range(5)" lr=1e-3; done
    done
    stage
fi
if part growth; then # how ranks grow
    for growth in "method.extension=qr" "method.extension=gaussian method.keep_moments=true" "method.extension=gaussian" \
        "method.extension=qr method.rescale=true"; do
        EIGHTHS=1 on_both wlora_plus $growth "seed=range(3)" $grid
    done
    stage
fi
if part steps; then # T, the warm-up, and whether schedule and clipping include omega
    for steps in 5 20 50 10; do on_both wlora k=5 "seed=range(3)" lr=1e-3 method.select_steps=$steps; done
    on_both wlora k=5 "seed=range(3)" lr=1e-3 method.select_steps=2 warmup=0
    for warmup in 10 60; do on_both wlora k=5 "seed=range(3)" lr=1e-3 warmup=$warmup; done
    for omega in "method.omega_scheduled=true" "method.omega_clipped=true" \
        "method.omega_scheduled=true method.omega_clipped=true"; do
        on_both wlora k=5 "seed=range(3)" lr=1e-3 $omega
    done
    stage
fi
if part halvings; then
    on_both wlora_plus method.schedule=halvings "seed=range(3)" lr=1e-3
    stage
fi
finish wlora.tables summary model=minilm

#!/usr/bin/env bash
# Creates a SLURM cluster with one node, runs a sweep with hydra/launcher=submitit_slurm on it, and preempts both jobs: one by
# the signal that SLURM sends before the time limit, the other by SLURM itself (scontrol requeue). Both must continue from their
# checkpoints. The cluster has no accounting, so submitit prints a warning about sacct. Run as root on Debian or Ubuntu, also in
# a container:
#   apt-get install -y slurm-wlm munge && pip install -e '.[slurm]' && scripts/slurm_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=$(mktemp -d)
NODE=$(hostname -s)
export SLURM_CONF=$WORK/slurm.conf
DAEMONS=()

stop() {
    scancel --user=root 2>/dev/null || true
    for _ in $(seq 60); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 1; done
    for pid in "${DAEMONS[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$WORK"
}
trap stop EXIT

cluster() {
    mkdir "$WORK/state" "$WORK/spool"
    chmod 755 "$WORK"
    (umask 077 && head -c 128 /dev/urandom >"$WORK/munge.key")
    cat >"$SLURM_CONF" <<CONF
ClusterName=check
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
SlurmctldPort=36817
SlurmdPort=36818
# A requeued job waits until the credentials of its last start have expired, by default for two minutes.
AuthInfo=socket=$WORK/munge.socket,cred_expire=5
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES State=UP
CONF
    # --force: required because other users may write to the parent of a temporary folder.
    munged --foreground --force --key-file="$WORK/munge.key" --socket="$WORK/munge.socket" --pid-file="$WORK/munge.pid" \
        --log-file="$WORK/munge.log" --seed-file="$WORK/munge.seed" 2>"$WORK/munge.err" &
    DAEMONS+=($!)
    await test -S "$WORK/munge.socket"
    slurmctld -D 2>"$WORK/slurmctld.log" &
    DAEMONS+=($!)
    slurmd -D -N "$NODE" 2>"$WORK/slurmd.log" &
    DAEMONS+=($!)
    await idle
    sinfo
}

await() {
    for _ in $(seq 600); do
        "$@" && return
        sleep 0.5
    done
    echo "error: timeout while waiting for: $*" >&2
    tail -n 5 "$WORK"/*.log >&2
    exit 1
}

idle() { sinfo -h -o %T 2>/dev/null | grep -q idle; }

# Wait until both runs have written to their learning curves.
training() { [ "$(find "$WORK/results/records" -name '*.jsonl' -size +0 2>/dev/null | wc -l)" = 2 ]; }

cluster
python -m wlora.run -m hydra/launcher=submitit_slurm hydra.launcher.{gpus_per_node,mem_gb}=null hydra.launcher.cpus_per_task=1 \
    task=story_nli model=tiny_bert task.{max_train_rows=128,max_eval_rows=48,batch_size=8,epochs=60} rank=4 lr=1e-3 \
    method=wlora,lora train.checkpoint_every=0 offline=true results_dir="$WORK/results" &
SWEEP=$!
await training
mapfile -t JOBS < <(squeue --array -h -o %i)
squeue --array
scancel --signal=USR2 "${JOBS[0]}"
scontrol requeue "${JOBS[1]}"
wait "$SWEEP"
python - "$WORK/results" <<'CODE'
import sys

from wlora.storage.records import RecordStore

records = list(RecordStore(sys.argv[1]))
for record in records:
    print(record.config["method"]["name"], record.status, "resumed after step", record.resumed_at)
sys.exit(not (len(records) == 2 and all(r.status == "success" and len(r.resumed_at) == 1 for r in records)))
CODE

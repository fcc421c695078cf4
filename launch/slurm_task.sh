#!/bin/bash
# One process of a SLURM job: learns its place from srun, then runs the command that follows.
#   srun ... bash launch/slurm_task.sh python train.py --model alexnet
set -u

die() {
    if [ "${SLURM_PROCID:-0}" = 0 ]; then echo "lockstep: $*" >&2; fi
    exit 2
}

own() { # what only this node finds wrong: its first process says so
    if [ "${SLURM_LOCALID:-0}" = 0 ]; then
        echo "lockstep: rank ${SLURM_PROCID:-0} on $SLURMD_NODENAME: $*" >&2
    fi
    exit 2
}

answers() { # whether a node of the job still starts a process
    timeout 30 srun --jobid="$SLURM_JOB_ID" --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 \
        --nodelist="$1" --export=ALL true 2>/dev/null </dev/null
}
if [ "${1:-}" = answers ]; then
    answers "$2"
    exit
fi

[ -n "${SLURM_STEP_ID:-}" ] && [ -n "${SLURM_PROCID:-}" ] && [ -n "${SLURM_STEP_NODELIST:-}" ] ||
    die "slurm_task.sh was started without srun, so it has no rank; use sbatch launch/slurm.sbatch"

# Of the step, not of the job; here, not in the batch shell, where every rank would read 0.
tasks=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
[ "$((tasks * SLURM_STEP_NUM_NODES))" = "$SLURM_STEP_NUM_TASKS" ] ||
    die "the nodes have different numbers of tasks ($SLURM_STEP_TASKS_PER_NODE); give --ntasks-per-node"
head=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
# The address: on some clusters node names do not resolve.
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$tasks
export GROUP_RANK=$SLURM_NODEID GROUP_WORLD_SIZE=$SLURM_STEP_NUM_NODES
export MASTER_ADDR=${address:-$head}
export MASTER_PORT=${LOCKSTEP_PORT:?slurm.sbatch tests a port on the head node and sets it}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # until train.py knows --threads; as torchrun does

command -v "${LOCKSTEP_PYTHON:-python}" >/dev/null ||
    own "${LOCKSTEP_PYTHON:-python} is not there; put the environment on a disk that all nodes share" \
        "(LOCKSTEP_ENV, LOCKSTEP_PYTHON), or avoid this node: --exclude=$SLURMD_NODENAME"
if [ "$GROUP_WORLD_SIZE" -gt 1 ]; then
    # Gloo would ask for the host's own name, which may not resolve, or only to 127.0.0.1; NCCL
    # skips lo and docker*, but not other bridges and tunnels that lead nowhere.
    interface=${GLOO_SOCKET_IFNAME:-}
    if [ -z "$interface" ]; then
        way=$("${LOCKSTEP_PYTHON:-python}" launch/network.py way "$MASTER_ADDR") || exit 2
        read -r _ _ interface <<<"$way"
    fi
    if [ -n "$interface" ]; then
        export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
    fi
fi

trap : TERM INT USR1 USR2 # SLURM sends signals to every process: the command acts, this one waits
exec 3>&2 2>/dev/null # bash's own words, of a child that was killed: ours follow
"$@" 2>&3 3>&-
code=$?
exec 2>&3
if [ "$code" -ge 128 ]; then
    echo "lockstep: rank $RANK on $SLURMD_NODENAME was killed by signal $((code - 128))" \
        "$([ "$code" = 137 ] && echo '(out of memory, most often: more --mem; else kill -9)')" >&2
elif [ "$code" != 0 ] && [ "$code" != 75 ]; then
    echo "lockstep: rank $RANK on $SLURMD_NODENAME ended with exit status $code" >&2
fi
# A stop is no failure; what it led to stands in status.json. srun would print an error for each.
[ "$code" != 75 ] || code=${LOCKSTEP_STOPPED:-75}
# srun kills the others as soon as this status arrives: first let them tell what they saw and end.
exec 2>/dev/null
[ "$code" = 0 ] || sleep "${LOCKSTEP_GRACE:-8}"
# With --no-kill SLURM leaves a job its nodes even where the one of its batch shell is lost: nobody
# would end this step, nor start another. So the other nodes put the job back into the queue.
if [ "$code" != 0 ] && [ -n "${LOCKSTEP_LEAST:-}" ] && [ "$SLURM_NODEID" != 0 ] &&
    [ "$SLURM_LOCALID" = 0 ] && ! answers "$head"; then
    # Not through srun, which is gone with that node.
    exec >>"${LOCKSTEP_LOG:-/dev/null}" 2>&1
    echo "lockstep: $head, the first node of the job, is lost: $SLURMD_NODENAME requeues the job"
    scontrol requeue "${LOCKSTEP_JOB:-$SLURM_JOB_ID}"
fi
exit "$code"

#!/bin/bash
# Starts one process per GPU on this node; on several nodes, type the same on each of them.
#   launch/torchrun.sh -- --model alexnet --dataset cifar10            all GPUs of this node
#   launch/torchrun.sh --nproc 2 -- --model ...                        two processes
#   launch/torchrun.sh --nnodes 2 --head 10.0.0.1:29400 -- --model ... on both nodes
#   launch/torchrun.sh --nnodes 1:4 --head ...                         on four, or what is left of them
# Options: --nproc N, --nnodes N or MIN:MAX, --head ADDRESS:PORT (the first node's), --id NAME (of the launch:
# its lives share runs/launch-NAME), --max-restarts N (in place, after a crash), --local-addr ADDRESS
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${LOCKSTEP_PYTHON:-python}
usage() { sed -n '2,8s/^# *//p' "${BASH_SOURCE[0]}"; }
die() { echo "lockstep: $*" >&2 && exit 2; }
counted() { if [ "$1" = 1 ]; then echo "$1 $2"; else echo "$1 $3"; fi; }

nproc="" nnodes=1 head="" id="" restarts="" local_addr=""
while [ $# -gt 0 ]; do
    option=$1
    case $option in
    --) shift && break ;;
    -h | --help) usage && exit 0 ;;
    --nproc | --nnodes | --head | --id | --max-restarts | --local-addr)
        [ $# -gt 1 ] || die "$option needs a value"
        ;;
    *) die "$option: not known here; train.py's flags follow after --, e.g." \
        "launch/torchrun.sh --nproc 2 -- --model alexnet" ;;
    esac
    case $option in
    --nproc) nproc=$2 ;;
    --nnodes) nnodes=$2 ;;
    --head) head=$2 ;;
    --id) id=$2 ;;
    --max-restarts) restarts=$2 ;;
    --local-addr) local_addr=$2 ;;
    esac
    shift 2
done
if [ -z "$nproc" ]; then # nvidia-smi -L prints a line per GPU, also of those that CUDA shall not see
    nproc=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU')
    if [ "$nproc" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # numbers, GPU-... or MIG-...
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        nproc=${#visible[@]}
    fi
    [ "$nproc" -gt 0 ] || nproc=1
fi
[[ $nproc =~ ^[1-9][0-9]*$ ]] || die "--nproc $nproc: a whole number from 1"
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ && ${nnodes%:*} -le ${nnodes#*:} ]] ||
    die "--nnodes $nnodes: a whole number from 1, or MIN:MAX"
case $nnodes in
*:*) # each lost node is one; a mistyped flag would be as many
    restarts=${restarts:-10}
    PYTHONPATH="$here/.." "$python" -m config "$@" >/dev/null || exit
    ;;
*) restarts=${restarts:-0} ;;
esac
[[ $restarts =~ ^[0-9]+$ ]] || die "--max-restarts $restarts: must be a whole number"
[[ -z $id || $id =~ ^[A-Za-z0-9_-]+$ ]] || die "--id $id: use letters, digits, - and _"

if [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_STEP_TASKS_PER_NODE%%[(,]*}" -gt 1 ]; then
    die "srun started ${SLURM_STEP_TASKS_PER_NODE%%[(,]*} tasks per node, each of which would start" \
        "$nproc processes; use srun --ntasks-per-node=1, or sbatch launch/slurm.sbatch"
fi
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ -z "${SLURM_STEP_ID:-}" ]; then
    die "this job has $SLURM_JOB_NUM_NODES nodes, but without srun this starts on one of them only;" \
        "use sbatch launch/slurm.sbatch"
fi

rdzv=(--rdzv-backend=c10d) meet=()
if [ "$nnodes" = 1 ] && [ -z "$head" ]; then
    rdzv+=(--rdzv-endpoint=localhost:0) # a free port
    id=${id:-${SLURM_JOB_ID:-$(date +%s)-$$}}
else
    [[ $head =~ ^[^:]+:[0-9]+$ ]] ||
        die "--nnodes $nnodes needs --head ADDRESS:PORT, the first node's address and a free port"
    [ -n "${id:-${SLURM_JOB_ID:-}}" ] || id=${head//[^A-Za-z0-9]/-} # the same on all nodes
    id=${id:-$SLURM_JOB_ID}
    way=$("$python" "$here/network.py" way "${head%:*}") || exit 2
    read -r mine is_head interface <<<"$way"
    meet=("$python" "$here/network.py" meet "$head" "$nnodes" "$is_head" --)
    conf=is_host=$([ "$is_head" = yes ] && echo 1 || echo 0)
    if [[ $nnodes == *:* ]]; then # a lost node is noticed in 3 s; torch's own limits: 15, and 30 more
        conf+=,keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3
    fi
    rdzv+=(--rdzv-endpoint="$head" --rdzv-conf="$conf")
    rdzv+=(--local-addr="${local_addr:-$mine}")
    # Gloo would ask for the host's own name, which may not resolve, or only to 127.0.0.1.
    # NCCL would skip lo and docker*, but not other bridges and tunnels that lead nowhere.
    interface=${GLOO_SOCKET_IFNAME:-$interface}
    if [ -n "$interface" ]; then
        export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
    fi
fi
# An agent without this hands its processes its own store: after a restart they find old keys there.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120} # seconds to save
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # else torchrun says so, in a banner; see --threads
echo "lockstep: $(counted "$nnodes" node nodes) x $(counted "$nproc" process processes)," \
    "id $id, ${rdzv[*]}" >&2
# USR1 would kill an agent that does not expect it, and orphan its processes.
exec ${meet[@]+"${meet[@]}"} "$python" -m torch.distributed.run \
    --nnodes="$nnodes" --nproc-per-node="$nproc" "${rdzv[@]}" --rdzv-id="$id" \
    --max-restarts="$restarts" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    -- "$here/../train.py" "$@"

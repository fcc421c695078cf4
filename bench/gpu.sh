#!/usr/bin/env bash
# All measurements and checks that need a GPU: bash bench/gpu.sh [FOLDER FOR THE JSON FILES]
# One GPU, at most ten minutes, nothing but torch, torchvision, accelerate and rich installed.
# CIFAR-10 is used where it lies in the cache (carry it along: LOCKSTEP_CACHE=folder), else
# synthetic images, and then no time to accuracy.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-bench/results/gpu}
python=${PYTHON:-python}
failed=()
mkdir -p "$out"

step() { # seconds, name, command
    local seconds=$1 name=$2
    shift 2
    printf '\n=== %s\n' "$name"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

export HF_HUB_OFFLINE=1
unset OMP_NUM_THREADS
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
"$python" -c 'import torch, torchvision, accelerate
print("torch", torch.__version__, "torchvision", torchvision.__version__,
      "accelerate", accelerate.__version__)
raise SystemExit(not torch.cuda.is_available())' || exit 1
data=synthetic
"$python" -c 'from data.sources import load_source; load_source("cifar10")' 2>/dev/null && data=cifar10
echo "data: $data"

step 30 keyed "$python" -m bench.gpu_checks keyed
step 40 waits-alexnet "$python" -m bench.gpu_checks waits --model alexnet
step 40 waits-speednet "$python" -m bench.gpu_checks waits --model speednet
step 40 repeats "$python" -m bench.gpu_checks repeats --model alexnet
for model in my_cnn alexnet vgg11 resnet18; do
    step 50 "throughput-$model" "$python" -m bench.throughput --models "$model" --rounds 3 \
        --steps 20 --batch-size 256 --dataset "$data" --json "$out/throughput-$model.json"
done
if [ "$data" = cifar10 ]; then
    step 120 speednet "$python" -m bench.seeds --runs 3 --tta 2 --json "$out/speednet.json" \
        -- --model speednet --dataset cifar10
fi
step 30 shards "$python" -m bench.shards --micro-batch 64 --json "$out/shards.json"
step 40 checkpoint "$python" -m bench.checkpoint --batch-size 128 --json "$out/checkpoint.json"
step 40 startup "$python" -m bench.startup --rounds 2 --json "$out/startup.json"

printf '\n%s: tables and JSON in %s\n' "$(date -u +%F)" "$out"
if [ "${#failed[@]}" != 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi

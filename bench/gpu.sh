#!/usr/bin/env bash
# All measurements and checks that need a GPU: bash bench/gpu.sh [FOLDER FOR THE JSON FILES]
# One GPU, at most ten minutes, nothing but torch, torchvision, accelerate and rich installed.
# Without CIFAR-10 synthetic images are taken, and no time to accuracy. To carry it along:
#   python -m data prepare --dataset cifar10 --out cifar10.safetensors
#   CIFAR10_DIR=cifar10.safetensors bash bench/gpu.sh
# REHEARSE=1 tries every measurement on a CPU, in small.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-bench/results/gpu}
python=${PYTHON:-python}
rehearse=${REHEARSE:-}
failed=()
mkdir -p "$out"

step() { # seconds, name, command
    local seconds=$1 name=$2 began=$SECONDS
    shift 2
    printf '\n=== %s\n' "$name"
    [ -z "$rehearse" ] || seconds=600
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
    printf '(%s s)\n' $((SECONDS - began))
}

export HF_HUB_OFFLINE=1
unset OMP_NUM_THREADS
"$python" -c 'import torch, torchvision, accelerate
print("torch", torch.__version__, "torchvision", torchvision.__version__,
      "accelerate", accelerate.__version__)' || exit 1
data=synthetic
if "$python" -m data stats --dataset cifar10; then
    data=cifar10
elif [ -n "${CIFAR10_DIR:-}" ]; then
    exit 1 # the line above says why
fi
echo "data: $data"

if [ -z "$rehearse" ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
        echo "this torch sees no GPU; REHEARSE=1 tries the measurements on the CPU" >&2
        exit 1
    }
    batch=256 window=(--rounds 3 --steps 20) few=(--rounds 2) run=()
    step 20 keyed "$python" -m bench.gpu_checks keyed
    step 30 waits-alexnet "$python" -m bench.gpu_checks waits --model alexnet
    step 30 waits-speednet "$python" -m bench.gpu_checks waits --model speednet
    step 30 repeats "$python" -m bench.gpu_checks repeats --model alexnet
else
    echo "left out here: bench.gpu_checks, which compare a GPU with the CPU"
    batch=4 window=(--rounds 1 --steps 1) few=(--rounds 1)
    run=(--limit 64 --batch-size 32 --epochs 1)
fi
for model in my_cnn alexnet vgg11 resnet18; do
    steps=()
    case $model in my_cnn | alexnet) [ -n "$rehearse" ] || steps=(--steps 5) ;; esac # PIL at 224
    step 40 "throughput-$model" "$python" -m bench.throughput --models "$model" "${window[@]}" "${steps[@]}" \
        --batch-size "$batch" --dataset "$data" --json "$out/throughput-$model.json"
done
if [ "$data" = cifar10 ]; then
    step 80 speednet "$python" -m bench.seeds --runs 3 --tta 2 --json "$out/speednet.json" \
        -- --model speednet --dataset cifar10 "${run[@]}"
fi
step 120 options "$python" -m bench.options --models resnet18 "${window[@]}" \
    --batch-size "$batch" --json "$out/options.json"
step 15 augment "$python" -m bench.augment "${few[@]}" --batch-size "$batch" --json "$out/augment.json"
step 15 shards "$python" -m bench.shards --micro-batch "$((batch / 4))" "${few[@]}" \
    --json "$out/shards.json"
step 25 checkpoint "$python" -m bench.checkpoint --batch-size "$batch" "${few[@]}" \
    --json "$out/checkpoint.json"
step 30 startup "$python" -m bench.startup "${few[@]}" --json "$out/startup.json"

printf '\n%s: tables and JSON in %s\n' "$(date -u +%F)" "$out"
if [ "${#failed[@]}" != 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi

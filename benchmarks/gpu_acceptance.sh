#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in 7 minutes on one: neighborhood attention is checked on small problems,
# by all implementations and under compute-sanitizer; then measured, forward and backward, beside cuDNN
# and NATTEN's own Hopper kernel; then whole transformers, FLUX.2-klein and FLUX.1 at 4K, dense (by
# cuDNN) and sparse; then kernels are profiled.
#
#   benchmarks/gpu_acceptance.sh                     on a host with a GPU
#   benchmarks/gpu_acceptance.sh --videos            other 7 minutes: HunyuanVideo, Cosmos and Wan
#   benchmarks/gpu_acceptance.sh --stable-diffusion  others: its models, beside PyTorch
#   benchmarks/gpu_acceptance.sh --dry-run           tiny sizes on any device, to try this
#
# The host needs Python with jax, triton and flax, and nvcc; nothing is installed in it.  What
# `benchmarks/gpu_prepare.sh` has compiled elsewhere is used where it is, and saves minutes.
# Environment:
#   PYTHON     the interpreter, by default python3
#   PREPARED   what gpu_prepare.sh left, by default build/gpu
#   OUT        where the archive of results and logs goes, by default build
#
# Every step has its time, and what earlier ones have saved; one that fails or runs out of it leaves
# what it has written, and the others run all the same.  The archive is written after each.  The last
# lines are a table; the exit status is 1 if a step was not done.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} prepared=$(realpath -m "${PREPARED:-build/gpu}") out=${OUT:-build}
size=full part=kernels slack=1 minutes=1.6
for option in "$@"; do
    case "$option" in
        --dry-run) size=tiny slack=8 minutes=15 ;;
        --videos | --stable-diffusion) part=${option#--} ;;
        *) echo "usage: $0 [--videos | --stable-diffusion] [--dry-run]" >&2; exit 2 ;;
    esac
done
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
PATH=$PATH:/usr/local/cuda/bin$(printf ':%s' /opt/nvidia/nsight-compute/*)
scratch=$(mktemp -d) clocks=
results=$scratch/gpu_$part
mkdir -p "$out" "$results"

keep() {
    tar -czf "$out/.new.tgz" -C "$scratch" "gpu_$part" && mv "$out/.new.tgz" "$out/gpu_$part.tgz"
}
finish() {
    status=$?
    [ -n "$clocks" ] && kill "$clocks" 2>/dev/null
    [ $size = full ] && [ "$SECONDS" -gt 420 ] && echo "it took more than 7 minutes: $SECONDS s" >>"$results/not_done"
    "$python" benchmarks/_gpu_table.py "$results" 2>&1 | tee "$results/table.txt"
    keep
    echo "$SECONDS s; results in $out/gpu_$part.tgz"
    [ "$status" = 0 ] && [ -s "$results/not_done" ] && status=1
    rm -rf "$scratch"
    exit "$status"
}

. benchmarks/_rooms.sh "$scratch"
if compgen -G "$prepared/wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/wheels" \
        "$prepared"/wheels/*.whl || exit 1
    export PYTHONPATH="$scratch/wheels:$PYTHONPATH"
fi
on_gpu=1 types=(bfloat16 float16)
if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
    if [ $size = full ]; then
        echo "jax sees no GPU; --dry-run does without one." >&2
        rm -rf "$scratch"
        exit 1
    fi
    on_gpu= types=(float32 float32)
fi
trap finish EXIT
trap 'exit 130' INT TERM

# due SECONDS: what follows has so long, beside what is left of what came before; more in a dry run,
# where compilers are slow.
due=$((SECONDS + 5))
due() { due=$((due + $1 * slack)); }
# step NAME COMMAND...: until it is due.
step() {
    local name=$1 left=$((due - SECONDS)) start=$SECONDS status=0
    shift
    timeout -s INT -k 5 $((left > 1 ? left : 1)) "$@" >"$results/$name.log" 2>&1 </dev/null || status=$?
    [ "$status" = 124 ] && status="out of time"
    [ "$status" = 137 ] && status="out of time, killed"
    echo "== $name: $([ "$status" = 0 ] && echo done || echo "NOT DONE ($status)") in $((SECONDS - start)) s"
    if [ "$status" != 0 ]; then
        echo "$name ($status)" >>"$results/not_done"
        tail -n 4 "$results/$name.log" | cut -c 1-300
    fi
    [ $BASHPID != $$ ] || keep
}
# together: waits for steps that were begun with &.
together() {
    local job
    for job in "${begun[@]}"; do wait "$job"; done
    begun=()
    keep
}
begun=()

if [ -n "$on_gpu" ]; then
    nvidia-smi >"$results/host.log" 2>&1
    nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu \
        --format=csv,noheader,nounits -lms 200 >"$results/clocks.csv" 2>&1 &
    clocks=$!
fi

gna=("$python" benchmarks/gna.py --size "$size" --no-flex --no-memory)
beside=()
[ -d "$prepared/exports" ] && gna+=(--exports "$prepared/exports")
[ -f "$prepared/natten_hopper.so" ] && beside+=(--natten "$prepared/natten_hopper.so")
[ "$on_gpu" ] && [ -d "$prepared/cache" ] && export XDG_CACHE_HOME=$prepared/cache
sparse=(FLUX-4K Hunyuan) stride_1=("stride 1")
[ $size = tiny ] && sparse=(block-sparse)
transformers() {
    step "$1" "$python" benchmarks/transformer_speed.py --gpu --size "$size" \
        --output "$results/transformers.json" "${@:2}"
}
measure() {
    step "$1" "${gna[@]}" --small 0 --output "$results/$1.json" "${@:2}"
}
stable_diffusion() {
    due "$3"
    step "stable_diffusion_$1" "$python" benchmarks/stable_diffusion.py --size "$size" \
        --dtype bfloat16 --tasks "$1" --engines "${engines[@]}" --image "$2" \
        --output "$results/stable_diffusion.json"
}

case $part in
videos)
    due 400
    transformers videos --models hunyuan cosmos wan
    ;;
stable-diffusion)
    engines=(jax eager compile)
    [ $size = tiny ] && engines=(jax eager)
    stable_diffusion unet 512 80
    stable_diffusion step 512 90
    stable_diffusion sampler 512 45
    stable_diffusion unet-xl 1024 80
    stable_diffusion vae 512 35
    stable_diffusion text 512 20
    stable_diffusion step-remat 512 50
    ;;
kernels)
    # One build at a time; none where the library was carried.
    due 25
    step library "$python" -c 'from conceptax.kernels import gna; gna.prepare("cuda")'

    due 65
    check() { step "$1" "${@:3}" "${gna[@]}" --check-only --cases --dtypes "${types[0]}" \
        --implementations $2 --output "$results/$1.json"; }
    for name in cuda triton xla; do
        check "check_$name" $name &
        begun+=($!)
    done
    for tool in memcheck synccheck racecheck; do
        if [ -n "$on_gpu" ]; then
            # Buffers of their own, so that what lies beyond one is seen.
            XLA_PYTHON_CLIENT_ALLOCATOR=platform step $tool compute-sanitizer --tool $tool \
                --error-exitcode 9 "${gna[@]}" --check-only --cases --dtypes "${types[0]}" \
                --implementations cuda --small 3 --output "$results/$tool.json" &
            begun+=($!)
        fi
    done
    together
    # What fails or hangs there would take others' measurements with it.
    read -ra able < <("$python" benchmarks/_gpu_table.py "$results" --able cuda triton)
    echo "measured: ${able[*]:-none}"

    due 65
    measure sparse --dtypes "${types[0]}" --cases "${sparse[@]}" --implementations "${able[@]}" \
        "${beside[@]}"
    due 55
    measure stride_1 --dtypes "${types[0]}" --cases "${stride_1[@]}" --implementations "${able[@]}" \
        "${beside[@]}"
    due 125
    transformers transformers --models klein flux --rounds 2 --minutes $minutes
    due 40
    if [ -n "$on_gpu" ]; then
        step profile ncu --clock-control none --set detailed --section WarpStateStats \
            -k 'regex:forward|backward|device_kernel' -c 8 -f -o "$results/profile" \
            "${gna[@]}" --once --dtypes "${types[0]}" --cases FLUX-4K --implementations "${able[@]}" \
            "${beside[@]}" --output "$results/once.json"
        ncu --import "$results/profile.ncu-rep" --page raw --csv >"$results/profile.csv" 2>&1
    fi
    due 15
    measure float16 --dtypes "${types[1]}" --cases "${sparse[0]}" --implementations "${able[@]}"
    due 15
    measure xla --dtypes "${types[0]}" --cases "${sparse[0]}" --implementations xla --passes forward
    ;;
esac

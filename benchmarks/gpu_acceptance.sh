#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in under 10 minutes: neighborhood attention is checked (values and
# gradients of the triton and cuda implementations) and measured beside cuDNN, then the models of
# Stable Diffusion beside PyTorch, and whole transformers, FLUX.1 and FLUX.2-klein with random
# weights, dense (by cuDNN) and sparse, as far as the time goes.
#
#   benchmarks/gpu_acceptance.sh              on a host with a GPU
#   benchmarks/gpu_acceptance.sh --dry-run    tiny sizes on whatever device there is, to try this
#
# The host needs Python with jax, triton and flax, and nvcc for the cuda implementation; nothing is
# installed in it. Environment:
#   PYTHON   the interpreter, by default python3
#   WHEELS   a folder of wheels of what is missing, such as jax-triton
#   OUT      where results and logs go, by default benchmarks/results
#   SECONDS_IN_ALL   570
#
# A step that fails or runs out of time leaves what it has written, and the others run all the same;
# the exit status is then 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-570}))
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
size=full out=${OUT:-benchmarks/results}
videos=
for option in "$@"; do
    case "$option" in
        --dry-run) size=tiny out=${OUT:-$scratch/results} ;;
        --videos) videos=1 ;;
        *) echo "usage: $0 [--dry-run] [--videos]" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false

# The package without an installation: its rooms under one roof.
mkdir "$scratch/path"
cp -r src/conceptax "$scratch/path/conceptax"
for room in flax_models methods kernels converters; do
    cp -r "$room" "$scratch/path/conceptax/$room"
done
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/wheels" \
        "$WHEELS"/*.whl || exit 1
fi
export PYTHONPATH="$scratch/path:$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}"

failed=()
# step NAME SECONDS COMMAND...: runs a command for at most so long, and not past the deadline.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status=0
    shift 2
    if [ "$left" -lt 15 ]; then
        echo "== $name: no time left"
        failed+=("$name")
        return
    fi
    echo "== $name"
    timeout -s INT -k 10 $((limit < left ? limit : left)) "$@" 2>&1 | tee "$out/$name.log" || status=$?
    echo "== $name: $([ $status = 0 ] && echo done || echo "status $status") in $((SECONDS - start)) s"
    [ $status = 0 ] || failed+=("$name")
}

gna=("$python" benchmarks/gna.py --size "$size")
[ $size = full ] && gna+=(--no-flex)
types=(bfloat16 float16) engines=(jax eager compile)
[ $size = tiny ] && engines=(jax eager)
if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
    if [ $size = full ]; then
        echo "jax sees no GPU; --dry-run does without one." >&2
        exit 1
    fi
    types=(float32)
fi

nvidia-smi 2>/dev/null | tee "$out/gpu_host.log"

# Each checks before it measures, and measures nothing that is wrong.
gna_in() {
    step "gna_gpu_$1" 220 "${gna[@]}" --dtypes "$1" --output "$out/gna_gpu_$1.json"
}
sd_in() {
    step "stable_diffusion_gpu_$1" "$2" "$python" benchmarks/stable_diffusion.py --size "$size" \
        --dtype bfloat16 --tasks "$1" --engines "${engines[@]}" --image "$3" \
        --output "$out/stable_diffusion_gpu.json"
}
transformers_in() {
    step "$1_gpu" "$2" "$python" benchmarks/transformer_speed.py --gpu --size "$size" \
        --output "$out/transformer_speed_gpu.json" "${@:3}"
}
if [ -n "$videos" ]; then
    transformers_in videos 290 --models hunyuan cosmos wan
else
    gna_in "${types[0]}"
    sd_in unet 100 512
    for type in "${types[@]:1}"; do gna_in "$type"; done
    sd_in step 180 512
    sd_in sampler 60 512
    sd_in unet-xl 150 1024
    sd_in vae 60 512
    sd_in text 60 512
    sd_in step-remat 180 512
    transformers_in transformers 300
fi

echo
echo "$SECONDS s; results in $out"
if [ ${#failed[@]} -gt 0 ]; then
    echo "not done: ${failed[*]}"
    exit 1
fi

#!/usr/bin/env bash
# Prepares, on a machine without a GPU, what benchmarks/gpu_acceptance.sh takes along to one with a
# Hopper GPU and no network, so that nothing is compiled there that can be compiled here:
#
#   benchmarks/gpu_prepare.sh [--natten-off]
#
# The folder build/gpu gets the cuda implementation's library, NATTEN's Hopper kernel as a custom call
# (a baseline, not part of the product), programs with the Triton kernels in them, and wheels of what
# that machine's Python lacks.  Last it says what to carry, and how much that is.
#
# Needs nvcc, a package index, Python 3.12, of which .venv-replica is made with that machine's
# versions, and .venv with torch, without which pip does not fetch NATTEN's sources.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=build/gpu most_mib=64
natten=natten-0.21.7
versions=(jax==0.11.2 jaxlib==0.11.2 'flax>=0.12.4,<0.13' jaxtyping==0.3.11 numpy==2.5.2 flatbuffers rich scipy)
alone=(jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 triton==3.6.0)  # without CUDA's libraries
wheels=(jax-triton==0.3.1)
python=.venv-replica/bin/python
pip() { "$1" -m pip --disable-pip-version-check "${@:2}"; }

[ "${1:-}" = --natten-off ] && natten=
mkdir -p $out .cache
stamp=.venv-replica/$(printf '%s\n' "${versions[@]}" "${alone[@]}" "${wheels[@]}" | sha256sum | cut -c 1-16)
if [ ! -e "$stamp" ]; then
    "$(.ci/find-python 3.12)" -m venv .venv-replica
    pip $python install -q "${versions[@]}"
    pip $python install -q --no-deps "${alone[@]}" "${wheels[@]}"
    touch "$stamp"
fi
rm -rf $out/wheels
pip $python download -q --no-deps --only-binary=:all: -d $out/wheels "${wheels[@]}"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
. benchmarks/_rooms.sh "$scratch"
export JAX_PLATFORMS=cpu

echo "== the cuda implementation's library"
rm -rf $out/cache
XDG_CACHE_HOME=$out/cache $python -c '
from conceptax.kernels.gna.cuda import build
print(build.build("gpu", "90a"))'

if [ "$natten" ]; then
    echo "== NATTEN's kernel"
    sources=.cache/$natten-sources
    if [ ! -d $sources ]; then
        pip .venv/bin/python download -q --no-deps --no-build-isolation --no-binary natten \
            -d "$scratch" "${natten/-/==}"
        tar -xzf "$scratch/$natten.tar.gz" -C "$scratch"
        mv "$scratch/$natten" $sources
    fi
    if [ ! $out/natten_hopper.so -nt benchmarks/natten_hopper.cu ]; then
        # Its own options; without NDEBUG the compiler gives up on overlapping wgmma.
        nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC -DNDEBUG --expt-relaxed-constexpr \
            --use_fast_math --extended-lambda -Xcompiler -fno-strict-aliasing \
            -DNATTEN_WITH_CUTLASS -DNATTEN_WITH_HOPPER_FNA=1 -DCUTLASS_ENABLE_TENSOR_CORE_MMA=1 \
            -gencode=arch=compute_90a,code=sm_90a -Xfatbin -compress-all \
            -I$sources/csrc/include -isystem $sources/third_party/cutlass/include \
            -isystem "$($python -c 'import jax; print(jax.ffi.include_dir())')" \
            benchmarks/natten_hopper.cu -o $out/natten_hopper.so
    fi
fi

echo "== programs"
export_programs() { $python benchmarks/gna.py --export $out/exports "$@"; }
export_programs --dtypes bfloat16
export_programs --dtypes float16 --cases FLUX-4K --small 0
find $out/exports -mindepth 1 -maxdepth 1 -type d ! -newer $out/wheels -exec rm -r {} +  # of old sources

tree() { git ls-files -z --cached --others --exclude-standard; find $out -type f -print0; }
kib=$(tree | du -ck --files0-from=- 2>/dev/null | tail -n 1 | cut -f 1)
du -sh $out/* | sed 's/^/   /'
echo "carry $out ($(du -sm $out | cut -f 1) MiB); with the working tree $((kib / 1024)) MiB of $most_mib"
[ $((kib / 1024)) -le $most_mib ]

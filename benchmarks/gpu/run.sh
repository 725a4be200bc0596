#!/usr/bin/env bash
# Tests and measurements on a GPU machine without network; run in the repository's root.
#
#   run.sh WHEELS RESULTS            correctness, steps, short trainings, where the time goes: 9 minutes on an H100
#   run.sh WHEELS RESULTS long       cells per second of training in many settings, and of embedding
#   run.sh WHEELS RESULTS elbo       the same ELBO in every precision; PREPARED=FILE.h5ad for cells of your own
#   run.sh WHEELS RESULTS install    only installs; prints what to export
#
# WHEELS is what pack.sh filled. Every part has a time limit of its own and the next one starts whatever became of it.
# SMALL=1 makes all of it small, to try the script where there is no GPU.
set -uo pipefail

usage="usage: run.sh WHEELS RESULTS [long|elbo|install]"
wheels=${1:?$usage} results=${2:?$usage} what=${3:-first}
case $what in first | long | elbo | install) ;; *) echo "$usage" >&2 && exit 2 ;; esac
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
site=${SITE:-/tmp/census-scvi-site} work=${WORK:-/tmp/census-scvi-work}
[ -f pyproject.toml ] || { echo "run it in the repository's root" >&2 && exit 2; }
mkdir -p "$results" "$work"
results=$(cd -- "$results" && pwd)

# In one call and into an empty folder: packages share folders (`testing`), and a second call would replace them.
if [ ! -f "$site/installed" ]; then
  rm -rf "$site"
  python3 -m pip install -q --no-index --no-deps --no-cache-dir --no-compile --disable-pip-version-check \
    --target "$site" "$wheels"/*.whl || exit 1
  # `import census_scvi` asks for its own version, which an installation would have left behind.
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
  mkdir -p "$site/census_scvi-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: census-scvi\nVersion: %s\n' "$version" \
    >"$site/census_scvi-$version.dist-info/METADATA"
  # cellxgene_census imports s3fs at once, Lightning asks it for a class; nothing here reads from S3.
  python3 -c 'import s3fs' 2>/dev/null || echo 'class S3FileSystem: ...' >"$site/s3fs.py"
  touch "$site/installed"
fi
export PYTHONPATH="$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # where scvi-tools imports jax, it must not take the GPU's memory

part() { # part NAME SECONDS COMMAND...: to the screen and to the end of RESULTS/first.txt, long.txt or elbo.txt
  local name=$1 seconds=$2 started=$SECONDS status=0
  shift 2
  printf '\n== %s\n' "$name" | tee -a "$results/$what.txt"
  timeout -k 10 "$seconds" "$@" 2>&1 | tee -a "$results/$what.txt" || status=$?
  echo "== $name: $((SECONDS - started)) s, exit code $status" | tee -a "$results/$what.txt"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader ||
    echo "no GPU"
  python3 -W ignore - <<'P'
import os, platform
from importlib.metadata import version
import numba, scvi, torch
names = ("torch", "triton", "numpy", "pandas", "scipy", "numba", "lightning", "anndata", "scvi-tools", "jax")
print(f"Python {platform.python_version()}, {os.cpu_count()} cores;", ", ".join(f"{n} {version(n)}" for n in names))
print("CUDA", torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_properties(0))
P
}
export -f machine

n_cells=100000 n_genes=8000 hidden=(512 128) epochs=4 workers=8 rate_cells=200000 elbo_cells=20000 elbo_genes=2000
if [ -n "${SMALL:-}" ]; then
  n_cells=9000 n_genes=300 hidden=(32) epochs=1 workers=2 rate_cells=9000 elbo_cells=2000 elbo_genes=200
fi
measure() { # measure WHAT SECONDS ARGUMENTS...
  part "$1" "$2" python3 "$here/measure.py" "$results" "$1" "${@:3}"
}
made() { # made N: a prepared file of N simulated cells
  local file="$work/cells-$1-$n_genes.h5ad"
  [ -f "$file" ] || measure cells 150 --prepared "$file" --cells "$1" --genes "$n_genes"
}

case $what in
install) echo "export PYTHONPATH=$PYTHONPATH XLA_PYTHON_CLIENT_PREALLOCATE=false" && exit ;;
first)
  part machine 60 bash -c machine
  # Failures of some tests of the CPU kernel are no reason to stop: see README.md.
  part tests 150 env OMP_NUM_THREADS=1 python3 -m pytest tests/test_fast_step.py tests/test_step_graph.py -q -p no:cacheprovider -n "$workers"
  measure check 60
  measure kernel 120
  made "$n_cells"
  measure profile 60 --prepared "$work/cells-$n_cells-$n_genes.h5ad" --hidden "${hidden[@]}"
  part train_step 300 python3 benchmarks/train_step.py --folder "$work" --hidden "${hidden[@]}" --epochs "$epochs" \
    --prepared "$work/cells-$n_cells-$n_genes.h5ad" --repeats 1 --threads 4
  cp "$work/train_step.json" "$results/" 2>/dev/null
  ;;
long)
  made "$rate_cells"
  measure rates 450 --prepared "$work/cells-$rate_cells-$n_genes.h5ad" --hidden "${hidden[@]}"
  measure latent 100 --prepared "$work/cells-$rate_cells-$n_genes.h5ad" --hidden "${hidden[@]}"
  ;;
elbo)
  # Cells that are all different: of repeated ones validation would meet copies of those trained on.
  file=${PREPARED:-$work/elbo.h5ad}
  [ -f "$file" ] || python3 -W ignore -c "
import sys; sys.path.insert(0, 'benchmarks')
from pathlib import Path
from train_step import make_up_cells
make_up_cells(Path('$file'), $elbo_cells, $elbo_genes)"
  part elbo 400 python3 benchmarks/elbo.py "$file" train.accelerator=auto train.batch_size=256 --epochs 20 \
    --seeds 0 1 2 --precision float32 tf32 bf16 fp16
  ;;
esac
echo "results in $results"

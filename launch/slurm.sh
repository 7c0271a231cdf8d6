#!/usr/bin/env bash
# A job on GPU nodes under Slurm: one process a node, with all its GPUs. `--coordinator auto` finds the others.
#
#   launch/slurm.sh --slice h100:2x8 -- sample --mesh 2x8 --checkpoint DIR --prompt …
#   launch/slurm.sh --slice h100:4x8 --time 24:00:00 --restarts 5 -- train --config configs/finetune.py \
#     --config.model.source=Qwen/Qwen3.5-0.8B --config.mesh=32x1 --config.data.batch_size=32 \
#     --config.data.train="('mine.jsonl',)" --workdir DIR
#   launch/slurm.sh --slice h100:8 -- convert SRC DST                            (on one node, with no GPU)
#
# --partition P  --account A  --time T  --name NAME  --restarts N (after a failure; what Slurm requeues after preemption counts too)
# --python PYTHON (of an environment with the package and its extra cuda, on a file system that the nodes share)
# --dry_run prints what would be submitted. Run it in the checkout, on a file system that the nodes share.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

name=qwen35_jax slice='' restarts=0 dry=no python=python3 more=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --name | --slice | --restarts | --python | --partition | --account | --time)
      [ $# -gt 1 ] || fail "$1 needs a value"
      case "$1" in
        --partition | --account | --time) more+=("$1" "$2") ;;
        *) printf -v "${1#--}" '%s' "$2" ;;
      esac
      shift
      ;;
    --dry_run) dry=yes ;;
    *) fail "unknown option $1; the job comes behind --, see the first lines of $0" ;;
  esac
  shift
done
[ $# -gt 1 ] || fail "the job is missing: -- sample|convert|train FLAG..."
shift
[ -n "$slice" ] || fail "--slice is missing"
[[ $slice == h[12]00* ]] || fail "--slice $slice: GPU nodes are h100:2x8 or h200:2x8; for TPUs see launch/tpu_vm.sh and launch/gke"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts $restarts: give a number"
[ -f setup.py ] || fail "run this in the checkout of qwen35_jax"
[ "$dry" = yes ] || command -v sbatch >/dev/null || fail "there is no sbatch here: run this where Slurm takes jobs"

"$python" -c 'import qwen35_jax.sharding' 2>/dev/null || fail "$python has no qwen35_jax: install it (pip install -e .), or name one with --python"
plan=$("$python" -m launch.job "$slice" "$@") || exit 1
{ read -r hosts && read -r gpus && read -r _ && read -r _ && read -r variables && { IFS= read -rd '' command || true; }; } <<<"$plan"
command=${command%$'\n'} # the rest: a prompt may have several lines
[ "$1" != convert ] || hosts=1 gpus=0

submit=(sbatch --job-name "$name" --nodes "$hosts" --ntasks-per-node 1 --exclusive --mem 0 --requeue --open-mode append
  --signal TERM@120) # a training run saves its state two minutes before its time is up
[ "$gpus" = 0 ] || submit+=(--gpus-per-node "$gpus")
submit+=("${more[@]}")

batch="#!/usr/bin/env bash${variables:+
export $variables}
# kill-on-bad-exit: where one process ends badly, so do the others.
srun --kill-on-bad-exit=1 $(printf %q "$python") ${command#python }
status=\$?
if [ \$status != 0 ] && [ \"\${SLURM_RESTART_COUNT:-0}\" -lt $restarts ]; then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$status"

if [ "$dry" = yes ]; then
  printf '%q ' "${submit[@]}" | sed 's/ $//'
  printf " <<'END'\n%s\nEND\n" "$batch"
else
  "${submit[@]}" <<<"$batch"
fi

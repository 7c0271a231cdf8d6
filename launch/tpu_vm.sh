#!/usr/bin/env bash
# A job on a slice of TPU VMs: makes the slice, copies this checkout to its hosts, runs the same command on all, deletes it.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE --slice v5p:4x4x4 -- sample --mesh 16x4 --checkpoint gs://… --prompt …
#   launch/tpu_vm.sh --name NAME --zone ZONE --slice v6e:4x4 --spot --restarts 5 -- train --config configs/finetune.py \
#     --config.model.source=Qwen/Qwen3.5-0.8B --config.mesh=16x1 --config.data.batch_size=16 \
#     --config.data.train="('gs://…/mine.jsonl',)" --workdir gs://…
#   launch/tpu_vm.sh --name NAME --zone ZONE --slice v6e:2x2 -- convert gs://… gs://…       (on the first host alone)
#
# --project P  --spot  --restarts N (the slice is made again: it may have been taken away)  --python PYTHON (here)
# A v5p slice of another shape than the most compact of its number of chips is asked for by --type and --topology.
# --keep: the slice stays.  --existing: it is there, and stays.  --dry_run prints what would be run.
# Needs gcloud and git, and the package in the Python here. Run it in the checkout: its files go to the hosts, but for ignored ones.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

name='' zone='' slice='' project='' restarts=0 spot=no keep=no existing=no dry=no python=python3
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --name | --zone | --slice | --project | --restarts | --python)
      [ $# -gt 1 ] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --spot) spot=yes ;;
    --keep) keep=yes ;;
    --existing) existing=yes keep=yes ;;
    --dry_run) dry=yes ;;
    *) fail "unknown option $1; the job comes behind --, see the first lines of $0" ;;
  esac
  shift
done
[ $# -gt 1 ] || fail "the job is missing: -- sample|convert|train FLAG..."
shift
for option in name zone slice; do
  [ -n "${!option}" ] || fail "--$option is missing"
done
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts $restarts: give a number"
[ "$existing$spot" != yesyes ] || fail "--spot is for a slice that is made: leave out --existing"
[ -f setup.py ] || fail "run this in the checkout of qwen35_jax"
[ "$dry" = yes ] || command -v gcloud >/dev/null || fail "there is no gcloud here: install Google Cloud's command line tools"

"$python" -c 'import qwen35_jax.sharding' 2>/dev/null || fail "$python has no qwen35_jax: install it (pip install -e .), or name one with --python"
plan=$("$python" -m launch.job "$slice" "$@") || exit 1
{ read -r hosts && read -r _ && read -ra type && read -r runtime && read -r variables && { IFS= read -rd '' command || true; }; } <<<"$plan"
command=${command%$'\n'} # the rest: a prompt may have several lines
[ -n "${type[*]}" ] || fail "$slice: there are no TPU VMs of it; see launch/gke and launch/slurm.sh"

where=("--zone" "$zone")
[ -z "$project" ] || where+=("--project" "$project")
create=(gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${type[@]}" --version "$runtime")
[ "$spot" = no ] || create+=(--spot)
delete=(gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet)
ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}")
workers=all
[ "$1" != convert ] || workers=0
archive=${TMPDIR:-/tmp}/$name.tar.gz
# What git tracks and is not there, deleted and not committed, is left out.
pack=(bash -o pipefail -c "git ls-files -z --cached --others --exclude-standard |
while IFS= read -rd '' f; do if [ -e \"\$f\" ] || [ -L \"\$f\" ]; then printf '%s\\0' \"\$f\"; fi; done |
tar --null --files-from - -czf $(printf %q "$archive")")
copy=(gcloud compute tpus tpu-vm scp "$archive" "$name:qwen35_jax.tar.gz" "${where[@]}" --worker "$workers")
# uv brings a Python that is new enough where the host has none.
install="mkdir -p qwen35_jax && tar -xzf qwen35_jax.tar.gz -C qwen35_jax && cd qwen35_jax &&
python3 -m pip install -q uv && python3 -m uv venv -q --allow-existing --python '>=3.11' .venv &&
python3 -m uv pip install -q --python .venv/bin/python -e '.[tpu]'"
work="cd qwen35_jax && export PATH=\$PWD/.venv/bin:\$PATH${variables:+ $variables} && exec $command"

run() { # run WORD...: or prints it, so that it can be pasted
  if [ "$dry" = yes ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

attempt() {
  if [ "$existing" = no ]; then
    run "${create[@]}" || return
  fi
  run "${copy[@]}" && run "${ssh[@]}" --worker "$workers" --command "$install" &&
    run "${ssh[@]}" --worker "$workers" --command "$work"
}

stopped() { # a slice costs money until it is deleted
  [ "$keep" = yes ] || run "${delete[@]}" || true
  exit 130
}

[ "$dry" = no ] || echo "# $slice: $hosts hosts, restarts: $restarts"
if [ "$existing$dry" = nono ]; then
  ! gcloud compute tpus tpu-vm describe "$name" "${where[@]}" >/dev/null 2>&1 ||
    fail "$name is there already: --existing uses it, or give another --name"
  trap stopped INT TERM HUP
fi
run "${pack[@]}" || fail "this checkout was not packed; no slice was made"
for ((try = 0; ; try++)); do
  status=0
  attempt || status=$?
  if [ "$keep" = no ] || { [ "$existing" = no ] && [ "$status" != 0 ] && [ "$try" -lt "$restarts" ]; }; then
    run "${delete[@]}" || true # one that was taken away may be gone
  fi
  [ "$status" != 0 ] || exit 0
  [ "$try" -lt "$restarts" ] || fail "the job ended with status $status"
  echo "restart $((try + 1)) of $restarts: the job ended with status $status" >&2
done

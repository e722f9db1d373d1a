#!/usr/bin/env bash
# Submits a training to a GKE cluster that xpk has created, on one or more TPU slices.
#
#   launch/cluster/xpk.sh --cluster=my-cluster --project=my-project --zone=us-west4-a \
#       --config=configs/cifar10_plain.py:depth=110,method=paper --workdir=gs://my-bucket/plain110
#
# It exports the commit HEAD, nothing else, and hands it to `xpk workload create`, which puts it on
# top of the base image, pushes that, and runs the command on every host. There the project is
# installed first; with --docker-image the image must hold the installed project already, with the
# repository as its working directory.
#
# By itself xpk restarts after the exit codes 42 and 127 to 255, among them 143 (preempted, with the
# state saved); 1 (a crash) is added here, and 2 (bad input) ends the workload. Nothing else is
# created, deleted or waited for: see `xpk workload list` and `xpk workload delete`.
#
# Options:
#   --cluster=NAME                required
#   --config=FILE[:ARGUMENTS]     of launch/train.py; required
#   --workdir=DIR                 of launch/train.py; required: gs://… or a directory in a --storage
#   --project=ID --zone=ZONE      by default gcloud's own
#   --name=NAME                   of the workload (orthojax)
#   --tpu-type=TYPE               (v5litepod-16)
#   --num-slices=N                (1)
#   --storage=NAME                a file system known to the cluster by `xpk storage attach`
#   --max-restarts=N              (50)
#   --base-docker-image=IMAGE     any with Python 3.11 or newer (python:3.12)
#   --docker-image=IMAGE          runs as it is, instead of the above
#   --dry-run                     prints every command and runs none
#   -- ARGUMENT…                  more arguments for launch/train.py
#
# Documentation:
#   https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md
#   https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/docker.md
#   https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/storage.md
#   https://github.com/AI-Hypercomputer/xpk/blob/main/src/xpk/parser/workload.py   every flag
#
# The authors have not run the cloud part of this script: only its dry run, shellcheck, and tests
# with a stand-in for xpk.

set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

name=orthojax cluster="" config="" workdir="" tpu_type=v5litepod-16 num_slices=1 max_restarts=50
base_docker_image=python:3.12 docker_image="" dry_run=false
passed_on=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --tpu-type=*) tpu_type=${1#*=} ;;
    --num-slices=*) num_slices=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --base-docker-image=*) base_docker_image=${1#*=} ;;
    --docker-image=*) docker_image=${1#*=} ;;
    --project=* | --zone=* | --storage=*) passed_on+=("$1") ;;
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --) shift && break ;;
    *) fail "unknown option $1; options are --name=value, see --help" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name: lower-case letters, digits and -"
[[ -n $cluster && -n $config && -n $workdir ]] || fail "--cluster, --config, --workdir are required"

quote() { # the words as a shell reads them back
  local word separator=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@+-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

run() {
  if $dry_run; then quote "$@" && echo; else "$@"; fi
}

# exec, so that xpk's SIGTERM reaches Python and not a shell in between.
train="exec $(quote python3 launch/train.py --distributed "--config=$config" \
  "--workdir=$workdir" "$@")"
workload=(xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$tpu_type"
  "--num-slices=$num_slices" "--max-restarts=$max_restarts" --restart-on-exit-codes=1
  --termination-grace-period-seconds=120)
if ((${#passed_on[@]})); then workload+=("${passed_on[@]}"); fi

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -n $docker_image ]]; then
  run "${workload[@]}" "--docker-image=$docker_image" "--command=$train"
else
  source=build/xpk-$name
  run rm -rf "$source"
  run mkdir -p "$source"
  run git archive --format=tar "--output=$source.tar" HEAD
  run tar -xf "$source.tar" -C "$source"
  run "${workload[@]}" "--base-docker-image=$base_docker_image" "--script-dir=$source" \
    "--command=pip install '.[train,tpu,gcs]' && $train"
fi

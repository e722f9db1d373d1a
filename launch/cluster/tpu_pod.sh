#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, through preemptions, until the training is finished.
#
#   launch/cluster/tpu_pod.sh --project=my-project --zone=europe-west4-b --spot \
#       --config=configs/cifar10_plain.py:depth=110,method=paper --workdir=gs://my-bucket/plain110 \
#       --setup='pip install ".[prepare]" && python3 launch/prepare_data.py cifar10'
#
# It creates a queued resource, or takes the one of that name, and waits until it is ACTIVE; copies
# the commit HEAD there, nothing else, and installs it with the extras `tpu` and `gcs` into a Python
# of its own, since that of the image may be too old; starts `launch/train.py --distributed` on
# every host and shows what it prints. Then, by the exit code of the training:
#
#   0     done; the TPU stays, until --delete
#   2     bad input: no restart
#   143   preempted, with the state saved: the TPU is deleted and created again
#   else  once more on the same TPU, or on a new one if its state says that it is gone
#
# The training does not hang on this terminal: after Ctrl-C or a lost connection the same command
# attaches to it again.
#
# Options:
#   --project=ID --zone=ZONE      where; required
#   --config=FILE[:ARGUMENTS]     of launch/train.py; required
#   --workdir=DIR                 of launch/train.py; required: gs://… or a directory that all hosts
#                                 have mounted. One on the TPU VM itself is lost with it
#   --name=NAME                   of the TPU (orthojax)
#   --accelerator-type=TYPE       v5litepod-16, v6e-16, v5p-32, … (v5litepod-16)
#   --runtime-version=VERSION     by default that which is documented for the type
#   --spot                        may be preempted and is cheaper; on demand without it
#   --tpu-vm                      a plain TPU VM, which is there at once or fails, and no queue
#   --setup=COMMAND               runs on every host after the installation: prepare data, mount, …
#   --max-restarts=N              (10)
#   --poll=SECONDS                between two looks at the state (30)
#   --delete                      deletes the TPU and does nothing else
#   --dry-run                     prints every command and runs none
#   -- ARGUMENT…                  more arguments for launch/train.py
#
# Needs the Google Cloud CLI, logged in; for several hosts also its key in the agent:
# `ssh-add ~/.ssh/google_compute_engine`.
#
# Documentation:
#   https://docs.cloud.google.com/tpu/docs/queued-resources       states, create, delete --force
#   https://docs.cloud.google.com/tpu/docs/runtimes               runtime versions
#   https://docs.cloud.google.com/tpu/docs/jax-pods               ssh --worker=all --command
#   https://docs.cloud.google.com/tpu/docs/managing-tpus-tpu-vm   plain TPU VMs
#   https://docs.cloud.google.com/tpu/docs/preemptible            READY becomes PREEMPTED
#   https://docs.astral.sh/uv/getting-started/installation/       a newer Python
#
# The authors have not run the cloud part of this script: only its dry run, shellcheck, and tests
# with a stand-in for gcloud.

set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

name=orthojax project="" zone="" accelerator_type=v5litepod-16 runtime_version="" config=""
workdir="" setup=: max_restarts=10 poll=30 spot=false queued=true delete_only=false dry_run=false
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --accelerator-type=*) accelerator_type=${1#*=} ;;
    --runtime-version=*) runtime_version=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --spot) spot=true ;;
    --tpu-vm) queued=false ;;
    --delete) delete_only=true ;;
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --) shift && break ;;
    *) fail "unknown option $1; options are --name=value, see --help" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name: lower-case letters, digits and -"
[[ -n $project && -n $zone ]] || fail "--project and --zone are required"
$delete_only || [[ -n $config && -n $workdir ]] || fail "--config and --workdir are required"

if [[ -z $runtime_version ]]; then
  case $accelerator_type in
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    *) runtime_version=tpu-ubuntu2204-base ;;
  esac
fi

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

# Commands are shown on descriptor 3, because some are run for what they print.
if $dry_run; then exec 3>&1; else exec 3>&2; fi
run() {
  quote "$@" >&3
  echo >&3
  $dry_run || "$@"
}

where=("--project=$project" "--zone=$zone")
if $queued; then
  ready=ACTIVE
  create=(gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name"
    "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version")
  describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    "--format=value(state.state)" --verbosity=error)
  delete=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
else
  ready=READY
  create=(gcloud compute tpus tpu-vm create "$name" "${where[@]}"
    "--accelerator-type=$accelerator_type" "--version=$runtime_version")
  describe=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}"
    "--format=value(state)" --verbosity=error)
  delete=(gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet)
fi
if $spot; then create+=(--spot); fi
archive=build/$name.tar.gz
copy=(gcloud compute tpus tpu-vm scp "$archive" "$name:orthojax.tar.gz" "${where[@]}" --worker=all)
on_all_hosts=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all)

if $delete_only; then
  run "${delete[@]}"
  exit
fi

# What the hosts execute. gcloud repeats a command whose connection broke, so both must bear it.
# shellcheck disable=SC2016 # expanded there, not here
alive='kill -0 "$(cat train.pid 2> /dev/null)" 2> /dev/null'
install="set -e; mkdir -p orthojax; cd orthojax; if $alive; then exit; fi; \
tar -xzf ../orthojax.tar.gz; curl -LsSf https://astral.sh/uv/install.sh | sh; \
~/.local/bin/uv venv --clear --seed --python=3.12 .venv; . .venv/bin/activate; \
pip install '.[train,tpu,gcs]'; $setup"
train=$(quote python3 launch/train.py --distributed "--config=$config" "--workdir=$workdir" "$@")
detached=". .venv/bin/activate; export PYTHONUNBUFFERED=1; trap : TERM; $train; \
echo \$? > train.status"
follow="cd orthojax; if ! $alive; then rm -f train.status; \
nohup bash -c $(quote "$detached") > train.log 2>&1 < /dev/null & echo \$! > train.pid; fi; \
tail -n 100 --pid=\"\$(cat train.pid)\" -F train.log; exit \"\$(cat train.status || echo 1)\""

created=false installed=false restarts=0 status=1

tpu_state() { # ABSENT, or what the service says
  local answer tries
  if $dry_run; then
    run "${describe[@]}"
    if $created; then echo "$ready"; else echo ABSENT; fi
    return
  fi
  for tries in 1 2 3 4 5; do
    answer=$("${describe[@]}" 2>&1) && echo "$answer" && return
    [[ $answer == *NOT_FOUND* ]] && echo ABSENT && return
    echo "$answer" >&2
    sleep "$poll"
  done
  echo "error: asked $tries times for the state of $name" >&2
  return 1
}

spend_restart() {
  if ((restarts >= max_restarts)); then
    echo "giving up after $restarts restarts; exit code $status" >&2
    exit "$status"
  fi
  restarts=$((restarts + 1))
}

remove() {
  created=false installed=false
  run "${delete[@]}" || true # it may be going already
}

wait_until_ready() {
  local state
  while state=$(tpu_state) || exit 1; [[ $state != "$ready" ]]; do
    case $state in
      ABSENT)
        run "${create[@]}"
        created=true
        if $dry_run; then echo "# until it is $ready:" >&3; fi
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
        echo "$name is $state" >&2
        if $created; then spend_restart; fi # a leftover of before costs nothing
        remove
        ;;
      *)
        echo "$name is $state" >&2
        sleep "$poll"
        ;;
    esac
  done
}

set_up() {
  run "${copy[@]}" && run "${on_all_hosts[@]}" "--command=$install" && installed=true
}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
$dry_run || git diff --quiet HEAD || echo "note: uncommitted changes do not travel" >&2
trap 'echo "the training goes on; the same command attaches to it again" >&2; exit 130' INT
run mkdir -p build
run git archive --format=tar.gz "--output=$archive" HEAD
while :; do
  wait_until_ready
  if $installed || set_up; then
    run "${on_all_hosts[@]}" "--command=$follow" && status=0 || status=$?
  else
    status=1
  fi
  if $dry_run; then
    echo "# After exit code 143, and then all from the first look at the state, at most" \
      "$max_restarts times:" >&3
    remove
    exit
  fi
  case $status in
    0)
      echo "finished. $name is still there, and costs: --delete" >&2
      exit
      ;;
    2) exit 2 ;;
  esac
  spend_restart
  echo "exit code $status: restart $restarts of $max_restarts" >&2
  # Said by the training before the state says it.
  if ((status == 143)); then remove; fi
done

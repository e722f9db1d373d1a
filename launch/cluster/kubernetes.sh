#!/usr/bin/env bash
# Fills in launch/cluster/kubernetes.yaml and applies it.
#
#   launch/cluster/kubernetes.sh --image=europe-docker.pkg.dev/my-project/images/orthojax:1 \
#       --config=configs/cifar10_plain.py:depth=110,method=paper --workdir=gs://my-bucket/plain110
#   kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=orthojax
#
# Options:
#   --image=IMAGE                 required; what must be in it: launch/cluster/kubernetes.yaml
#   --config=FILE[:ARGUMENTS]     of launch/train.py; required
#   --workdir=DIR                 of launch/train.py; required: gs://… or in a volume you mount
#   --name=NAME                   of the JobSet (orthojax)
#   --dry-run                     prints the manifest and the command that would read it, as YAML that
#                                 can be piped: … --dry-run | kubectl apply --dry-run=client -f -
#   -- ARGUMENT…                  more arguments for launch/train.py
#
# Documentation: https://kubernetes.io/docs/reference/kubectl/generated/kubectl_apply/, and see
# launch/cluster/kubernetes.yaml for accelerators, restarts and storage.
#
# The authors have not run this against a cluster: only its dry run, shellcheck, and tests with a
# stand-in for kubectl.

set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

name=orthojax image="" config="" workdir="" dry_run=false
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --dry-run) dry_run=true ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    --) shift && break ;;
    *) fail "unknown option $1; options are --name=value, see --help" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name: lower-case letters, digits and -"
[[ -n $image && -n $config && -n $workdir ]] || fail "--image, --config, --workdir are required"

# shellcheck disable=SC2016 # no expansion here
quote() { # a YAML string; Kubernetes would expand $(NAME) in arguments, and takes $$( for $(
  printf %s "$1" | sed -e "s/'/''/g" -e 's/\$(/$$(/g' -e "s/^/'/" -e "s/\$/'/"
}

manifest() {
  local line argument
  while IFS= read -r line; do
    case $line in
      "#"*) continue ;;
      "  name: "*) line="  name: $name" ;;
      *"image: "*) line="${line%%image: *}image: $(quote "$image")" ;;
      *"- --config="*) line="${line%%- --*}- $(quote "--config=$config")" ;;
      *"- --workdir="*)
        for argument in "--workdir=$workdir" "$@"; do
          printf '%s- %s\n' "${line%%- --*}" "$(quote "$argument")"
        done
        continue
        ;;
    esac
    printf '%s\n' "$line"
  done < "$(dirname "${BASH_SOURCE[0]}")/kubernetes.yaml"
}

if $dry_run; then
  echo "# The input of: kubectl apply -f -"
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
fi

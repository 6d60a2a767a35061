#!/usr/bin/env bash
# A TPU slice on Cloud TPU VMs, as a queued resource:
#
#   launch/tpu_vm.sh [OPTIONS] create              ask for the slice
#   launch/tpu_vm.sh [OPTIONS] status              of the request, and of the command on each worker
#   launch/tpu_vm.sh [OPTIONS] setup               copy HEAD to all workers and install it
#   launch/tpu_vm.sh [OPTIONS] run COMMAND...      on all workers, detached; one at a time
#   launch/tpu_vm.sh [OPTIONS] logs [WORKER]       follow the log of a worker (0)
#   launch/tpu_vm.sh [OPTIONS] stop                SIGTERM: training saves and exits with 0
#   launch/tpu_vm.sh [OPTIONS] delete              give the slice back
#
# Options, each with the variable that is its default:
#
#   --name          TPU_NAME          of request and slice (puma)
#   --project       TPU_PROJECT       gcloud's own by default
#   --zone          TPU_ZONE          gcloud's own by default
#   --accelerator   TPU_ACCELERATOR   v5litepod-16
#   --runtime       TPU_RUNTIME       what goes with the accelerator
#   --share         TPU_SHARE         NFS export HOST:/PATH, mounted by setup at /mnt/share
#   --spot          TPU_SPOT=1        cheaper; can be taken away
#   --dry-run                         print the commands and run none
set -euo pipefail

stop() {
    echo "error: $*" >&2
    exit 2
}

name=${TPU_NAME:-puma}
project=${TPU_PROJECT-}
zone=${TPU_ZONE-}
accelerator=${TPU_ACCELERATOR:-v5litepod-16}
runtime=${TPU_RUNTIME-}
share=${TPU_SHARE-}
spot=${TPU_SPOT-}
spot=${spot#0}
dry=
while [[ ${1-} == --* ]]; do
    option=${1%%=*}
    case $option in
        --spot) spot=1 ;;
        --dry-run) dry=1 ;;
        --name | --project | --zone | --accelerator | --runtime | --share)
            if [[ $1 == *=* ]]; then
                value=${1#*=}
            else
                (($# > 1)) || stop "$option needs a value"
                value=$2
                shift
            fi
            printf -v "${option#--}" %s "$value"
            ;;
        *) stop "$option is not an option of $0: its first lines list them" ;;
    esac
    shift
done
if [[ ! $runtime ]]; then
    case $accelerator in
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v[234]-*) runtime=tpu-ubuntu2204-base ;;
        *) stop "accelerator \"$accelerator\" is not v2 to v6e, such as v5litepod-16: give --runtime" ;;
    esac
fi
where=()
[[ $zone ]] && where+=("--zone=$zone")
[[ $project ]] && where+=("--project=$project")
[[ $dry ]] || command -v gcloud >/dev/null || stop "there is no gcloud: install the Google Cloud CLI"

run() {
    if [[ $dry ]]; then
        printf '%q ' "$@" | sed 's/ $/\n/'
    else
        "$@"
    fi
}

on() { # WORKER COMMAND: one string, for the shell there
    run gcloud compute tpus tpu-vm ssh "$name" ${where[@]+"${where[@]}"} "--worker=$1" "--command=$2"
}

queue() {
    local verb=$1
    shift
    run gcloud compute tpus queued-resources "$verb" "$name" ${where[@]+"${where[@]}"} "$@"
}

top=$(cd "$(dirname "$0")/.." && pwd)
verb=${1-}
shift || true
[[ $verb == run ]] || (($# == 0)) || [[ $verb == logs && $# == 1 ]] ||
    stop "$verb takes no \"$1\": options come before it"
case $verb in
    create)
        queue create "--node-id=$name" "--accelerator-type=$accelerator" \
            "--runtime-version=$runtime" ${spot:+--spot}
        ;;
    status)
        state=$(queue describe "--format=value(state.state)")
        echo "$state"
        if [[ $dry || $state == ACTIVE ]]; then
            on all "puma_jax/launch/detached.sh status"
        fi
        ;;
    setup)
        archive=${TMPDIR:-/tmp}/puma_jax-$name.tar.gz
        run git -C "$top" archive --format=tar.gz --prefix=puma_jax/ "--output=$archive" HEAD
        run gcloud compute tpus tpu-vm scp "$archive" "$name:puma_jax.tar.gz" \
            ${where[@]+"${where[@]}"} --worker=all
        # The images have Python 3.10. Files are written over the old ones, and runs stay.
        on all "tar -xzf puma_jax.tar.gz && python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --allow-existing --python 3.12 venv && \
python3 -m uv pip install --quiet --python venv/bin/python --editable './puma_jax[tpu]'"
        if [[ $share ]]; then
            on all "sudo apt-get install -qq -y nfs-common && sudo mkdir -p /mnt/share && \
(mountpoint -q /mnt/share || sudo mount -t nfs $(printf %q "$share") /mnt/share)"
        fi
        ;;
    run)
        (($#)) || stop "no command given, expected: $0 run python -m puma_jax.train ..."
        mapfile -t settings < <(grep -v -e '^#' -e '^$' "$top/launch/env/tpu.env")
        command=$(printf '%q ' env "${settings[@]}" "$@" --distributed.auto)
        # shellcheck disable=SC2016 # HOME and PATH are those of the worker
        on all 'PATH=$HOME/venv/bin:$PATH puma_jax/launch/detached.sh start '"${command% }"
        ;;
    logs) on "${1:-0}" "tail -n 100 -F puma_jax-run/log" ;;
    stop) on all "puma_jax/launch/detached.sh stop" ;;
    delete) queue delete --force ;;
    *) stop "\"$verb\" is not create, status, setup, run, logs, stop or delete" ;;
esac

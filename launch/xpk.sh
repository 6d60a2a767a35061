#!/usr/bin/env bash
# Submits a command to a GKE cluster that xpk (1.16) made, on one TPU slice:
#
#   launch/xpk.sh [OPTIONS] python -m puma_jax.train --config ...
#
# What "xpk storage attach --auto-mount=true" has put into the cluster is there for it to write to.
# Options, each with the variable that is its default:
#
#   --workload       XPK_WORKLOAD       name of the run (puma)
#   --cluster        XPK_CLUSTER        required
#   --image          XPK_IMAGE          built from Dockerfile.tpu with RUN_AS=0; required
#   --tpu-type       XPK_TPU_TYPE       v5litepod-16
#   --project        XPK_PROJECT        gcloud's own by default
#   --zone           XPK_ZONE           gcloud's own by default
#   --max-restarts   XPK_MAX_RESTARTS   after preemption or a failure (20)
#   --dry-run                           print the command and run nothing
set -euo pipefail

stop() {
    echo "error: $*" >&2
    exit 2
}

workload=${XPK_WORKLOAD:-puma}
cluster=${XPK_CLUSTER-}
image=${XPK_IMAGE-}
tpu_type=${XPK_TPU_TYPE:-v5litepod-16}
project=${XPK_PROJECT-}
zone=${XPK_ZONE-}
max_restarts=${XPK_MAX_RESTARTS:-20}
dry=
while [[ ${1-} == --* ]]; do
    option=${1%%=*}
    case $option in
        --dry-run) dry=1 ;;
        --workload | --cluster | --image | --tpu-type | --project | --zone | --max-restarts)
            if [[ $1 == *=* ]]; then
                value=${1#*=}
            else
                (($# > 1)) || stop "$option needs a value"
                value=$2
                shift
            fi
            variable=${option#--}
            printf -v "${variable//-/_}" %s "$value"
            ;;
        *) stop "$option is not an option of $0: its first lines list them" ;;
    esac
    shift
done
[[ $cluster ]] || stop "no cluster given: --cluster or XPK_CLUSTER"
[[ $image ]] || stop "no image given: --image or XPK_IMAGE"
(($#)) || stop "no command given, expected: $0 python -m puma_jax.train ..."
[[ $dry ]] || command -v xpk >/dev/null || stop "there is no xpk: pip install xpk"

# exec: xpk sends SIGTERM to the shell that it starts, which would not pass it on. The entry point
# ends with 143 after it, with which xpk starts the run again, as after a crash; so it does after 1,
# which is what the loss of a host looks like on the other hosts. 2, a wrong setting, is final.
command=$(printf '%q ' exec launch/entrypoint.sh "$@" --distributed.auto)
submit=(xpk workload create "--workload=$workload" "--cluster=$cluster" ${project:+"--project=$project"}
    ${zone:+"--zone=$zone"} "--tpu-type=$tpu_type" --num-slices=1 "--docker-image=$image"
    "--env-file=$(dirname "$0")/env/tpu.env" "--max-restarts=$max_restarts"
    --restart-on-exit-codes=1 --termination-grace-period-seconds=300 "--command=${command% }")
if [[ $dry ]]; then
    printf '%q ' "${submit[@]}" | sed 's/ $/\n/'
else
    exec "${submit[@]}"
fi

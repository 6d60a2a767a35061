#!/usr/bin/env bash
# Runs a command in several processes on this machine, each told which one it is:
#
#   launch/local_multiprocess.sh [--dry-run] N python -m puma_jax.train --config ...
#
# GPUs are dealt out evenly. Output is prefixed with the number of its process. SIGTERM and Ctrl-C go
# to all. When one fails the others are ended, and its exit code is that of the whole.
#
#   PORT      where process 0 listens; by default one made of this script's process id
#   GRACE_S   seconds from SIGTERM to SIGKILL after a failure (10): the others may be waiting for the
#             dead one, and then never get to see the signal
set -um # -m: each process is the head of its own group, and Ctrl-C reaches it once, from here

stop() {
    echo "error: $*" >&2
    exit 2
}

dry=
[[ ${1-} == --dry-run ]] && dry=1 && shift
[[ ${1-} =~ ^[1-9][0-9]*$ ]] || stop "N is \"${1-}\", expected a number of processes: $0 N COMMAND..."
count=$1
shift
(($#)) || stop "no command given, expected: $0 N COMMAND..."
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) ||
    stop "bash is $BASH_VERSION, expected 5.1 or newer for wait -p: install a newer one"

gpus=()
if [[ ${JAX_PLATFORMS-} != cpu* ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
    fi
fi
((${#gpus[@]} % count == 0)) ||
    stop "${#gpus[@]} GPUs cannot be dealt out to $count processes: choose N, or CUDA_VISIBLE_DEVICES"
share=$((${#gpus[@]} / count))
port=${PORT:-$((20000 + $$ % 10000))}

pids=()
printers=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT
for ((number = 0; number < count; number++)); do
    mine=("$@" --distributed.coordinator "localhost:$port"
        --distributed.processes "$count" --distributed.process "$number")
    if ((share)); then
        visible=$(IFS=, && echo "${gpus[*]:number * share:share}")
        mine=(env "CUDA_VISIBLE_DEVICES=$visible" "${mine[@]}")
    fi
    if [[ $dry ]]; then
        printf '%q ' "${mine[@]}" | sed 's/ $/\n/'
        continue
    fi
    # signals for all must not end the printers before the last words are out
    exec {out}> >(trap '' INT TERM && exec sed -u "s/^/[$number] /")
    printers+=("$!")
    exec {err}> >(trap '' INT TERM && exec sed -u "s/^/[$number] /" >&2)
    printers+=("$!")
    "${mine[@]}" >&"$out" 2>&"$err" {out}>&- {err}>&- </dev/null &
    pids+=("$!")
    exec {out}>&- {err}>&-
done
[[ $dry ]] && exit 0

result=0
killer=
numbers=("${pids[@]}")
while ((${#pids[@]})); do
    ended=
    wait -n -p ended "${pids[@]}"
    code=$?
    [[ ${ended-} ]] || continue # it was a signal, passed on by now
    left=()
    for pid in "${pids[@]}"; do
        [[ $pid == "$ended" ]] || left+=("$pid")
    done
    pids=("${left[@]}")
    if ((code && !result)); then
        result=$code
        for ((number = 0; number < count; number++)); do
            [[ ${numbers[number]} == "$ended" ]] && echo "process $number failed with $code" >&2
        done
        if ((${#pids[@]})); then
            # a second for their own last words
            (sleep 1 && kill -TERM "${pids[@]}" && sleep "${GRACE_S:-10}" &&
                for pid in "${pids[@]}"; do kill -KILL -- "-$pid"; done) 2>/dev/null &
            killer=$!
            disown # without a notice of its end
        fi
    fi
done
[[ $killer ]] && kill -TERM -- "-$killer" 2>/dev/null
# children that a process left behind would hold its output open
for pid in "${numbers[@]}"; do
    kill -KILL -- "-$pid" 2>/dev/null
done
wait "${printers[@]}"
exit "$result"

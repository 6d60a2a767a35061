#!/usr/bin/env bash
# Runs one command on this host that outlives the connection it was started from:
#
#   detached.sh start COMMAND...   from the top of the repository; the log is appended to
#   detached.sh stop               SIGTERM: training saves and exits with 0
#   detached.sh status             what runs, or the last line of the log
#
#   RUN_DIR   where log and pid are (~/puma_jax-run)
#
# The file pid holds the number of the process, when it was started and in which boot of which host:
# numbers are used again, and a folder may be shared by hosts.
set -u

folder=${RUN_DIR:-$HOME/puma_jax-run}

# Prints when a process was started, in clock ticks of a boot; fails if it has ended.
identity() {
    local stat fields
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    read -ra fields <<<"${stat##*) }"
    # one that has ended, but that no one has asked after, is still there as a zombie
    [[ ${fields[0]-} =~ ^[^ZX]$ ]] && echo "${fields[19]} $(</proc/sys/kernel/random/boot_id)"
}

# Whether a process runs the script that `start` starts.
ours() {
    tr '\0' '\n' <"/proc/$1/cmdline" 2>/dev/null | grep -q -x -F launch/entrypoint.sh
}

# Whether what was started still runs; sets pid.
running() {
    local since
    [[ -f $folder/pid ]] && read -r pid since <"$folder/pid" && [[ $pid =~ ^[1-9][0-9]*$ ]] &&
        [[ $since == "$(identity "$pid")" ]] && ours "$pid"
}

case ${1-} in
    start)
        shift
        if running; then
            echo "error: process $pid still runs on $(hostname): stop it first" >&2
            exit 2
        fi
        cd "$(dirname "$0")/.." && mkdir -p "$folder" || exit 1
        # a session of its own: the end of the connection is not its end
        nohup setsid launch/entrypoint.sh "$@" >>"$folder/log" 2>&1 </dev/null &
        pid=$!
        echo "$pid $(identity "$pid")" >"$folder/pid"
        # until then it is still this script, or one of the two commands before it
        until ours "$pid" || ! identity "$pid" >/dev/null; do sleep 0.02; done
        echo "$(hostname): started, the log is $folder/log"
        ;;
    stop)
        if running; then
            kill -TERM "$pid" && echo "$(hostname): asked to stop"
        else
            echo "$(hostname): nothing runs"
        fi
        ;;
    status)
        if running; then
            echo "$(hostname): process $pid runs"
        else
            echo "$(hostname): nothing runs; $(tail -n 1 "$folder/log" 2>/dev/null)"
        fi
        ;;
    *)
        echo "error: \"${1-}\" is not start, stop or status: $0 start COMMAND..." >&2
        exit 2
        ;;
esac

#!/usr/bin/env bash
# Runs one command on this host that outlives the connection it was started from:
#
#   detached.sh start COMMAND...   from the top of the repository; the log is appended to
#   detached.sh stop               SIGTERM: training saves and exits with 0
#   detached.sh status             what runs, or the last line of the log
#
#   RUN_DIR   where log and pid are (~/puma_jax-run)
set -u

folder=${RUN_DIR:-$HOME/puma_jax-run}

running() {
    # one that has ended, but that no one has asked after, is still there as a zombie
    [[ -f $folder/pid && $(ps -o stat= -p "$(<"$folder/pid")") =~ ^[^Z] ]]
}

case ${1-} in
    start)
        shift
        if running; then
            echo "error: process $(<"$folder/pid") still runs on $(hostname): stop it first" >&2
            exit 2
        fi
        cd "$(dirname "$0")/.." && mkdir -p "$folder" || exit 1
        # a session of its own: the end of the connection is not its end
        nohup setsid launch/entrypoint.sh "$@" >>"$folder/log" 2>&1 </dev/null &
        echo "$!" >"$folder/pid"
        echo "$(hostname): started, the log is $folder/log"
        ;;
    stop)
        if running; then
            kill -TERM "$(<"$folder/pid")" && echo "$(hostname): asked to stop"
        else
            echo "$(hostname): nothing runs"
        fi
        ;;
    status)
        if running; then
            echo "$(hostname): process $(<"$folder/pid") runs"
        else
            echo "$(hostname): nothing runs; $(tail -n 1 "$folder/log" 2>/dev/null)"
        fi
        ;;
    *)
        echo "error: \"${1-}\" is not start, stop or status: $0 start COMMAND..." >&2
        exit 2
        ;;
esac

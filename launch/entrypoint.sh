#!/usr/bin/env bash
# Runs a command as the first process of a container: entrypoint.sh python -m puma_jax.train ...
#
# SIGTERM is passed on, and the command has time to save. What was asked to stop ends with 143, also
# if it saved all and exited with 0: to Kubernetes 0 means done, and it would never start again.
set -u

(($#)) || { echo "error: no command given, expected: $0 COMMAND..." >&2; exit 2; }

"$@" &
child=$!
asked=0
trap 'asked=1; kill -TERM "$child" 2>/dev/null' TERM INT
while true; do
    wait "$child"
    code=$?
    # a trap ends wait while the child still runs
    ((code > 128)) && kill -0 "$child" 2>/dev/null && continue
    break
done
# the child may have ended while the trap ran: this is its own code, not that of the signal to us
wait "$child"
code=$?
((asked && code == 0)) && code=143
echo "ended with $code" >&2
exit "$code"

#!/usr/bin/env bash
# The job that slurm.sh submits: slurm_job.sh BABEL CONFIG OUT [MORE ARGUMENTS OF babel train]
set -uo pipefail
babel=$1 config=$2 out=$3
shift 3

finished() {
    if [[ $out == gs://* || $out == s3://* ]]; then
        "$babel" status "$out" | grep -q ^finished
    else
        [[ -s $out/summary.json ]]
    fi
}

srun --kill-on-bad-exit=1 "$babel" train "$config" --set "out=$out" "$@"
status=$?
if ((status == 2)); then
    exit 2 # the config is refused, and would be again
elif ! finished; then
    # Stopped by SIGTERM, or a process was lost: the same command goes on at the last checkpoint.
    if ((${SLURM_RESTART_COUNT:-0} < 100)); then
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
    printf 'not finished after 100 restarts\n' >&2
    exit 1
fi
exit "$status"

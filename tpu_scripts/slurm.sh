#!/usr/bin/env bash
# A run on GPU nodes of a Slurm cluster, one process for each GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
slurm.sh COMMAND OPTIONS [-- MORE ARGUMENTS OF babel train]

  launch    rehearses CONFIG on this machine, and submits the job, which goes back into the queue after a preemption or at its time limit, until the run is finished
  log       follows its log
  delete    cancels the job, if this script submitted it

  --name NAME                                   of the job (launch; log, of a run in a bucket)
  --job ID                                      (log, delete)
  --nodes N --gpus N                            nodes, and GPUs of each (launch)
  --config FILE                                 config, on a disk that all nodes share (launch)
  --out FOLDER --data FOLDER                    run folder, and data.folder: in a bucket (gs:// or s3://), or on that disk (launch; log: --out;
                                                --data where the config does not say it)
  --partition P --account A --time LIMIT        where the cluster asks for them
  --babel COMMAND                               the babel of an environment that all nodes see (babel)
  --secrets VARIABLE,...                        environment variables of this machine that the job needs
  --no-rehearsal, --devices N                   skip the rehearsal; its CPU devices (16)
  --dry-run                                     print the commands
HELP
}

name='' job='' nodes='' gpus='' config='' out='' partition='' account='' time='' babel=babel data='' secrets='' devices='' no_rehearsal=false
parse "name job nodes gpus config out partition account time babel data secrets devices" "no_rehearsal" "$@"
settings_of_options
secret_names '^[A-Za-z_][A-Za-z0-9_]*$' 'the name of an environment variable'
creator="babel-jax-scripts"

# A log is a file on disk, also where the run is in a bucket.
log_file() {
    if is_url "$out"; then
        need name
        printf '%s.slurm.log' "$name"
    else
        printf '%s.slurm.log' "$out"
    fi
}

launch() {
    need name nodes gpus config out
    check_name "$name"
    check_number nodes "$nodes"
    check_number gpus "$gpus"
    local log one
    log=$(log_file)
    local options=(--job-name="$name" --comment="$creator" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus")
    # SIGTERM two minutes before the time limit, for a last checkpoint. Slurm reads %j in the name of a log as the id of the job.
    options+=(--requeue --signal=TERM@120 --open-mode=append --output="${log//%/%%}")
    for one in ${names[@]+"${names[@]}"}; do [[ -n ${!one:-} ]] || die "--secrets: $one is not set here"; done
    # Slurm takes the values from the environment: no command line has them.
    if [[ -n $secrets ]]; then options+=(--export="ALL,$secrets"); fi
    rehearse
    if [[ -n $partition ]]; then options+=(--partition="$partition"); fi
    if [[ -n $account ]]; then options+=(--account="$account"); fi
    if [[ -n $time ]]; then options+=(--time="$time"); fi
    local script
    script=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/slurm_job.sh
    change sbatch "${options[@]}" "$script" "$babel" "$config" "$out" "${settings[@]:2}" ${arguments[@]+"${arguments[@]}"}
}

follow() {
    need out
    local log
    log=$(log_file)
    change tail -n 100 -F -- "$log"
}

delete() {
    need job
    [[ $job =~ ^[0-9]+$ ]] || die "--job $job: give the number that sbatch printed"
    local found
    found=$(squeue --noheader --jobs="$job" --format=%k) || die "no job $job"
    [[ $found == "$creator" ]] || die "job $job was not submitted by this script (its comment is not $creator); cancel it with scancel"
    change scancel "$job"
}

case $command in
launch | delete) "$command" ;;
log) follow ;;
*) die "unknown command $command; see --help" ;;
esac

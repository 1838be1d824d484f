#!/usr/bin/env bash
# A run on GPU nodes of a Slurm cluster, one process for each GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
slurm.sh COMMAND OPTIONS [-- MORE ARGUMENTS OF babel train]

  launch    submits the job, which goes back into the queue after a preemption or at its time limit, until the run is finished
  log       follows its log
  delete    cancels the job, if this script submitted it

  --name NAME                                   of the job (launch)
  --job ID                                      (log, delete)
  --nodes N --gpus N                            nodes, and GPUs of each (launch)
  --config FILE --out FOLDER                    config and run folder, on a disk that all nodes share (launch; log: --out)
  --partition P --account A --time LIMIT        where the cluster asks for them
  --babel COMMAND                               the babel of an environment that all nodes see (babel)
  --dry-run                                     print the commands
HELP
}

name='' job='' nodes='' gpus='' config='' out='' partition='' account='' time='' babel=babel
parse "name job nodes gpus config out partition account time babel" "" "$@"
creator="babel-jax-scripts"

launch() {
    need name nodes gpus config out
    check_name "$name"
    check_number nodes "$nodes"
    check_number gpus "$gpus"
    local options=(--job-name="$name" --comment="$creator" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus")
    # SIGTERM two minutes before the time limit, for a last checkpoint.
    options+=(--requeue --signal=TERM@120 --open-mode=append --output="$out.slurm.log")
    if [[ -n $partition ]]; then options+=(--partition="$partition"); fi
    if [[ -n $account ]]; then options+=(--account="$account"); fi
    if [[ -n $time ]]; then options+=(--time="$time"); fi
    local script
    script=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/slurm_job.sh
    change sbatch "${options[@]}" "$script" "$babel" "$config" "$out" ${arguments[@]+"${arguments[@]}"}
}

follow() {
    need out
    change tail -n 100 -F "$out.slurm.log"
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

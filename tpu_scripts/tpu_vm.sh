#!/usr/bin/env bash
# TPU VMs with gcloud, from creation to deletion.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
tpu_vm.sh COMMAND OPTIONS [-- MORE ARGUMENTS OF babel train]

  create    rehearses CONFIG on this machine, and makes a TPU VM (--spot: one that may be taken away; --queued or --slices N: a queued
            resource)
  install   babel-jax from the archive of this commit, on all workers
  launch    babel train CONFIG on all workers, in the background
  log       follows the log of worker 0
  resume    watches the run, and creates, installs and launches again after a preemption, until the run is finished
  delete    what was created here, and nothing else

  --name NAME --project PROJECT --zone ZONE     which (all commands)
  --type TYPE --runtime VERSION                 v5p-128 and v2-alpha-tpuv5, for example (create, resume)
  --config FILE                                 a config on this machine, which is copied to all workers; else its path on the workers
                                                (create, launch, resume)
  --out FOLDER --data FOLDER                    run folder, and data.folder: in a bucket (gs:// or s3://), or on a disk that all workers share
                                                (create, launch, resume; --data where the config does not say it)
  --mount COMMAND                               run on every worker before anything else, to mount that disk (install, resume)
  --secrets VARIABLE=NAME,...                   environment variables of babel from secrets of Secret Manager, which each worker reads itself
                                                (launch, resume)
  --no-rehearsal, --devices N, --babel COMMAND  skip the rehearsal; its CPU devices (16); the babel of this machine (create, resume)
  --spot, --queued, --slices N                  see create
  --poll SECONDS                                between two looks (resume; 60)
  --restarts N                                  at most, of a run that fails; preemptions do not count (resume; 100)
  --dry-run                                     print the commands
HELP
}

name='' project='' zone='' type='' runtime='' config='' out='' data='' mount='' secrets='' devices='' babel=babel no_rehearsal=false spot=false queued=false slices=1 poll=60 restarts=100
parse "name project zone type runtime config out data mount secrets devices babel slices poll restarts" "spot queued no_rehearsal" "$@"
need name project zone
check_name "$name"
check_number slices "$slices"
((slices == 1)) || queued=true
place=(--project="$project" --zone="$zone")
if $queued; then kind="queued-resources"; else kind="tpu-vm"; fi
settings_of_options
secret_names '^[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_-]+$' 'VARIABLE=NAME of a secret in Secret Manager'
thing="$kind $project $zone $name"
rehearsed=false
tpus=(gcloud compute tpus "$kind")

create() {
    need type runtime
    if ! $rehearsed && ! $no_rehearsal; then
        need config out
        rehearse
    fi
    local options=("${place[@]}" --accelerator-type="$type")
    if $spot; then options+=(--spot); fi
    if ! $queued; then
        options+=(--version="$runtime")
    elif ((slices == 1)); then
        options+=(--runtime-version="$runtime" --node-id="$name")
    else
        options+=(--runtime-version="$runtime" --node-count="$slices" --node-prefix="$name")
    fi
    # Recorded first: what is made and not recorded could not be deleted from here.
    local known=true status=0 said
    if ! created_here "$thing"; then known=false && remember "$thing"; fi
    if $dry_run; then
        change "${tpus[@]}" create "$name" "${options[@]}"
        return
    fi
    said=$(mktemp "${TMPDIR:-/tmp}/babel-jax-XXXXXX")
    "${tpus[@]}" create "$name" "${options[@]}" 2>"$said" || status=$?
    cat "$said" >&2
    # Forgotten is what was not made, and what somebody else has made; what gcloud failed at halfway is there, and stays recorded.
    if ((status)) && ! $known; then
        if grep -qiE 'already.?exists' "$said" || [[ $(state) =~ ^(GONE)?$ ]]; then forget "$thing"; fi
    fi
    rm -f "$said"
    return "$status"
}

# READY or ACTIVE when it can be used, GONE when there is none.
state() {
    local field=state
    if $queued; then field=state.state; fi
    "${tpus[@]}" describe "$name" "${place[@]}" --format="value($field)" 2>/dev/null || echo GONE
}

# Waits until it can be used; fails where that will not come.
ready() {
    while true; do
        case $(state) in
        READY | ACTIVE) return ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED | GONE) return 1 ;;
        esac
        sleep "$poll"
    done
}

on_all() {
    if $queued; then
        change "${tpus[@]}" ssh "$name" "${place[@]}" --node=all --worker=all --command="$1"
    else
        change "${tpus[@]}" ssh "$name" "${place[@]}" --worker=all --command="$1"
    fi
}

# Copies a file of this machine to all workers.
copy() {
    if $queued; then
        change "${tpus[@]}" scp "$1" "$name:$2" "${place[@]}" --node=all --worker=all
    else
        change "${tpus[@]}" scp "$1" "$name:$2" "${place[@]}" --worker=all
    fi
}

on_first() {
    if $queued; then
        "${tpus[@]}" ssh "$name" "${place[@]}" --node=0 --worker=0 --command="$1"
    else
        "${tpus[@]}" ssh "$name" "${place[@]}" --worker=0 --command="$1"
    fi
}

install() {
    local archive root setup
    $dry_run || ready || die "$name is not there any more"
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=$(mktemp -u "${TMPDIR:-/tmp}/babel-jax-XXXXXX.tar.gz")
    change git -C "$root" archive --prefix=babel-jax/ --output="$archive" HEAD
    copy "$archive" babel-jax.tar.gz
    change rm -f "$archive"
    [[ -z $mount ]] || on_all "$mount"
    # By uv, which brings a Python: that of the images (Ubuntu 22.04) is 3.10, too old, and often without venv.
    setup='tar -xzf babel-jax.tar.gz && cd babel-jax'
    setup+=' && python3 -m pip install --quiet --upgrade --target .uv --constraint constraints.txt uv'
    setup+=' && .uv/bin/uv venv --quiet --clear --python 3.11 .venv'
    setup+=' && .uv/bin/uv pip install --quiet --constraint constraints.txt --build-constraint constraints.txt ".[tpu,buckets]"'
    on_all "$setup"
}

# A shell's words that read the secrets on a worker: they are in no command line, and in no file.
with_secrets() {
    local one
    for one in ${names[@]+"${names[@]}"}; do
        # shellcheck disable=SC2016
        printf '%s=$(%s) && export %s && ' "${one%%=*}" \
            "$(quoted gcloud secrets versions access latest --secret="${one#*=}" --project="$project")" "${one%%=*}"
    done
}

# A secret that is not there is said here, and not by every worker. Its name is not printed: somebody may have given the value for it.
check_secrets() {
    local one
    for one in ${names[@]+"${names[@]}"}; do
        $dry_run || gcloud secrets describe "${one#*=}" --project="$project" >/dev/null 2>&1 ||
            die "--secrets: Secret Manager of $project has no secret of the name given for ${one%%=*}, or you may not see it"
    done
}

launch() {
    need config out
    # What was rehearsed is what runs: a config of this machine is copied.
    local train theirs=$config
    if [[ -f $config ]]; then
        theirs="babel-run.toml"
        copy "$config" "$theirs"
    fi
    # The status of the last start: empty while it runs. A preempted run ends with 0, and without a summary.
    train="$(with_secrets)$(quoted babel-jax/.venv/bin/babel train "$theirs" "${settings[@]}" ${arguments[@]+"${arguments[@]}"})"
    on_all "rm -f babel.status; nohup setsid bash -c $(quoted "{ $train; } >>babel.log 2>&1; echo \$? >babel.status") >/dev/null 2>&1 </dev/null &"
}

follow() {
    if $dry_run; then
        printf '%s\n' "$(quoted "${tpus[@]}" ssh "$name" "${place[@]}" --worker=0 --command='tail -n 100 -F babel.log')"
    else
        on_first 'tail -n 100 -F babel.log'
    fi
}

delete() {
    created_here "$thing" || die "$name was not created by these scripts from here (no line '$thing' in $record); delete it with gcloud"
    local options=("${place[@]}" --quiet)
    if $queued; then options+=(--force); fi
    change "${tpus[@]}" delete "$name" "${options[@]}" || return
    forget "$thing"
}

# Installs and launches; `begun` says afterwards whether that was done. The subshell stops at its first failure, which it would not do in a
# condition: there bash forgets set -e.
begin() {
    local status
    set +e
    (
        set -e
        install
        launch
    )
    status=$?
    set -e
    ((status)) || begun=true
}

again() {
    # What could not be deleted now is looked at again, as all else that gcloud may fail in.
    [[ $1 == GONE ]] || delete || return 0
    # Where there is no capacity, or what there was is taken away at once, the loop tries again; also where it is there still, and gcloud
    # failed to say so.
    (create) || return 0
    begun=false
    $dry_run || ready || return 0
    begin
}

# What worker 0 says of the run: finished, running, or the exit status of a start that ended.
progress() {
    local look finished
    finished="test -s $(quoted "$out/summary.json")"
    if is_url "$out"; then
        finished="$(with_secrets)$(quoted babel-jax/.venv/bin/babel status "$out") 2>/dev/null | grep -q ^finished"
    fi
    look="if $finished; then echo finished; elif test -f babel.status; then cat babel.status;"
    look+=" elif pgrep -f 'bin/[b]abel train' >/dev/null; then echo running; else echo lost; fi"
    on_first "$look" 2>/dev/null || echo unreachable
}

resume() {
    need config out type runtime
    check_number restarts "$restarts"
    # What is there already was rehearsed before it was created.
    created_here "$thing" || rehearse
    rehearsed=true
    check_secrets
    local now found begun=true restarted=0
    if $dry_run; then
        if created_here "$thing"; then again PREEMPTED; else again GONE; fi
        return
    fi
    while true; do
        now=$(state)
        case $now in
        READY | ACTIVE)
            if $begun; then found=$(progress); else found=none; fi
            case $found in
            none) begin ;;
            finished) printf 'finished: %s\n' "$out" && return ;;
            running | unreachable) ;;
            2) die "babel train refuses the config: tpu_vm.sh log shows why" ;;
            *)
                ((restarted < restarts)) || die "ended with status $found after $restarts restarts: tpu_vm.sh log shows why"
                restarted=$((restarted + 1))
                printf 'ended with status %s, and starts again\n' "$found"
                launch || printf 'not started on all workers; looks again\n'
                ;;
            esac
            ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED | GONE)
            printf '%s is %s, and is created again\n' "$name" "$now"
            again "$now"
            ;;
        esac
        sleep "$poll"
    done
}

case $command in
create | install | resume | delete) "$command" ;;
launch) check_secrets && launch ;;
log) follow ;;
*) die "unknown command $command; see --help" ;;
esac

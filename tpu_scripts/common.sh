# What the scripts here share: reading options, printing or running commands, and the record of what was created. To be sourced.
# shellcheck shell=bash

dry_run=false
record=${BABEL_RECORD:-${XDG_STATE_HOME:-$HOME/.local/state}/babel-jax/created}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# The command, quoted so that a shell reads it back.
quoted() {
    local words
    printf -v words '%q ' "$@"
    printf '%s' "${words% }"
}

# Runs a command that changes something; --dry-run prints it.
change() {
    if $dry_run; then
        printf '%s\n' "$(quoted "$@")"
    else
        "$@"
    fi
}

# Reads a command line into `command`, a variable for each option of $1 (names of those with a value) and $2 (of those without, set to
# true), and `arguments`, which is what follows --.
# shellcheck disable=SC2034 # they are read by the script that sources this
parse() {
    local -r valued=" $1 " flags=" $2 dry_run "
    local option
    shift 2
    [[ $# -gt 0 ]] || { usage && exit 2; }
    [[ $1 != --help ]] || { usage && exit; }
    command=$1 && shift
    while [[ $# -gt 0 && $1 != -- ]]; do
        [[ $1 != --help ]] || { usage && exit; }
        [[ $1 =~ ^--[-a-z]+$ ]] || die "unknown option $1; see --help"
        option=${1#--} && option=${option//-/_}
        if [[ $flags == *" $option "* ]]; then
            printf -v "$option" true
        elif [[ $valued == *" $option "* ]]; then
            # The next option is no value: without this, `--zone --dry-run` would run for real.
            [[ $# -gt 1 && $2 != --* ]] || die "$1 needs a value"
            [[ $2 != *[[:cntrl:]]* ]] || die "$1 has a line break or another control character in its value"
            printf -v "$option" '%s' "$2" && shift
        else
            die "unknown option $1; see --help"
        fi
        shift
    done
    arguments=("${@:2}")
}

need() {
    local option
    for option in "$@"; do
        [[ -n ${!option:-} ]] || die "--${option//_/-} is needed; see --help"
    done
}

# Names of Google Cloud and Kubernetes: 1 to 40 lower-case letters, digits and hyphens, a letter first.
check_name() {
    [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name $1: give lower-case letters, digits and hyphens, a letter first"
}

check_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die "--$1 $2: give a whole number of 1 or more"
}

# Whether a folder is in a bucket.
is_url() {
    [[ $1 == gs://?* || $1 == s3://?* ]]
}

# The settings of babel that the options here stand for, in `settings`.
# shellcheck disable=SC2154 # the script that sources this has the options
settings_of_options() {
    settings=(--set "out=$out")
    if [[ -n $data ]]; then settings+=(--set "data.folder=$data"); fi
}

# The names of --secrets in `names`; $1 is their pattern, $2 says what they are. What is no name may be a value, and is not printed.
# shellcheck disable=SC2154,SC2034
secret_names() {
    local one number=0
    names=()
    if [[ -z $secrets ]]; then return; fi
    IFS=, read -ra names <<<"$secrets"
    for one in "${names[@]}"; do
        number=$((number + 1))
        [[ $one =~ $1 ]] || die "--secrets: entry $number is not $2; give names, never values"
    done
}

# The whole run, small, on this machine, before anything is paid for.
# shellcheck disable=SC2154
rehearse() {
    if $no_rehearsal; then return; fi
    [[ -f $config ]] || die "--config $config: no file of this machine, where the rehearsal runs; give a copy that is here, or --no-rehearsal"
    $dry_run || command -v "$babel" >/dev/null || die "$babel: not on this machine, where the rehearsal runs; give --babel, or --no-rehearsal"
    local words=("$babel" rehearse "$config" "${settings[@]}") number
    if [[ -n $devices ]]; then words+=(--devices "$devices"); fi
    if ((${slices:-1} > 1)); then words+=(--slices "$slices"); fi
    for ((number = 0; number < ${#arguments[@]}; number++)); do
        case ${arguments[number]} in
        --set) words+=(--set "${arguments[number + 1]:-}") ;;
        --set=*) words+=("${arguments[number]}") ;;
        esac
    done
    change "${words[@]}" || die "the rehearsal did not pass, so nothing is started; --no-rehearsal skips it"
}

# The record has a line for each thing that these scripts created: its kind, place and name; `deleted` and the same once it is deleted. Lines
# are only added, so that a full disk or a second script loses none.
remember() {
    $dry_run && return
    note "$*" || die "$record cannot be written, so nothing is created that could not be deleted again"
}

created_here() {
    [[ -f $record && $(grep -xF -e "$*" -e "deleted $*" -- "$record" | tail -n 1) == "$*" ]]
}

forget() {
    $dry_run && return
    note "deleted $*"
}

note() {
    mkdir -p "${record%/*}" || return
    # A line that a full disk cut off is ended first.
    if [[ -s $record && -n $(tail -c 1 "$record") ]]; then printf '\n' >>"$record" || return; fi
    printf '%s\n' "$1" >>"$record"
}

# shellcheck shell=bash
# What the scripts share. Sourced, never run; `set -euo pipefail` is the caller's.

# The repository's root; every script works from there. Paths given by the caller are meant from where they stand.
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# Where cargo builds to, and what else may be thrown away.
export target=${CARGO_TARGET_DIR:-$PWD/target}

say() { printf '%s\n' "$*"; }
step() { printf '==> %s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Prints the comment block at the head of the calling script: its help.
help() { sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0"; }

# Whether a program is there.
has() { command -v "$1" >/dev/null 2>&1; }

# from_here PATH: absolute, without dots or links.
from_here() {
    local path
    if [[ $1 == /* ]]; then path=$1; else path=$here/$1; fi
    realpath --canonicalize-missing "$path"
}

# A whole number from 0 to 99 for an option, or the end.
count_of() {
    [[ ${2:-} =~ ^[0-9]{1,2}$ ]] || die "$1 wants a number from 0 to 99, got '${2:-}'"
    printf '%s' "$((10#$2))"
}

# check_port PORT: the value of --port, or the end.
check_port() {
    if ! [[ $1 =~ ^[0-9]{1,5}$ ]] || ((10#$1 < 1 || 10#$1 > 65535)); then die "--port wants 1 to 65535, got '$1'"; fi
}

# try_it PORT NAME: says that the cluster is ready, and what to ask it.
try_it() {
    say "ready; try:"
    say
    say "    curl http://127.0.0.1:$1/v1/chat/completions -H 'content-type: application/json' -d \\"
    say "      '{\"model\": \"$2\", \"messages\": [{\"role\": \"user\", \"content\": \"What is prefill?\"}]}'"
}

# --- processes -------------------------------------------------------------------------------------------------------
# A process is remembered as "PID STARTTIME": a recycled pid has another start time and is never signalled.

# The start time of a live process (field 22 of its stat file); nothing for a dead one or a zombie.
started() {
    local stat
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 0
    stat=${stat##*) } # the name before it may hold anything
    # shellcheck disable=SC2086
    set -- $stat
    [[ $1 == [ZX] ]] || printf '%s' "${20}"
}

# remember PID FILE
remember() { printf '%s %s\n' "$1" "$(started "$1")" >"$2"; }

# alive FILE: whether the process remembered there still runs.
alive() {
    local pid start
    [[ -s $1 ]] || return 1
    read -r pid start <"$1"
    [[ -n $start && $(started "$pid") == "$start" ]]
}

# signal SIGNAL FILE
signal() {
    local pid
    alive "$2" || return 0
    read -r pid _ <"$2"
    kill "-$1" "$pid" 2>/dev/null || true
}

# stop_all SECONDS FILE…: asks all of them to leave, waits so long, then kills what is left.
stop_all() {
    local grace=$1 file waited=0 left
    shift
    for file; do signal TERM "$file"; done
    while :; do
        left=()
        for file; do if alive "$file"; then left+=("$file"); fi; done
        ((${#left[@]})) || return 0
        ((waited < grace * 10)) || break
        sleep 0.1
        waited=$((waited + 1))
    done
    for file in "${left[@]}"; do
        say "    $(basename "$file" .pid) did not leave in ${grace} s: killed"
        signal KILL "$file"
    done
}

# is_ready PORTS_FILE: whether the service that wrote this port file says /ready.
is_ready() {
    local admin status
    admin=$(sed -n 's/.*"admin": *"\([^"]*\)".*/\1/p' "$1" 2>/dev/null) || true
    [[ -n $admin ]] || return 1
    # Bash's own sockets: nothing more to install. In a subshell, which closes the connection at its end.
    status=$(
        { exec 3<>"/dev/tcp/${admin%:*}/${admin##*:}"; } 2>/dev/null || exit
        printf 'GET /ready HTTP/1.0\r\n\r\n' >&3
        read -r -t 5 status <&3 && printf '%s' "$status"
    ) || true
    [[ $status == HTTP/*' 200 '* ]]
}

# complaint LOG: the line in which a service that ended said why.
complaint() {
    local line
    line=$(grep -a -i '^error' "$1" 2>/dev/null | tail -n 1) || true
    [[ -n $line ]] || line=$(grep -a -v '^[[:space:]]*$' "$1" 2>/dev/null | tail -n 1) || true
    printf '%s' "${line:-it said nothing}"
}

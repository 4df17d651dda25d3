#!/usr/bin/env bash
# Trains on this machine, or on the hosts named below, started by mpirun:
#   RANKS=4 scripts/run-mpirun.sh --model cnn --data digits --compression onebit --output runs/first
# The arguments are those of "bitring train". SIGTERM and SIGUSR1 have the ranks save; the exit status is then 75, and
# the same with --resume goes on. Ctrl-C interrupts.
set -euo pipefail

# ---- edit, or set in the environment --------------------------------------------------------------------------------
RANKS=${RANKS:-2}             # how many
HOSTS=${HOSTS:-}              # node1,node2: needs ssh without a password, and the same paths on every host
VENV=${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv} # the virtual environment that holds bitring
# ---------------------------------------------------------------------------------------------------------------------

complain() {
    echo "run-mpirun.sh: $1" >&2
    exit "${2:-1}"
}

if [ -d "$VENV" ]; then
    PATH="$(cd "$VENV" && pwd)/bin:$PATH"
    export PATH
fi
command -v bitring >/dev/null || complain "no bitring in $VENV or on PATH; scripts/quickstart makes .venv"

output='' of_output=''
for argument; do
    if [ -n "$of_output" ] || [[ $argument == --output=* ]]; then
        output=${argument#--output=}
    fi
    of_output=''
    if [ "$argument" = --output ]; then
        of_output=yes
    fi
done
[ -n "$output" ] || complain "say where the results go: --output FOLDER" 2

# The two libraries' mpirun differ in everything but -n. MPICH's hands all variables to other hosts.
launcher=(mpirun -n "$RANKS")
if mpirun --version 2>&1 | grep -q "Open MPI"; then
    launcher+=(--map-by "${HOSTS:+node}:oversubscribe" --bind-to none)
    for name in $(compgen -e | grep -E '^(PATH|BITRING_.*|OMP_.*|OPENBLAS_NUM_THREADS|MKL_.*|NUMBA_.*)$'); do
        launcher+=(-x "$name")
    done
    if [ -n "$HOSTS" ]; then
        launcher+=(--host "$HOSTS")
    fi
    if [ "$(id -u)" -eq 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
elif [ -n "$HOSTS" ]; then
    launcher+=(-hosts "$HOSTS")
fi

mkdir -p "$output"
started=$output/.started again=$output/.again
rm -f "$again"
: >"$started"

# A rank that has saved and wants to be run again ends with 75. Launchers take that for a failure and kill its peers,
# which are on their way out: so here it leaves a note, and ends well.
# shellcheck disable=SC2016
rank='trap : INT TERM USR1
"$@"
status=$?
if [ $status -eq 75 ]; then
    : >"$0" && exit 0
fi
exit $status'
# With job control, which lets a background job mind Ctrl-C. Open MPI's mpirun would give the ranks no time after SIGTERM.
set -m
"${launcher[@]}" bash -c "$rank" "$again" bitring train "$@" </dev/null &
pid=$!
set +m
trap 'kill -USR1 "$pid" 2>/dev/null || true' HUP TERM USR1
trap 'kill -INT "$pid" 2>/dev/null || true' INT
status=129
while [ "$status" -gt 128 ] && kill -0 "$pid" 2>/dev/null; do
    status=0
    wait "$pid" || status=$?
done

[ "$status" -eq 0 ] || exit "$status"
if [ -e "$again" ]; then
    rm -f "$again"
    exit 75
fi
# Open MPI's mpirun returns 0 when a whole host is lost.
[ "$output/summary.json" -nt "$started" ] || complain "the launcher ended well, but there is no new $output/summary.json"
rm -f "$started"

#!/usr/bin/env bash
# Trains on this machine, or on the hosts named below, started by mpirun:
#   RANKS=4 scripts/run-mpirun.sh --model cnn --data digits --compression onebit --output runs/first
# The arguments are those of "bitring train".
set -euo pipefail

# ---- edit, or set in the environment --------------------------------------------------------------------------------
RANKS=${RANKS:-2}             # how many
HOSTS=${HOSTS:-}              # node1,node2: needs ssh without a password, and the same paths on every host
VENV=${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv} # the virtual environment that holds bitring
# ---------------------------------------------------------------------------------------------------------------------

if [ -d "$VENV" ]; then
    PATH="$(cd "$VENV" && pwd)/bin:$PATH"
    export PATH
fi
command -v bitring >/dev/null || {
    echo "run-mpirun.sh: no bitring in $VENV or on PATH; scripts/quickstart makes .venv" >&2
    exit 1
}

# The two libraries' mpirun differ in everything but -n.
options=(-n "$RANKS")
if mpirun --version 2>&1 | grep -q "Open MPI"; then
    options+=(--map-by "${HOSTS:+node}:oversubscribe" --bind-to none -x PATH)
    if [ -n "$HOSTS" ]; then
        options+=(--host "$HOSTS")
    fi
    if [ "$(id -u)" -eq 0 ]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
elif [ -n "$HOSTS" ]; then
    options+=(-hosts "$HOSTS")
fi
exec mpirun "${options[@]}" bitring train "$@"

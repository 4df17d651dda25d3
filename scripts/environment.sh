# shellcheck shell=bash
# Sourced by scripts/quickstart and scripts/test: makes, or reuses, a virtual environment that holds bitring.
#
#   environment FOLDER EXTRA...
#
# Installs the project (editable) with these extras, only when something asked for is missing. FOLDER/installed records
# what is there: a digest of the native code, of what builds it and of the Python version, then the extras, one a line.

# The interpreter to make environments with: PYTHON, or python3. Ends the script when it is older than 3.10.
find_python() {
    local python=${PYTHON:-python3} version
    if ! version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>&1); then
        echo "bitring needs Python 3.10 or newer; '$python' does not run: $version" >&2
        echo "Set PYTHON to one that does, for example PYTHON=python3.12 $0" >&2
        exit 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "bitring needs Python 3.10 or newer; '$python' is $version. Set PYTHON to a newer one." >&2
        exit 1
    fi
    echo "$python"
}

# run_with_progress WHAT LOG COMMAND...: the command's output goes to LOG, its last line and the seconds to the screen.
run_with_progress() {
    local what=$1 log=$2 start=$SECONDS status=0 last pid
    shift 2
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    echo "$what ..."
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        last=$(sed '/WARNING/d' "$log" | tail -n 1 | cut -c 1-70)
        if [ -t 1 ]; then
            printf '\r\033[K  %3d s  %s' $((SECONDS - start)) "$last"
        elif [ $(((SECONDS - start) % 15)) -eq 14 ]; then
            echo "  $((SECONDS - start)) s  $last"
        fi
    done
    wait "$pid" || status=$?
    [ -t 1 ] && printf '\r\033[K'
    if [ "$status" -ne 0 ]; then
        tail -n 40 "$log" >&2
        echo "$what: failed after $((SECONDS - start)) s; the whole output is in $log" >&2
        exit "$status"
    fi
    echo "  done in $((SECONDS - start)) s"
}

environment() {
    local folder=$1 python digest extra missing=()
    shift
    python=$(find_python) || exit
    digest=$({
        "$python" -c 'import sys; print(sys.version_info[:2])'
        cat pyproject.toml CMakeLists.txt collectives/native/*
    } | cksum)
    if ! "$folder/bin/python" -c '' 2>/dev/null || [ "$("$folder/bin/python" -V)" != "$("$python" -V)" ]; then
        echo "Making $folder with $("$python" -V)"
        if ! "$python" -m venv --clear "$folder"; then
            echo "'$python -m venv' failed; Debian and Ubuntu have it in the package python3-venv" >&2
            exit 1
        fi
    fi
    touch "$folder/installed"
    if [ "$(head -n 1 "$folder/installed")" != "$digest" ]; then
        missing=("$@")
    else
        for extra; do
            grep -qx "$extra" "$folder/installed" || missing+=("$extra")
        done
    fi
    if [ ${#missing[@]} -eq 0 ]; then
        return
    fi
    # Modules are compiled when they are first imported; pip would spend most of its time on those that never are.
    run_with_progress "Installing bitring with ${missing[*]} into $folder (a minute or two the first time)" \
        "$folder/install.log" "$folder/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        --no-compile --editable ".[$(IFS=, && echo "${missing[*]}")]"
    {
        echo "$digest"
        {
            printf '%s\n' "${missing[@]}"
            if [ "$(head -n 1 "$folder/installed")" = "$digest" ]; then
                tail -n +2 "$folder/installed"
            fi
        } | sort -u
    } >"$folder/installed.new"
    mv "$folder/installed.new" "$folder/installed"
}

# jax_packages VENV FOLDER: JAX and optax for that environment, in a folder of their own, for PYTHONPATH.
jax_packages() {
    local python=$1/bin/python folder=$2
    if PYTHONPATH=$folder "$python" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("jax") and u.find_spec("optax")))'; then
        return
    fi
    rm -rf "$folder" "$folder.new"
    if "$python" -m pip install --disable-pip-version-check --progress-bar off --quiet --no-compile --only-binary :all: \
        --target "$folder.new" "jax==0.10.2" "optax==0.2.8" >"$folder.log" 2>&1 </dev/null; then
        # NumPy and ml_dtypes are the environment's: bitring and its kernels are tested with those.
        rm -rf "$folder.new"/numpy "$folder.new"/numpy-* "$folder.new"/numpy.libs "$folder.new"/ml_dtypes*
        mv "$folder.new" "$folder"
        echo "Installed JAX in $folder"
    else
        echo "No wheels of JAX in the package index; its tests are skipped"
        tail -n 3 "$folder.log"
    fi
}

# torch_packages VENV FOLDER: PyTorch's CPU wheel for that environment, in a folder of its own, for PYTHONPATH: it is as
# large as all the rest, and the other tests do without. Only where the package index has such a wheel; the other one
# brings gigabytes of CUDA.
torch_packages() {
    local python=$1/bin/python folder=$2
    if PYTHONPATH=$folder "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        return
    fi
    rm -rf "$folder" "$folder.new"
    if "$python" -m pip install --disable-pip-version-check --progress-bar off --quiet --no-compile --only-binary :all: \
        --target "$folder.new" "torch==2.13.0+cpu" >"$folder.log" 2>&1 </dev/null; then
        mv "$folder.new" "$folder"
        echo "Installed PyTorch in $folder"
    else
        echo "No CPU wheel of PyTorch in the package index (PIP_EXTRA_INDEX_URL names another); its tests are skipped"
        tail -n 3 "$folder.log"
    fi
}

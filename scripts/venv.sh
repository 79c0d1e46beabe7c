# To be sourced from the repository's folder: `. scripts/venv.sh requirements.txt` leaves a complete .venv and its $python.
# Makes .venv where it is missing, unfinished or older than the requirements; a complete one costs a moment.

python=.venv/bin/python
installing=.venv/.installing  # process id of an installation; left behind where it was killed

install() {  # REQUIREMENTS
    if [ -e "$installing" ] && kill -0 "$(cat "$installing")" 2>/dev/null; then
        echo "error: process $(cat "$installing") is installing into .venv: wait for it, or remove .venv" >&2
        exit 1
    fi
    # pip takes a package that was cut off in the middle for an installed one, so begin again rather than go on.
    if [ -e "$installing" ] || ! "$python" -c '' 2>/dev/null; then
        rm -rf .venv
    fi
    if [ ! -d .venv ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: Python 3.10 or newer is needed, python3 here is: $(python3 -V 2>&1)" >&2
        exit 1
    fi
    echo "installing $1 into .venv"
    trap 'exit 130' INT TERM  # leaves $installing behind
    mkdir -p .venv
    echo $$ >"$installing"
    [ -x "$python" ] || python3 -m venv .venv
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip
    local code=0
    # DeepSpeed compiles what it needs when it needs it.
    DS_BUILD_OPS=0 "$python" -m pip install --disable-pip-version-check -r "$1" || code=$?
    # Where pip itself gave up (no network, no such version) it has left .venv as it was: no need to begin again.
    [ "$code" -gt 128 ] || rm -f "$installing"
    [ "$code" -eq 0 ] || exit "$code"
    wanted "$1" >".venv/.${1%.txt}"  # what .venv was completed with
    trap - INT TERM
}

# The checksum of requirements, those that they include (-r FILE) among them.
wanted() { cat requirements.txt "$1" $(sed -n 's/^-r //p' "$1") | cksum; }

# What requirements-dev.txt brought includes requirements.txt.
complete() { [ "$(cat ".venv/.${1%.txt}" 2>/dev/null)" = "$(wanted "$1")" ]; }

if [ -e "$installing" ] || ! "$python" -c '' 2>/dev/null || ! { complete "$1" || complete requirements-dev.txt; }; then
    install "$1"
fi

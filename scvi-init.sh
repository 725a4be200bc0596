#!/usr/bin/env bash
# Creates .venv next to this script and installs census-scvi with all dependencies. Also runs with macOS' bash 3.2.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./scvi-init.sh [PYTHON]      create or update .venv with PYTHON (a name or a path; 3.11 or newer)
       ./scvi-init.sh --check-gpu   say which GPU torch can use

PYTHON can also be given as an environment variable. Default: the Python of .venv, or else the first suitable one of
python3.11, python3.12, python3.13, python3 and python. With another Python than before, .venv is created again. If .venv
is up to date, the script prints nothing. Python 3.11 gets the versions in constraints.txt, newer ones the newest libraries.
END
}

say() { printf 'scvi-init.sh: %s\n' "$*"; }

fail() { # fail CODE MESSAGE
  say "$2" >&2
  exit "$1"
}

# Runs with any Python, including 2. If .venv is active, its base Python is used.
readonly PROBE='
import sys
try:
    import venv, ensurepip
    can = "venv"
except ImportError:
    can = "bare"
print("%d.%d %s %s" % (sys.version_info[0], sys.version_info[1], can, getattr(sys, "_base_executable", sys.executable)))
'

# Sets version and base, or why the Python is not suitable. A candidate must run: a pyenv shim can exist and fail.
try_python() {
  local answer
  if ! command -v "$1" >/dev/null; then
    why="not found"
    return 1
  fi
  if ! answer=$("$1" -c "$PROBE" 2>/dev/null); then
    why=$("$1" -c "" 2>&1 </dev/null) || true
    why="does not run (${why%%$'\n'*})"
    return 1
  fi
  version=${answer%% *} answer=${answer#* }
  case $version in
    3.1[1-9] | 3.[2-9][0-9]) ;;
    *)
      why="is Python $version"
      return 1
      ;;
  esac
  if [ "${answer%% *}" != venv ]; then
    why="is Python $version without venv and ensurepip (Debian and Ubuntu: apt install python$version-venv)"
    return 1
  fi
  base=${answer#* }
}

find_python() {
  local tried='' candidate
  if [ -n "$asked" ]; then
    try_python "$asked" || fail 2 "$asked: $why; a Python 3.11 or newer with venv is needed"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if try_python "$candidate"; then return; fi
    tried+="  $candidate: $why"$'\n'
  done
  say "no Python 3.11 or newer was found:" >&2
  cat >&2 <<END
$tried
Get one, then run ./scvi-init.sh again, or ./scvi-init.sh /path/to/python:
  Debian 12, Ubuntu 22.04   sudo apt install python3.11 python3.11-venv
  Debian 13, Ubuntu 24.04   sudo apt install python3 python3-venv
  Fedora, RHEL              sudo dnf install python3.11
  macOS                     brew install python@3.11
On an older system (Ubuntu 20.04), or without root, one of these two pairs of commands:
  python3 -m pip install --user uv && python3 -m uv python install 3.11
  ./scvi-init.sh "\$(python3 -m uv python find 3.11)"
or
  conda create -y -p ~/python3.11 python=3.11
  ./scvi-init.sh ~/python3.11/bin/python
END
  exit 2
}

# Sets have: the version of .venv's Python, empty where none runs (its base may be gone).
look_at_venv() {
  have=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || have=''
}

# Identity of an installation; written last, so a killed installation has none.
stamp() { printf '%s\n' "$here" "Python $1" "$(cat pyproject.toml constraints.txt | cksum)"; }

is_current() {
  [ -n "$have" ] && [ "$have" = "${version:-$have}" ] &&
    [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(stamp "$have")" ]
}

# Says why .venv must be created again; prints nothing if it can be updated.
why_create() {
  if [ ! -e .venv ]; then
    echo "there is no .venv yet"
  elif [ -z "$have" ]; then
    echo "the Python in .venv does not run"
  elif [ "$have" != "${version:-$have}" ]; then
    echo ".venv has Python $have, $asked is Python $version"
  elif [ ! -f "$STAMP" ]; then
    echo ".venv was not finished by scvi-init.sh"
  elif [ "$(head -n 1 "$STAMP")" != "$here" ]; then
    echo ".venv was made in another folder" # its scripts name that folder
  fi
}

make_venv() {
  [ -n "${base:-}" ] || find_python
  say "$1: making it with Python $version ($base)"
  "$base" -m venv --clear .venv || fail 1 "$base could not make $here/.venv (is the disk full, or not writable?)"
  have=$version
}

install() {
  # A failed pip changes nothing, so the old stamp is restored; a killed one may leave anything.
  if [ -f "$STAMP" ]; then
    mv -f "$STAMP" "$STAMP.old"
    say "the requirements have changed: updating .venv"
  else
    say "installing census-scvi: some minutes and several GB; log: .venv/scvi-init.log"
  fi
  if [ "$have" = 3.11 ]; then set -- -c constraints.txt; else set --; fi
  if ! .venv/bin/python -m pip install "$@" -e '.[dev]' >"$LOG" 2>&1 </dev/null; then
    if [ -f "$STAMP.old" ]; then mv -f "$STAMP.old" "$STAMP"; fi
    install_failed
  fi
  # This imports torch, and so tests the installation.
  gpu=$(.venv/bin/python -m census_scvi.training.gpu 2>>"$LOG") || fail 1 "torch is installed but does not start; see $here/$LOG"
  stamp "$have" >"$STAMP.new"
  mv -f "$STAMP.new" "$STAMP"
  rm -f "$STAMP.old"
  say "$gpu"
  say "done; activate it with: source .venv/bin/activate"
}

install_failed() {
  local reason="pip failed"
  if grep -qiE 'no space left|quota exceeded' "$LOG"; then
    reason="the disk is full ($here needs 3 GB, 7 GB with torch's CUDA libraries; ${TMPDIR:-/tmp} about half of it)"
  fi
  grep '^ERROR' "$LOG" >&2 || tail -n 5 "$LOG" >&2
  fail 1 "$reason; the whole log is $here/$LOG; fix the cause and run scvi-init.sh again"
}

readonly STAMP=.venv/scvi-init.stamp LOG=.venv/scvi-init.log
case ${1:-} in
  -h | --help) usage && exit ;;
  --check-gpu) asked='' ;;
  -*) usage >&2 && exit 2 ;;
  *) asked=${1:-${PYTHON:-}} ;;
esac
case $asked in
  /*) ;;
  */*) asked=$PWD/$asked ;;
esac
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd -- "$here"
# Packages from other locations must not be mistaken for installed ones.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

if [ "${1:-}" = --check-gpu ]; then
  [ -f "$STAMP" ] || fail 2 "there is no finished .venv yet; run ./scvi-init.sh first"
  exec .venv/bin/python -m census_scvi.training.gpu
fi
if [ -n "$asked" ]; then find_python; fi
look_at_venv
if is_current; then exit; fi
if command -v flock >/dev/null; then # Linux; other systems have no protection against two simultaneous runs
  exec 9<. # the folder itself, so that no lock file stays behind
  flock -n 9 || { say "another scvi-init.sh is running here: waiting for it" && flock 9; } || true
  look_at_venv
  if is_current; then exit; fi
fi
reason=$(why_create)
if [ -n "$reason" ]; then make_venv "$reason"; fi
install

#!/bin/sh
# Usage: fetch_python_headers.sh VENV
# Makes sure that the Python headers can be had. Does nothing where the Python of VENV has its own, or
# HPC_MOE_PYTHON_INCLUDE names their folder. Else, on Debian and Ubuntu, unpacks the distribution's package of them into
# VENV/python-headers (needs no root); the Makefile finds them there. Elsewhere it says what to install.
set -eu
venv=$1
[ -z "${HPC_MOE_PYTHON_INCLUDE:-}" ] || exit 0
include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -f "$include/Python.h" ] && exit 0

give_up() {
    rm -rf "$venv/python-headers"
    echo "The Python headers are missing ($include/Python.h), and $1." >&2
    echo "  Remedy: apt-get install python3-dev (Debian, Ubuntu), dnf install python3-devel (RHEL), or make .venv with a" >&2
    echo "  Python that brings them: make distclean, then make PYTHON=/path/to/python3 ..." >&2
    exit 1
}

case $include in /usr/include/python3.*) ;; *) give_up "this Python is not the distribution's" ;; esac
command -v apt-get >/dev/null || give_up "there is no apt-get to fetch them with"
package=libpython$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev
echo "The Python headers are not installed; fetching $package into $venv/python-headers"
headers=$(cd "$venv" && pwd)/python-headers
mkdir -p "$headers"
cd "$headers"
if ! apt-get download -q "$package" 2>apt.log; then
    [ "$(id -u)" = 0 ] && apt-get update -q && apt-get download -q "$package" || { cat apt.log >&2; give_up "apt-get download $package failed"; }
fi
dpkg-deb -x "$package"_*.deb .
rm -f ./*.deb apt.log

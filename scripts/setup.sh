#!/usr/bin/env bash
# `make setup`: one virtual environment (.venv), ROS 2 from wheels unless a distribution is sourced, the package
# built with colcon into install/. Done once; quick when nothing changed; an interrupted run is taken up again.
#
#   PYTHON=python3.12 make setup    chooses the interpreter (3.10 to 3.13)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}
phase() { echo "setup: $*"; }
as_root() { [ "$(id -u)" = 0 ] || echo "sudo "; }

# The interpreter that lies behind a virtual environment or a version manager's shim; nothing if it does not run.
base_interpreter() {
    "$1" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))' 2>/dev/null || true
}
supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# --- which interpreter, which ROS -------------------------------------------------------------------------------
made_from=$(base_interpreter .venv/bin/python)
if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program"
    supported "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), Python 3.10 to 3.13 is needed"
    python=$(base_interpreter "$PYTHON")
elif [ -n "$made_from" ]; then
    python=$made_from # an environment keeps the interpreter that it was made with
else
    python=
    for name in python3 python3.12 python3.11 python3.13 python3.10; do
        if command -v "$name" >/dev/null && supported "$name"; then
            python=$(base_interpreter "$name")
            break
        fi
    done
    [ -n "$python" ] || fail "no Python 3.10 to 3.13 found ($(python3 --version 2>&1 || true)), install one:" \
        "$(as_root)apt-get install -y python3 python3-venv python3-dev (or name one: PYTHON=/path/to/python make setup)"
fi

ros=wheels
if [ -n "${ROS_DISTRO:-}" ] && [ -n "${AMENT_PREFIX_PATH:-}" ]; then
    ros=$ROS_DISTRO
    case "$ros" in
        foxy | galactic | iron) fail "ROS 2 $ros is sourced, Humble, Jazzy or newer is needed" ;;
    esac
    # A distribution is for the system's Python, which pyenv and conda hide, as an environment made before does.
    if [ -z "${PYTHON:-}" ] && ! "$python" -c 'import rclpy' 2>/dev/null && supported /usr/bin/python3; then
        python=$(base_interpreter /usr/bin/python3)
    fi
    "$python" -c 'import rclpy' 2>/dev/null || fail "ROS 2 $ros is sourced, but $python cannot import its rclpy:" \
        "name the Python that it is for (PYTHON=/path/to/python make setup), or use a shell in which it is not" \
        "sourced, and ROS 2 comes from wheels"
fi
if [ "$ros" = wheels ] && [ "$(uname -sm)" != "Linux x86_64" ]; then
    fail "ROS 2 wheels exist for Linux on x86_64 only, this is $(uname -sm):" \
        "install ROS 2 (Humble, Jazzy or newer) and source its setup.bash before make setup"
fi

# --- what the system must bring, all of it named at once, before anything long ------------------------------------
missing=()
packages=()
need() {
    missing+=("$1")
    shift
    packages+=("$@")
}
command -v c++ >/dev/null && command -v cc >/dev/null || need "a C/C++ compiler" g++
command -v make >/dev/null || need make make
"$python" -c 'import ensurepip, venv' 2>/dev/null || need "Python's venv" python3-venv
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' ||
    need "Python's header files" python3-dev
"$python" -c 'import ctypes; ctypes.CDLL("libEGL.so.1")' 2>/dev/null ||
    need "libEGL (renders the demo's cameras)" libegl1 libgl1-mesa-dri
if [ ${#missing[@]} -gt 0 ]; then
    named=$(printf ', %s' "${missing[@]}")
    fail "missing: ${named:2}; install with: $(as_root)apt-get install -y ${packages[*]}"
fi

# --- the virtual environment --------------------------------------------------------------------------------------
# A stamp holds a digest of all that went into a part; an equal stamp means nothing to do. It is written last.
digest() { sha256sum | cut -c 1-16; }
requirements=(requirements/run.txt requirements/dev.txt)
[ "$ros" != wheels ] || requirements+=(requirements/ros.txt)
identity="$("$python" -c 'import sys; print(*sys.version_info[:2])') $python $ros $PWD"
environment=$({ echo "$identity" && cat "${requirements[@]}" scripts/mend_cmake.py; } | digest)

if [ "$(cat .venv/.stamp 2>/dev/null)" != "$environment" ]; then
    begun=$SECONDS
    # An installation that was cut short cannot be told from a good one by pip: it begins anew. So does another
    # interpreter, another ROS, or a folder that was moved; changed requirements alone are an update.
    if [ -e .venv/.incomplete ] || [ ! -x .venv/bin/pip ] ||
        { [ -e .venv/.identity ] && [ "$(cat .venv/.identity)" != "$identity" ]; }; then
        rm -rf .venv
    fi
    mkdir -p .venv
    touch .venv/.incomplete
    rm -f .venv/.stamp
    if [ ! -x .venv/bin/pip ]; then
        phase "virtual environment in .venv ($("$python" --version))"
        site=()
        [ "$ros" = wheels ] || site=(--system-site-packages)
        "$python" -m venv "${site[@]}" .venv
    fi
    echo "$identity" >.venv/.identity
    if [ "$ros" = wheels ]; then
        phase "installing requirements and ROS 2 Kilted wheels (some minutes)"
    else
        phase "installing requirements (some minutes); ROS 2 is the sourced $ros"
    fi
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check "${requirements[@]/#/--requirement=}"
    [ "$ros" != wheels ] || .venv/bin/python scripts/mend_cmake.py
    phase "lighter meshes for the demo's arm"
    .venv/bin/python -m pi0_ros.demo.assets >/dev/null
    rm .venv/.incomplete
    echo "$environment" >.venv/.stamp
    phase "requirements are in place ($((SECONDS - begun)) s)"
fi

# --- the package --------------------------------------------------------------------------------------------------
# File names count, their content does not where the installation links to the source folder.
build=$({
    echo "$identity"
    cat CMakeLists.txt package.xml programs.txt msg/*.msg srv/*.srv
    find test/control_msgs -type f | LC_ALL=C sort | xargs cat
    find pi0_ros launch config -type f -not -name '*.pyc' | LC_ALL=C sort
} | digest)
if [ "$(cat install/.stamp 2>/dev/null)" != "$build" ]; then
    begun=$SECONDS
    phase "building messages and package"
    rm -f install/.stamp
    # CMake remembers the interpreter and the ROS of its first run.
    [ "$(cat build/.identity 2>/dev/null)" = "$identity" ] || rm -rf build install
    mkdir -p build log
    echo "$identity" >build/.identity
    # The gripper actions come with ros2_control, which the wheels do not have.
    paths=(.)
    [ "$ros" != wheels ] || paths+=(test/control_msgs)
    (
        export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
        if [ "$ros" = wheels ]; then
            export AMENT_PREFIX_PATH="$PWD/.venv" CMAKE_PREFIX_PATH="$PWD/.venv"
        fi
        .venv/bin/python -m colcon --log-level error build --symlink-install --paths "${paths[@]}" --event-handlers \
            console_direct- console_cohesion- summary- status- console_start_end- \
            --cmake-force-configure --cmake-args -DBUILD_TESTING=OFF \
            {-DPython3_EXECUTABLE,-DPYTHON_EXECUTABLE}="$PWD/.venv/bin/python" # Humble reads the second
    ) >log/setup.log 2>&1 || {
        cat log/setup.log >&2
        fail "colcon could not build the package, its output stands above"
    }
    # As `setup.py build_ext --inplace` does: the source folder then imports as the installed package does.
    find pi0_ros -maxdepth 1 -type l -delete
    for part in install/pi0_ros/lib/python3*/site-packages/pi0_ros/{msg,srv,*.so}; do
        ln -s "../$part" "pi0_ros/$(basename "$part")"
    done
    echo "$build" >install/.stamp
    phase "package is built ($((SECONDS - begun)) s)"
fi

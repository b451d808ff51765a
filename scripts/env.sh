# Source this file: activates the virtual environment and the built package.
if [ -z "${BASH_VERSION:-}" ]; then
    echo "error: scripts/env.sh is for bash" >&2
    return 1
fi
_pi0_ros_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -e "$_pi0_ros_root/install/setup.bash" ] || [ ! -e "$_pi0_ros_root/.venv/bin/activate" ]; then
    echo "error: pi0_ros is not set up yet, run: make setup" >&2
    unset _pi0_ros_root _pi0_ros_nounset
    return 1
fi
if [ -d "$_pi0_ros_root/.venv/share/ament_index" ] && [ -n "${ROS_DISTRO:-}" ]; then
    echo "error: pi0_ros is set up with ROS 2 from wheels, and ROS 2 $ROS_DISTRO is sourced: run make setup again," \
        "or use a shell in which it is not" >&2
    unset _pi0_ros_root _pi0_ros_nounset
    return 1
fi
. "$_pi0_ros_root/.venv/bin/activate"
# With ROS 2 from wheels the virtual environment is itself a prefix that ROS looks for packages in, and discovery stays on
# this machine. With a distribution it is left as it is: arm and GPU may be on two machines.
if [ -d "$_pi0_ros_root/.venv/share/ament_index" ]; then
    case ":${AMENT_PREFIX_PATH:-}:" in
        *":$_pi0_ros_root/.venv:"*) ;;
        *) export AMENT_PREFIX_PATH="$_pi0_ros_root/.venv${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}" ;;
    esac
    export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"
    command -v ros2 >/dev/null || export PATH="$_pi0_ros_root/scripts/wheels:$PATH" # the wheels bring none
fi
case $- in *u*) set +u && _pi0_ros_nounset=yes ;; *) _pi0_ros_nounset= ;; esac # colcon's file reads unset variables
. "$_pi0_ros_root/install/setup.bash"
[ -z "$_pi0_ros_nounset" ] || set -u
export MUJOCO_GL="${MUJOCO_GL:-egl}"
unset _pi0_ros_root _pi0_ros_nounset

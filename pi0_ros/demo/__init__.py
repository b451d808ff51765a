"""A simulated SO-101 that behaves on the ROS graph as a real one, its scripted teacher, and the demo."""

import os
import sys

# Headless machines render through EGL. mujoco reads this when it is first imported; the user's choice goes first.
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
# Where there is no GPU, Mesa renders on the CPU: in the calling thread, so that other cores are left to others.
os.environ.setdefault("LP_NUM_THREADS", "0")

"""Point the CMake files of the ROS wheels at this machine.

The files name the include folders of Python and numpy of the machine that built the wheels
(/opt/python/cpXY-cpXY/...); both are rewritten to those of the running interpreter.
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy

PYTHON_INCLUDE = re.compile(r"/opt/python/cp\d+-cp\d+/include/python3\.\d+")
NUMPY_INCLUDE = re.compile(r"/opt/python/cp\d+-cp\d+/lib/python3\.\d+/site-packages/numpy/_core/include")


def main() -> None:
    python_include = sysconfig.get_paths()["include"]
    for path in (Path(sys.prefix) / "share").glob("**/*.cmake"):
        text = path.read_text(encoding="utf-8")
        mended = NUMPY_INCLUDE.sub(lambda _: numpy.get_include(), text)
        mended = PYTHON_INCLUDE.sub(lambda _: python_include, mended)
        if mended != text:
            path.write_text(mended, encoding="utf-8")


main()

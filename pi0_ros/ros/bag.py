"""A rosbag2 recording (mcap) in the making, as `ros2 bag record` would write it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from pi0_ros.ros.graph import type_name

PARTIAL = ".partial"  # the folder, beside the recordings, of those that are not whole yet


class BagFile:
    """Messages as they were serialised on the wire, until `keep` or `discard`.

    The recording grows in a hidden folder beside `path` and moves there when it is whole; what a killed process left
    there is written over.

    Args:
        topics: name -> message class.
        custom_data: goes into the metadata, as `ros2 bag record --custom-data` has it.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, path: Path, topics: Mapping[str, type], custom_data: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._partial = path.parent / PARTIAL / path.name  # the file inside takes its name from the folder
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        store = get_typestore(Stores.ROS2_KILTED)
        # Version 9, which later distributions write, has qualities of service in a form that Humble's cannot read.
        self._writer = Writer(self._partial, version=8, storage_plugin=StoragePlugin.MCAP)
        for key, value in (custom_data or {}).items():
            self._writer.set_custom_data(key, value)
        self._writer.open()
        self._connections = {}
        for topic, kind in topics.items():
            typename = type_name(kind)
            if typename not in store.types:
                package, folder, name = typename.split("/")
                definition = Path(get_package_share_directory(package), folder, f"{name}.msg").read_text()
                store.register(get_types_from_msg(definition, typename))
            self._connections[topic] = self._writer.add_connection(topic, typename, typestore=store)

    def write(self, topic: str, now: int, data: bytes) -> None:
        """A message that came at `now`, ns. OSError when the disk does not take it."""
        self._writer.write(self._connections[topic], now, data)

    def keep(self) -> None:
        """Finish the recording and give it its name; one that has it goes."""
        self._writer.close()
        shutil.rmtree(self.path, ignore_errors=True)
        self._partial.rename(self.path)
        self._clear()

    def discard(self) -> None:
        """Leave nothing."""
        with contextlib.suppress(OSError):  # of what is buffered still, on a full disk
            self._writer.abort()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._clear()

    def _clear(self) -> None:
        with contextlib.suppress(OSError):  # others are in it
            self._partial.parent.rmdir()

"""rosbag2 recordings as they are found on disk: which files, which topics, which messages. No ROS needed.

The storage files are the truth, `metadata.yaml` is only a hint: it may be missing, name other files, or list split
files that are not there. What is odd but harmless becomes a note of the bag; what cannot be read raises `BagError`.
"""

from __future__ import annotations

import errno
import hashlib
import re
import struct
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from backports import zstd
from rosbags.interfaces import MessageDefinition, MessageDefinitionFormat
from rosbags.rosbag2 import Reader, storage_mcap
from rosbags.typesys import Stores, get_typestore

STORAGE = (".mcap", ".db3")
COMPRESSED = tuple(f"{suffix}.zstd" for suffix in STORAGE)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CDR = "cdr"
SPLIT_PAUSE_NS = 2_000_000_000  # between two files without metadata.yaml: more, and they are two recordings
DIGEST_BLOCK, DIGEST_BLOCKS = 1 << 16, 64

_TYPES = get_typestore(Stores.ROS2_KILTED)  # the few types used here are the same in every distribution


class BagError(ValueError):
    """A recording that cannot be read; the message is one line that says which and why."""


def _tolerate_foreign_channels() -> None:
    """Let rosbags open an mcap file that also holds schemas of other systems (protobuf, JSON).

    It refuses the whole file for one such schema, though nobody asked for that channel.
    """
    strict = storage_mcap.get_msgdef

    def tolerant(schema: Any) -> MessageDefinition:
        try:
            return strict(schema)
        except KeyError:
            return MessageDefinition(MessageDefinitionFormat.NONE, "")

    storage_mcap.get_msgdef = tolerant
    storage_mcap.read_string = lambda bio: storage_mcap.read_bytes(bio).decode(errors="replace")


_tolerate_foreign_channels()


PROMPT_KEYS = ("prompt", "task", "lerobot.operator_prompt")  # ours, so101-ros-physical-ai's, rosetta's


@dataclass(frozen=True)
class BagFiles:
    """The storage files of one recording, in order, and what its metadata says."""

    path: Path  # the folder, or the single file
    files: tuple[Path, ...]
    metadata: dict[str, Any] = field(default_factory=dict)  # rosbag2_bagfile_information, {} without
    notes: tuple[str, ...] = ()

    @property
    def custom_data(self) -> dict[str, str]:
        """What the recorder wrote beside the messages (`ros2 bag record --custom-data prompt=...`)."""
        data = self.metadata.get("custom_data")
        return {str(key): str(value) for key, value in data.items()} if isinstance(data, dict) else {}

    @property
    def prompt(self) -> str:
        """The instruction among that, by the name that it has here or in other recorders; empty without one."""
        data = self.custom_data
        return next((data[key].strip() for key in PROMPT_KEYS if data.get(key, "").strip()), "")

    def digest(self) -> str:
        """sha256 over names, sizes and content of the files, as 16 hex digits.

        Of a file over 4 MiB, 64 blocks of 64 KiB spread over it stand for its content, the first and last among them: a
        recording is written once, and reading all of a terabyte to find that out again would cost more than it saves.
        """
        total = hashlib.sha256()
        for file in self.files:
            with _named(file):
                self._add(total, file)
        return total.hexdigest()[:16]

    @staticmethod
    def _add(total: Any, file: Path) -> None:
        size = file.stat().st_size
        total.update(f"{file.name}\0{size}\0".encode())
        whole = size <= DIGEST_BLOCK * DIGEST_BLOCKS
        with file.open("rb") as stream:
            for i in range(DIGEST_BLOCKS):
                if not whole:
                    stream.seek(i * (size - DIGEST_BLOCK) // (DIGEST_BLOCKS - 1))
                total.update(stream.read(DIGEST_BLOCK))


def find_bags(root: str | Path) -> list[BagFiles]:
    """Every recording at or below `root`, ordered by path. Hidden folders are not entered.

    A folder with storage files is one recording when it has a metadata.yaml or its files are numbered splits of one
    name, each of which begins where the one before ends; loose files are recordings of their own.

    Raises:
        BagError: `root` does not exist or holds no recording.
    """
    root = Path(root)
    if not root.exists():
        raise BagError(f"{root}: no such file or folder")
    if root.is_file():
        if not root.name.endswith((*STORAGE, *COMPRESSED, ".bag")):
            raise BagError(f"{root}: not a recording, expected a file that ends in .mcap, .db3 or their .zstd")
        return [BagFiles(root, (root,))]
    folders = [root, *(p for p in sorted(root.rglob("*")) if p.is_dir() and not _hidden(p, root))]
    bags = [bag for folder in folders for bag in _bags_in(folder)]
    if not bags:
        raise BagError(f"{root}: no recording found (no folder below it has .mcap or .db3 files)")
    return bags


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _bags_in(folder: Path) -> list[BagFiles]:
    found = sorted(
        (p for p in folder.iterdir() if p.is_file() and p.name.endswith(STORAGE + COMPRESSED)), key=_split_key
    )
    found = [p for p in found if not (p.name.endswith(".zstd") and p.with_suffix("") in found)]
    ros1 = [BagFiles(path, (path,)) for path in sorted(folder.glob("*.bag")) if path.is_file()]
    if (folder / "metadata.yaml").is_file():
        bag = _with_metadata(folder, found)
        return [bag, *ros1] if bag.files or bag.metadata else ros1  # other tools write a metadata.yaml too
    if not found:
        return ros1
    if len(found) > 1 and len({_split_key(path)[0] for path in found}) == len(found):
        return [BagFiles(path, (path,)) for path in found] + ros1
    by_name: dict[str, list[Path]] = {}
    for path in found:
        by_name.setdefault(_split_key(path)[0], []).append(path)
    notes = ("metadata.yaml is missing, the files themselves were read",)
    groups = [group for files in by_name.values() for group in _following(files)]
    whole = len(groups) == 1
    return [BagFiles(folder if whole else files[0], tuple(files), {}, notes) for files in groups] + ros1


def _following(files: list[Path]) -> list[list[Path]]:
    """Numbered files, in order, as recordings: a split goes on where the one before ends, another recording later."""
    groups = [files[:1]]
    for (before, ends), (after, begins) in pairwise((file, _span(file)) for file in files):
        apart = ends is not None and begins is not None and begins[0] - ends[1] > SPLIT_PAUSE_NS
        if apart and _split_key(after)[1] == _split_key(before)[1] + 1:  # else the files between them are missing
            groups.append([])
        groups[-1].append(after)
    return groups


def _span(file: Path) -> tuple[int, int] | None:
    """First and last time of recording, ns; None where that cannot be had without reading it all."""
    if file.suffix == ".zstd":
        return None
    try:
        with Reader(file) as reader:
            return (reader.start_time, reader.end_time) if reader.message_count else None
    except Exception:  # noqa: BLE001 - a damaged file can make its parser raise anything; `Bag` tells of it
        return None


def _split_key(path: Path) -> tuple[str, int]:
    stem = path.name.split(".mcap")[0].split(".db3")[0]
    match = re.fullmatch(r"(.*?)_(\d+)", stem)
    return (match[1], int(match[2])) if match else (stem, -1)


def _with_metadata(folder: Path, found: list[Path]) -> BagFiles:
    notes: list[str] = []
    try:
        document = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
        info = document["rosbag2_bagfile_information"]
        listed = [folder / Path(str(name)).name for name in info.get("relative_file_paths") or []]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        notes.append(f"metadata.yaml cannot be used ({_one_line(error)}), the files themselves were read")
        info, listed = {}, []
    here, missing = [p for p in listed if p.is_file()], [p for p in listed if not p.is_file()]
    if not listed:
        here = found
    elif missing and here:
        notes.append(
            f"{len(missing)} of {len(listed)} split files are missing ({missing[0].name}, ...), the rest is read"
        )
    elif missing and found:
        notes.append(
            f"metadata.yaml names {missing[0].name}, which is not there; read {', '.join(p.name for p in found)}"
        )
        here = found
    if extra := [p.name for p in found if p not in here]:
        notes.append(f"metadata.yaml does not list {', '.join(extra)}: not read")
    return BagFiles(folder, tuple(here), info, tuple(notes))


@dataclass
class Topic:
    """A topic of a recording. `type` is spelt pkg/msg/Name whatever the file says; only cdr can be read."""

    name: str
    type: str
    count: int
    encoding: str = CDR


class Bag:
    """An open recording: its topics and its messages. Use as a context manager.

    Raises:
        BagError: on opening or reading, for a file that is missing, truncated or damaged.
    """

    def __init__(self, files: BagFiles, scratch: Path | None = None) -> None:
        """scratch: folder for files that must be decompressed as a whole; None for the system's."""
        self.files, self.notes, self._scratch = files, list(files.notes), scratch
        self.topics: dict[str, Topic] = {}
        self._readers: list[Reader] = []
        self._stack = ExitStack()

    def __enter__(self) -> Bag:
        if not self.files.files:
            listed = self.files.metadata.get("relative_file_paths") or []
            names = ", ".join(map(str, listed)) or "none"
            raise BagError(f"{self.files.path}: no storage file there; metadata.yaml names {names}")
        try:
            for file in self.files.files:
                self._open(file)
        except BaseException:
            self._stack.close()
            raise
        self._check_counts()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._readers.clear()

    def _open(self, file: Path) -> None:
        if file.suffix == ".bag":
            raise BagError(f"{file}: a ROS 1 bag; convert it with `rosbags-convert --src {file.name} --dst FOLDER`")
        with _named(file):
            reader = Reader(self._plain(file))
            self._stack.enter_context(reader)
        self._readers.append(reader)
        wal = file.with_name(file.name + "-wal")
        if wal.is_file() and wal.stat().st_size:
            self.notes.append(f"{wal.name} holds messages that were never merged: the recorder was killed; not read")
        with _named(file):  # of a damaged file anything may be missing
            for connection in reader.connections:
                kind = normal_type(connection.msgtype)
                if kind != connection.msgtype:
                    self._note(f"{connection.topic}: type written {connection.msgtype!r}, read as {kind}")
                found = Topic(connection.topic, kind, 0, connection.ext.serialization_format)
                known = self.topics.setdefault(connection.topic, found)
                if known.type != kind:
                    self._note(
                        f"{connection.topic}: recorded with two types, {known.type} and {kind}; only the first is read"
                    )
                    continue
                known.count += connection.msgcount

    @property
    def seconds(self) -> float:
        """From the first message of any topic to the last, by the time of recording."""
        spans = [(reader.start_time, reader.end_time) for reader in self._readers if reader.message_count]
        return (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e9 if spans else 0.0

    def _plain(self, file: Path) -> Path:
        """The file as rosbags can open it: decompressed, and without characters that SQLite takes for a URI's."""
        if file.suffix != ".zstd" and not set("?#%") & set(str(file)):
            return file
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pi0_ros_bag_", dir=self._scratch)))
        if file.suffix != ".zstd":
            link = folder / f"bag{file.suffix}"
            link.symlink_to(file.absolute())
            return link
        plain = folder / file.with_suffix("").name
        try:
            with zstd.open(file, "rb") as source, plain.open("wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
        except (zstd.ZstdError, EOFError) as error:
            raise BagError(f"{file}: truncated or damaged zstd data ({_one_line(error)})") from None
        return plain

    def _check_counts(self) -> None:
        expected, found = self.files.metadata.get("message_count"), sum(topic.count for topic in self.topics.values())
        if isinstance(expected, int) and expected != found:
            self._note(f"metadata.yaml counts {expected} messages, the files hold {found}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def messages(self, topics: Collection[str]) -> Iterator[tuple[str, int, bytes]]:
        """(topic, time of recording in ns, CDR bytes) of the named topics, in one order every time, not sorted by time.

        Messages compressed one by one are decompressed, whatever the metadata says.
        """
        for file, reader in zip(self.files.files, self._readers, strict=True):
            with _named(file):
                wanted = [
                    connection
                    for connection in reader.connections
                    if connection.topic in topics
                    and normal_type(connection.msgtype) == self.topics[connection.topic].type
                    and connection.ext.serialization_format == CDR
                ]
                if not wanted:
                    continue
                storage = reader.storage
                # Without an index rosbags demands messages sorted by time; recorders need not have written them so.
                unindexed = isinstance(storage, storage_mcap.McapReader) and not storage.chunks
                for connection, stamp, raw in (storage.messages_scan if unindexed else storage.messages)(wanted):
                    yield connection.topic, stamp, zstd.decompress(raw) if raw[:4] == ZSTD_MAGIC else raw


class _named:  # noqa: N801
    """Turns whatever a damaged file makes its parser raise into one BagError that names the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return  # the disk is full, the recording is not to blame
        if isinstance(error, OSError):
            raise BagError(f"{self.file}: cannot be read: {error.strerror or error}") from None
        if isinstance(error, Exception) and not isinstance(error, BagError):
            reason = _one_line(error)
            if "Profile is not ros2" in reason:
                raise BagError(f"{self.file}: an mcap file, but not of ROS 2") from None
            hints = {".mcap": "`mcap recover` or `ros2 bag reindex`", ".db3": "`sqlite3 FILE .recover`"}
            hint = f"; {hints[self.file.suffix]} may mend it" if self.file.suffix in hints else ""
            raise BagError(f"{self.file}: truncated or damaged ({reason}){hint}") from None


def decode(raw: bytes, kind: str) -> Any:
    """The message of CDR bytes. Raises BagError when they are not of that type."""
    try:
        return _TYPES.deserialize_cdr(raw, kind)
    except Exception as error:  # damaged bytes can make the parser raise anything
        raise BagError(f"not a {kind} ({_one_line(error)})") from None


def header_stamp(raw: bytes) -> int:
    """The stamp in ns of a message that begins with a std_msgs/Header, without decoding the rest."""
    if len(raw) < 12 or raw[0] != 0 or raw[1] not in (0, 1):
        raise BagError(f"{len(raw)} bytes are not a CDR message with a header")
    seconds, nanoseconds = struct.unpack("<iI" if raw[1] else ">iI", raw[4:12])
    return seconds * 1_000_000_000 + nanoseconds


def normal_type(name: str) -> str:
    """sensor_msgs/Image as sensor_msgs/msg/Image."""
    parts = name.split("/")
    return f"{parts[0]}/msg/{parts[1]}" if len(parts) == 2 else name


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0][:160].rstrip('.')}" if lines else type(error).__name__

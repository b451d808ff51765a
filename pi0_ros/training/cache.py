"""Recordings decoded once: model-size frames, states and actions in plain arrays; frames are memory-mapped.

One folder for each bag, named by what its content depends on: the bag's digest, the parts of the robot file that
matter, the image size and the selection; a change of any builds anew. A folder is written under another name and
renamed when whole, so a run that was killed, or a full disk, costs only the bags that were in work.

    <key>/index.json                 source, episodes, prompts, what was dropped
    <key>/<slot>.u8                  uint8 [F, S, S, 3], every frame that some usable tick sees, once
    <key>/rows.npy                   int32 [T, N], row of each tick in the frames of camera n, -1 where it is not usable
    <key>/{state,actions}.npy        float64 [T, J] robot units
    <key>/{known,usable}.npy         bool [T];  prompt.npy int32 [T], index into the prompts
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pi0_ros.policy.images import ImageError, decode_image, orient, resize_with_pad
from pi0_ros.robot import Camera, Robot
from pi0_ros.training.bags import Bag, BagError, BagFiles, decode
from pi0_ros.training.episodes import Episode, Selection, cut_episodes
from pi0_ros.training.recording import Recording, read_recording

FORMAT = 7  # raised when the same inputs would give other content
FOLDER = ".pi0_cache"
ARRAYS = ("rows", "state", "actions", "known", "usable", "prompt")


class CacheError(RuntimeError):
    """The cache cannot be written or read; the message is one line: what, why, the way out."""


@dataclass(frozen=True)
class Unit:
    """The cached content of one bag. Frames are mapped when first used, and again in every process; no file stays open,
    since there are thousands of bags and often only 1024 files that may be."""

    folder: Path
    index: dict[str, Any]

    @property
    def slots(self) -> list[str]:
        return self.index["slots"]

    @property
    def episodes(self) -> list[dict[str, Any]]:
        """label, begin and end: the ticks [begin, end) of each episode."""
        return self.index["episodes"]

    @property
    def prompts(self) -> list[str]:
        return self.index["prompts"]

    @cached_property
    def frames(self) -> dict[str, np.ndarray]:
        """slot -> uint8 [F, S, S, 3]."""
        size = self.index["image_size"]
        return {slot: _mapped(self.folder / f"{slot}.u8").reshape(-1, size, size, 3) for slot in self.slots}

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """rows, state, actions, known, usable, prompt."""
        return {name: np.load(self.folder / f"{name}.npy") for name in ARRAYS}

    def __reduce__(self) -> tuple[Any, ...]:
        return Unit, (self.folder, self.index)


def _mapped(path: Path) -> np.ndarray:
    """uint8 [bytes] of a file, mapped. numpy's own map would keep the file open."""
    size = path.stat().st_size
    return torch.from_file(str(path), size=size, dtype=torch.uint8).numpy() if size else np.empty(0, np.uint8)


def open_unit(folder: Path) -> Unit:
    """A finished folder of the cache. CacheError when it was changed by hand."""
    try:
        unit = Unit(folder, json.loads((folder / "index.json").read_text()))
        sizes = {slot: (folder / f"{slot}.u8").stat().st_size for slot in unit.slots}
        expected = {slot: unit.index["frames"][slot] * unit.index["image_size"] ** 2 * 3 for slot in unit.slots}
        if sizes != expected or not all((folder / f"{name}.npy").is_file() for name in ARRAYS):
            raise ValueError("files are missing or cut short")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{folder}: damaged cache ({error}); remove the folder and start again") from None
    return unit


def unit_key(files: BagFiles, robot: Robot, image_size: int, selection: Selection, digest: str | None = None) -> str:
    """Name of a bag's folder: changes with whatever its content depends on, and with nothing else.

    `digest`: of the files, if it is known already.
    """
    camera = {slot: c.model_dump(exclude={"reliability"}) for slot, c in robot.present_cameras.items()}
    parts = {
        "format": FORMAT,
        "bag": digest or files.digest(),
        "told": files.prompt,
        "cameras": camera,
        "joints": [(joint.name, joint.position, *["turns"] * (joint.kind == "continuous")) for joint in robot.joints],
        "robot": robot.model_dump(
            mode="json", include={"control_rate", "state", "actions", "max_skew", "clock", "episode_topic", "prompt"}
        ),
        "image_size": image_size,
        "selection": asdict(selection),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def build_unit(
    files: BagFiles, robot: Robot, image_size: int, selection: Selection, folder: Path, threads: int = 1
) -> tuple[Unit, int]:
    """Read one bag into `folder / unit_key(...)`, unless it is there: the unit, and how many frames were decoded now.

    Raises:
        BagError: the bag cannot be read, contradicts the robot file, or holds no usable tick.
        CacheError: the cache cannot be written.
    """
    digest = files.digest()
    whole = folder / unit_key(files, robot, image_size, selection, digest)
    if whole.is_dir():
        return open_unit(whole), 0
    partial = folder / f"{whole.name}.partial-{socket.gethostname()}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        decoded = _fill(partial, files, digest, robot, image_size, selection, threads)
        try:
            partial.rename(whole)
        except OSError:
            if not whole.is_dir():  # another run was quicker with the same bag
                raise
        return open_unit(whole), decoded
    except OSError as error:
        raise CacheError(
            f"{folder}: the cache cannot be written: {error.strerror or error}; "
            "make room or choose another folder (--cache)"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(
    partial: Path, files: BagFiles, digest: str, robot: Robot, image_size: int, selection: Selection, threads: int
) -> int:
    with Bag(files, scratch=partial) as bag:
        recording = read_recording(bag, robot)
        episodes = cut_episodes(recording, robot, selection)
        require_usable(recording, episodes)
        rows, counts, faults = _write_frames(partial, bag, recording, episodes, robot, image_size, threads)
    usable = np.concatenate([episode.usable for episode in episodes]) & (rows >= 0).all(axis=1)
    dropped = sum((episode.dropped for episode in episodes), Counter())
    dropped.update(faults)
    if not usable.any():
        raise BagError(f"{files.path}: no usable tick ({_reasons(dropped)})")
    spoken = [prompt for episode in episodes for prompt in episode.prompts]
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(spoken))}
    arrays = {
        "rows": np.where(usable[:, None], rows, -1).astype(np.int32),
        "state": np.concatenate([episode.state for episode in episodes]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "known": np.concatenate([episode.known for episode in episodes]),
        "usable": usable,
        "prompt": np.array([prompts[prompt] for prompt in spoken], np.int32),
    }
    for name, array in arrays.items():
        with (partial / f"{name}.npy").open("wb") as stream:
            np.save(stream, array)
            _sync(stream)
    ends = np.cumsum([len(episode.ticks_ns) for episode in episodes]).tolist()
    index = {
        "format": FORMAT,
        "source": str(files.path),
        "digest": digest,
        "control_rate": robot.control_rate,
        "image_size": image_size,
        "slots": list(robot.present_cameras),
        "joints": list(robot.joint_names),
        "frames": counts,
        "prompts": list(prompts),
        "episodes": [
            {"label": e.label, "begin": end - len(e.ticks_ns), "end": end}
            for e, end in zip(episodes, ends, strict=True)
        ],
        "dropped": dict(dropped),
        "notes": recording.notes,
        "warnings": recording.warnings,
    }
    with (partial / "index.json").open("w") as stream:
        json.dump(index, stream, indent=1)
        _sync(stream)
    return sum(counts.values())


def require_usable(recording: Recording, episodes: list[Episode]) -> None:
    """BagError with the reason unless something can be learnt from the recording."""
    if recording.problems:
        raise BagError(f"{recording.source}: {'; '.join(recording.problems)}")
    if not episodes:
        raise BagError(f"{recording.source}: no episode in which state and every camera were recorded")
    if not any(episode.usable.any() for episode in episodes):
        dropped = sum((episode.dropped for episode in episodes), Counter())
        raise BagError(f"{recording.source}: no usable tick ({_reasons(dropped)})")
    if not any((episode.usable & episode.known).any() for episode in episodes):
        raise BagError(f"{recording.source}: no tick with an observation has a command")


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common(4))


def _write_frames(
    partial: Path,
    bag: Bag,
    recording: Recording,
    episodes: list[Episode],
    robot: Robot,
    image_size: int,
    threads: int,
) -> tuple[np.ndarray, dict[str, int], Counter[str]]:
    """Frames that usable ticks see, each once, into one file a camera: (rows [T, N], frames by slot, ticks lost)."""
    usable = np.concatenate([episode.usable for episode in episodes])
    slots = list(robot.present_cameras)
    wanted = {slot: np.concatenate([episode.frames[slot] for episode in episodes]) for slot in slots}  # ordinals [T]
    place = {slot: np.full(int(wanted[slot].max(initial=-1)) + 1, -1, np.int64) for slot in slots}
    counts, faults = dict.fromkeys(slots, 0), Counter()
    needed = {slot: set(wanted[slot][usable].tolist()) for slot in slots}
    outputs = {slot: _frames_file(partial / f"{slot}.u8") for slot in slots}
    try:
        for slot, ordinal, result in _decoded(bag, recording, robot, needed, image_size, threads):
            if isinstance(result, str):
                faults[f"{slot}: {result}"] += int((usable & (wanted[slot] == ordinal)).sum())
                continue
            outputs[slot].write(result.data)
            place[slot][ordinal] = counts[slot]
            counts[slot] += 1
        for stream in outputs.values():
            _sync(stream)
    finally:
        for stream in outputs.values():
            stream.close()
    rows = [np.where(wanted[s] >= 0, place[s][wanted[s]], -1) if len(place[s]) else wanted[s] for s in slots]
    return np.stack(rows, axis=1), counts, faults


def _frames_file(path: Path) -> Any:
    return path.open("wb", buffering=0)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _decoded(
    bag: Bag, recording: Recording, robot: Robot, needed: dict[str, set[int]], image_size: int, threads: int
) -> Iterator[tuple[str, int, np.ndarray | str]]:
    """(slot, ordinal, frame or what is wrong with it), in the order of recording, a few frames in memory at a time."""
    jobs = image_messages(bag, recording, needed)
    cameras = robot.present_cameras
    if threads <= 1:
        for slot, ordinal, kind, raw in jobs:
            yield slot, ordinal, model_frame(raw, kind, cameras[slot], image_size)
        return
    waiting: deque[tuple[str, int, Any]] = deque()
    with _one_core_each(), ThreadPoolExecutor(threads) as pool:
        for slot, ordinal, kind, raw in jobs:
            waiting.append((slot, ordinal, pool.submit(model_frame, raw, kind, cameras[slot], image_size)))
            if len(waiting) > 4 * threads:
                slot, ordinal, future = waiting.popleft()
                yield slot, ordinal, future.result()
        while waiting:
            slot, ordinal, future = waiting.popleft()
            yield slot, ordinal, future.result()


@contextmanager
def _one_core_each() -> Iterator[None]:
    """torch (which resizes) uses no threads of its own while several images are in work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def image_messages(
    bag: Bag, recording: Recording, needed: dict[str, Iterable[int]]
) -> Iterator[tuple[str, int, str, bytes]]:
    """(slot, ordinal, type, CDR bytes) of the image messages whose ordinals are needed."""
    by_topic = {stream.topic: slot for slot, stream in recording.cameras.items() if needed.get(slot)}
    counts: Counter[str] = Counter()
    for topic, _, raw in bag.messages(set(by_topic)):
        slot, ordinal = by_topic[topic], counts[topic]
        counts[topic] += 1
        if ordinal in needed[slot]:
            yield slot, ordinal, recording.cameras[slot].type, raw


def model_frame(raw: bytes, kind: str, camera: Camera, image_size: int) -> np.ndarray | str:
    """uint8 [S, S, 3] as the model sees it, by the node's own functions; or what is wrong with the image."""
    try:
        return resize_with_pad(orient(decode_image(decode(raw, kind)), camera), image_size)
    except (ImageError, BagError) as error:
        return str(error)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs on this machine left half-written."""
    for partial in folder.glob("*.partial-*"):
        host, _, pid = partial.name.partition(".partial-")[2].rpartition("-")
        if host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(partial, ignore_errors=True)

"""From an image message to the pixels that the model sees: decode, orient, resize with padding.

Node and trainer decode through the same functions, whether a message comes from rclpy or from rosbags.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rosbags.image import ImageError as RosbagsImageError
from rosbags.image import image_to_cvimage

from pi0_ros.robot import Camera

# what can be decoded: encoding -> bits of a sample, samples of a pixel (sensor_msgs/image_encodings.hpp)
ENCODINGS = {
    "rgb8": (8, 3),
    "bgr8": (8, 3),
    "rgba8": (8, 4),
    "bgra8": (8, 4),
    "mono8": (8, 1),
    "yuv422": (8, 2),  # the old name of uyvy
    "uyvy": (8, 2),
    "yuv422_yuy2": (8, 2),  # the old name of yuyv
    "yuyv": (8, 2),
    "rgb16": (16, 3),
    "bgr16": (16, 3),
    "rgba16": (16, 4),
    "bgra16": (16, 4),
    "mono16": (16, 1),
    **{f"bayer_{order}{bits}": (bits, 1) for order in ("rggb", "bggr", "gbrg", "grbg") for bits in (8, 16)},
}


class ImageError(ValueError):
    """An image that cannot be used; the message says what was found."""


def decode_image(message: Any) -> np.ndarray:
    """uint8 [H, W, 3] RGB of a sensor_msgs Image or CompressedImage, of rclpy or of rosbags.

    May share memory with the message and be read-only.

    Raises:
        ImageError: an encoding that is no colour or grey image, data shorter than its height x step, a JPEG or PNG
            that ends too early or is none. One damaged within is decoded as well as it can be; libjpeg warns.
    """
    return _decompress(message) if hasattr(message, "format") else _unpack(message)


def orient(image: np.ndarray, camera: Camera) -> np.ndarray:
    """The image [H, W, 3] rotated clockwise, then flipped, as the robot file says of its camera. May be a view."""
    image = np.rot90(image, -camera.rotate // 90)
    if camera.flip == "none":
        return image
    return image[:, ::-1] if camera.flip == "horizontal" else image[::-1]


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: aspect kept, antialiased bilinear, centred on black.

    openpi: openpi_client/image_tools.py, resize_with_pad, which uses Pillow. torch has Pillow's filter, vectorised:
    0.3 % of the pixels differ, by 1, in a quarter of the time. None of OpenCV's filters comes near. An image of that
    size is returned as it is, a flipped view of one as a copy that torch can take.
    """
    check_image(image)
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image)
    padded = torch.zeros(size, size, 3, dtype=torch.uint8)
    _resize_into(padded, torch.from_numpy(np.require(image, requirements=("C", "W"))))
    return padded.numpy()


def resize_on_device(pixels: torch.Tensor, image: torch.Tensor) -> None:
    """`resize_with_pad` where the image lies, for a GPU: uint8 [H, W, 3] into `pixels`, uint8 [S, S, 3].

    torch resizes only floats there, which are rounded once and not twice: 4 % of the pixels differ, by 1.
    """
    pixels.zero_()
    _resize_into(pixels, image.float())


def check_image(image: np.ndarray) -> None:
    """Raises ImageError unless it is uint8 [H, W, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(f"expected a uint8 image [height, width, 3], found {image.dtype} {list(image.shape)}")


def _resize_into(padded: torch.Tensor, image: torch.Tensor) -> None:
    (height, width), size = image.shape[:2], len(padded)
    ratio = max(width / size, height / size)
    inner = max(int(height / ratio), 1), max(int(width / ratio), 1)
    pixels = image.permute(2, 0, 1)[None]  # channels last in memory
    small = F.interpolate(pixels, size=inner, mode="bilinear", antialias=True, align_corners=False)[0]
    if small.is_floating_point():
        small = small.round_()
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    padded[top : top + inner[0], left : left + inner[1]] = small.permute(1, 2, 0)


def _unpack(message: Any) -> np.ndarray:
    encoding, height, width, step = message.encoding, message.height, message.width, message.step
    if encoding not in ENCODINGS:
        raise ImageError(f"image encoding {encoding!r} is not supported, allowed: {', '.join(ENCODINGS)}")
    if not height or not width:
        raise ImageError(f"empty image: {width}x{height}")
    bits, samples = ENCODINGS[encoding]
    row = width * samples * bits // 8
    if step < row:
        raise ImageError(f"{width}x{height} image in {encoding}: step {step} is shorter than a row of {row} bytes")
    data = np.frombuffer(message.data, np.uint8)
    if len(data) < height * step:
        raise ImageError(
            f"{width}x{height} image in {encoding}: {len(data)} bytes of data, height x step is {height * step}"
        )
    if step > row:  # rows end in unused bytes, of which image_to_cvimage knows nothing
        data = np.ascontiguousarray(data[: height * step].reshape(height, step)[:, :row])
    tight = SimpleNamespace(
        encoding=encoding, height=height, width=width, is_bigendian=bool(message.is_bigendian) and bits == 16, data=data
    )
    try:
        return np.asarray(image_to_cvimage(tight, "rgb8"))
    except (RosbagsImageError, cv2.error) as error:
        reason = getattr(error, "err", None) or error
        raise ImageError(f"{width}x{height} image in {encoding} does not convert to rgb8: {reason}") from None


def is_depth(format: str) -> bool:
    """Whether a CompressedImage of this format holds distances, which would look like a black picture."""
    return "compressedDepth" in format or format.startswith(("16UC1", "32FC1"))


def _decompress(message: Any) -> np.ndarray:
    if is_depth(message.format):
        raise ImageError(f"compressed image format {message.format!r} holds depth, not colour")
    data = np.frombuffer(message.data, np.uint8)
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None  # BGR, whatever the file holds
    except cv2.error:  # a header that promises more pixels than there can be
        pixels = None
    if pixels is None:
        raise ImageError(f"compressed image of {len(data)} bytes, format {message.format!r}: not a whole JPEG or PNG")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

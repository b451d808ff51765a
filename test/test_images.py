"""Pixels: decoded alike from rclpy and rosbags, oriented as the robot file says, resized as openpi does."""

import array
import contextlib
import importlib.util
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from rosbags.image import message_to_cvimage
from rosbags.typesys import Stores, get_typestore
from safetensors.numpy import load_file

from pi0_ros.policy.images import ImageError, decode_image, orient, resize_on_device, resize_with_pad
from pi0_ros.robot import Camera

DATA = Path(__file__).parent / "data"
STORE = get_typestore(Stores.ROS2_KILTED)
Time, Header = STORE.types["builtin_interfaces/msg/Time"], STORE.types["std_msgs/msg/Header"]
HEADER = Header(Time(0, 0), "camera")
RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
DEEP = np.minimum(RGB * 257.0 + 20, 65535).astype(np.uint16)  # the same in 16 bits, but not with its bytes swapped

PNG = cv2.imencode(".png", RGB)[1].tobytes()


def raw(encoding, pixels, step=None, is_bigendian=0):
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, -1).view(np.uint8)
    step = step or rows.shape[1]
    rows = np.pad(rows, ((0, 0), (0, step - rows.shape[1])), constant_values=7)
    Image = STORE.types["sensor_msgs/msg/Image"]
    return Image(HEADER, height, width, encoding, is_bigendian, step, rows.ravel())


def compressed(format_, data):
    return STORE.types["sensor_msgs/msg/CompressedImage"](HEADER, format_, np.frombuffer(data, np.uint8))


def huge_png():
    """A PNG whose header promises 200000 x 200000 pixels."""
    png = bytearray(cv2.imencode(".png", RGB)[1].tobytes())
    png[16:24] = struct.pack(">II", 200_000, 200_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("rgb8", RGB, RGB),
        ("bgr8", RGB[..., ::-1], RGB),
        ("rgba8", np.dstack([RGB, RGB[..., 0]]), RGB),
        ("bgra8", np.dstack([RGB[..., ::-1], RGB[..., 0]]), RGB),
        ("mono8", RGB[..., 1], RGB[..., [1, 1, 1]]),
        ("rgb16", DEEP, RGB),
        ("bgr16", DEEP[..., ::-1], RGB),
        ("rgba16", np.dstack([DEEP, DEEP[..., 0]]), RGB),
        ("bgra16", np.dstack([DEEP[..., ::-1], DEEP[..., 0]]), RGB),
        ("mono16", DEEP[..., 1], RGB[..., [1, 1, 1]]),
    ],
)
def test_plain_encodings_keep_every_pixel(encoding, pixels, expected):
    for step in (None, 70):  # with and without unused bytes at the end of a row
        decoded = decode_image(raw(encoding, pixels, step))
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(("encoding", "offset"), [("yuv422", 1), ("uyvy", 1), ("yuv422_yuy2", 0), ("yuyv", 0)])
def test_yuv_takes_luma_from_the_right_bytes(encoding, offset):
    pixels = np.full((2, 4, 2), 128, np.uint8)  # no colour
    pixels[..., offset] = [[16, 90, 160, 235], [235, 160, 90, 16]]
    decoded = decode_image(raw(encoding, pixels))
    assert decoded.shape == (2, 4, 3)
    np.testing.assert_array_equal(decoded[0, :, 0], decoded[0, :, 2])  # grey
    np.testing.assert_array_equal(decoded[:, [0, 3], 0], [[0, 255], [255, 0]])


@pytest.mark.parametrize("order", ["rggb", "bggr", "gbrg", "grbg"])
@pytest.mark.parametrize("bits", [8, 16])
def test_bayer_gives_back_a_plain_colour(order, bits):
    colour = {"r": 200, "g": 120, "b": 30}
    tile = np.array([[colour[order[0]], colour[order[1]]], [colour[order[2]], colour[order[3]]]], np.uint8)
    mosaic = np.tile(tile, (4, 4)) if bits == 8 else np.tile(tile, (4, 4)).astype(np.uint16) * 257
    decoded = decode_image(raw(f"bayer_{order}{bits}", mosaic))
    np.testing.assert_array_equal(decoded, np.broadcast_to(np.uint8([200, 120, 30]), (8, 8, 3)))


def test_padded_rows_are_cut():
    np.testing.assert_array_equal(decode_image(raw("rgb8", RGB, step=32)), RGB)
    np.testing.assert_array_equal(decode_image(raw("mono8", RGB[..., 0], step=64))[..., 2], RGB[..., 0])


def test_big_endian_samples_are_swapped():
    pixels = (RGB[..., 0].astype(np.uint16) * 257).astype(">u2")
    pixels[0, 0] = 0x8000
    assert decode_image(raw("mono16", pixels, is_bigendian=1))[0, 0, 0] == 127
    np.testing.assert_array_equal(decode_image(raw("mono16", pixels, is_bigendian=1))[1:, :, 0], RGB[1:, :, 0])
    np.testing.assert_array_equal(decode_image(raw("rgb8", RGB, is_bigendian=1)), RGB)  # bytes have no order


@pytest.mark.parametrize(("suffix", "format_"), [(".png", "rgb8; png compressed bgr8"), (".jpg", "jpeg")])
def test_compressed_images_decode_to_rgb(suffix, format_):
    smooth = cv2.resize(RGB, (64, 48), interpolation=cv2.INTER_CUBIC)
    message = compressed(format_, cv2.imencode(suffix, smooth[..., ::-1])[1].tobytes())
    decoded = decode_image(message)
    np.testing.assert_array_equal(decoded, message_to_cvimage(message, "rgb8"))
    assert np.abs(decoded.astype(int) - smooth).mean() < (0.01 if suffix == ".png" else 8)


def test_a_grey_jpeg_becomes_rgb():
    message = compressed("mono8; jpeg compressed", cv2.imencode(".jpg", np.full((16, 16), 90, np.uint8))[1].tobytes())
    np.testing.assert_array_equal(decode_image(message), np.full((16, 16, 3), 90, np.uint8))


def test_messages_of_rclpy_decode_as_those_of_rosbags():
    messages = pytest.importorskip("sensor_msgs.msg")
    image = messages.Image(height=6, width=8, encoding="bgr8", step=24, data=array.array("B", RGB[..., ::-1].tobytes()))
    np.testing.assert_array_equal(decode_image(image), RGB)
    png = cv2.imencode(".png", RGB[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode_image(messages.CompressedImage(format="png", data=png)), RGB)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "bayer_rggb8", "bayer_gbrg8"])
def test_cv_bridge_sees_the_same_pixels(encoding):
    found = importlib.util.find_spec("cv_bridge")
    if found is None or not Path(found.origin).is_relative_to(sys.prefix):
        pytest.skip("the wheel of cv_bridge is not there: a distribution's is built for another numpy, and may crash")
    bridge = importlib.import_module("cv_bridge").CvBridge()
    messages = pytest.importorskip("sensor_msgs.msg")
    channels = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4}.get(encoding, 1)
    pixels = np.random.default_rng(1).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    image = messages.Image(height=6, width=8, encoding=encoding, step=8 * channels, data=pixels.tobytes())
    np.testing.assert_array_equal(decode_image(image), bridge.imgmsg_to_cv2(image, "rgb8"))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (raw("16UC1", RGB[..., 0].astype(np.uint16)), "image encoding '16UC1' is not supported, allowed: rgb8, bgr8"),
        (raw("8UC3", RGB), "image encoding '8UC3' is not supported"),
        (raw("yuv422", RGB[:, :5, :2]), "5x6 image in yuv422 does not convert to rgb8"),
        (SimpleNamespace(encoding="rgb8", height=0, width=8, step=24, data=b""), "empty image: 8x0"),
        (SimpleNamespace(encoding="rgb8", height=8, width=0, step=0, data=b""), "empty image: 0x8"),
        (
            SimpleNamespace(encoding="rgb8", height=2, width=8, step=16, data=bytes(32)),
            "8x2 image in rgb8: step 16 is shorter than a row of 24 bytes",
        ),
        (
            SimpleNamespace(encoding="rgb8", height=2, width=8, step=24, data=bytes(47)),
            "8x2 image in rgb8: 47 bytes of data, height x step is 48",
        ),
        (compressed("jpeg", b"not a jpeg"), "compressed image of 10 bytes, format 'jpeg': not a whole JPEG or PNG"),
        (compressed("jpeg", b""), "compressed image of 0 bytes"),
        (compressed("png", huge_png()), "format 'png': not a whole JPEG or PNG"),
        (compressed("jpeg", cv2.imencode(".jpg", RGB)[1].tobytes()[:-40]), "not a whole JPEG or PNG"),
        (compressed("16UC1; compressedDepth png", b"123"), "'16UC1; compressedDepth png' holds depth"),
        (compressed("mono16; compressedDepth", PNG), "'mono16; compressedDepth' holds depth"),
        (compressed("16UC1; png compressed", PNG), "'16UC1; png compressed' holds depth"),
        (compressed("32FC1; png compressed", PNG), "'32FC1; png compressed' holds depth"),
    ],
)
def test_a_bad_image_is_one_clear_error(message, error):
    with pytest.raises(ImageError) as caught:
        decode_image(message)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value).strip()


@given(st.binary(max_size=64), st.integers(0, 5), st.integers(0, 5), st.integers(0, 40))
def test_no_raw_image_does_worse_than_an_image_error(data, height, width, step):
    for encoding in ("rgb8", "mono16", "yuv422", "bayer_rggb8", "rgba16", ""):
        message = SimpleNamespace(
            encoding=encoding, height=height, width=width, step=step, data=data, is_bigendian=False
        )
        with contextlib.suppress(ImageError):
            assert decode_image(message).shape == (height, width, 3)


@pytest.mark.parametrize(
    ("rotate", "flip", "expected"),
    [
        (0, "none", [[1, 2, 3], [4, 5, 6]]),
        (90, "none", [[4, 1], [5, 2], [6, 3]]),
        (180, "none", [[6, 5, 4], [3, 2, 1]]),
        (270, "none", [[3, 6], [2, 5], [1, 4]]),
        (0, "horizontal", [[3, 2, 1], [6, 5, 4]]),
        (0, "vertical", [[4, 5, 6], [1, 2, 3]]),
        (90, "horizontal", [[1, 4], [2, 5], [3, 6]]),
    ],
)
def test_orientation_is_clockwise_and_then_flipped(rotate, flip, expected):
    image = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[..., None].repeat(3, axis=2)
    camera = Camera(topic="/camera", rotate=rotate, flip=flip)
    np.testing.assert_array_equal(orient(image, camera)[..., 0], expected)


@pytest.mark.parametrize("shape", ["480x640", "100x300"])
def test_resizing_equals_openpi(shape):
    fixture = load_file(DATA / "resize.safetensors")
    resized = resize_with_pad(fixture[f"in.{shape}"], 224)
    assert np.abs(resized.astype(int) - fixture[f"out.{shape}"]).max() <= 1


@settings(max_examples=25)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 64), st.integers(0, 2**32))
def test_resizing_equals_pillow_at_every_size(height, width, size, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ratio = max(width / size, height / size)
    inner = max(int(width / ratio), 1), max(int(height / ratio), 1)
    expected = PillowImage.new("RGB", (size, size), 0)
    resized = PillowImage.fromarray(image).resize(inner, PillowImage.Resampling.BILINEAR)
    expected.paste(resized, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    assert np.abs(resize_with_pad(image, size).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (100, 333), (30, 40), (224, 224)])
def test_a_gpus_resize_is_that_of_the_cpu_but_for_its_rounding(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels = torch.full((224, 224, 3), 77, dtype=torch.uint8)  # of the frame before
    resize_on_device(pixels, torch.from_numpy(image))
    difference = np.abs(pixels.numpy().astype(int) - resize_with_pad(image, 224))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.2


def test_a_read_only_image_is_resized_without_complaint(recwarn):
    image = np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape)
    np.testing.assert_array_equal(resize_with_pad(image, 4), resize_with_pad(RGB, 4))
    assert not recwarn.list


def test_resizing_pads_black_and_centres():
    resized = resize_with_pad(np.full((50, 100, 3), 200, np.uint8), 60)  # -> 30 x 60, 15 rows above and below
    np.testing.assert_array_equal(resized[15:45], 200)
    assert not resized[:15].any()
    assert not resized[45:].any()


def test_an_image_of_the_right_size_is_left_alone():
    image = np.zeros((56, 56, 3), np.uint8)
    assert resize_with_pad(image, 56) is image


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_an_oriented_image_of_the_right_size_can_be_handed_to_torch(rotate, flip):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    oriented = orient(image, Camera(topic="/c", rotate=rotate, flip=flip))
    np.testing.assert_array_equal(torch.as_tensor(resize_with_pad(oriented, 8)).numpy(), oriented)


def test_a_flipped_view_resizes_as_its_copy():
    np.testing.assert_array_equal(resize_with_pad(RGB[:, ::-1], 4), resize_with_pad(RGB[:, ::-1].copy(), 4))


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), *(np.zeros(s, np.uint8) for s in (4, (0, 4, 3), (4, 4, 4)))])
def test_resizing_refuses_what_is_no_rgb_image(image):
    with pytest.raises(ImageError, match="expected a uint8 image"):
        resize_with_pad(image, 8)

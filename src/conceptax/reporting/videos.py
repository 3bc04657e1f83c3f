"""Videos as files, written and read: animated GIF by Pillow, MP4 by the ffmpeg that comes with
imageio-ffmpeg, frames as PNG.

Videos are uint8 [F, H, W, 3].
"""

import importlib
import io
import subprocess
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

SUFFIXES = (".gif", ".mp4")

Video = UInt8[np.ndarray, "F H W 3"]


def encoder() -> str:
    """The ffmpeg that encodes MP4.

    Raises:
      ValueError: there is none; the message says how it would be.
    """
    try:
        return importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            "writing MP4 needs imageio-ffmpeg: install conceptax[video], or pass an --output that "
            "ends in .gif."
        ) from error


def save_gif(video: Video, file: Path, fps: int) -> None:
    """Write an animated GIF that repeats for ever; its colors are reduced to 256 a frame."""
    first, *others = [Image.fromarray(frame) for frame in video]
    first.save(
        file, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0
    )


def save_mp4(video: Video, file: Path, fps: int) -> None:
    """Write H.264 that players show (4:2:0, an even number of rows and columns).

    An odd side is repeated once.

    Raises:
      ValueError: the encoder is not installed, or refuses; its own words are in the message.
    """
    _, height, width, _ = video.shape
    video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    size = f"{video.shape[2]}x{video.shape[1]}"
    taken = f"-f rawvideo -pix_fmt rgb24 -s {size} -r {fps} -i -".split()
    made = ["-c:v", "libx264", "-crf", "15", "-pix_fmt", "yuv420p", "-f", "mp4"]
    command = [encoder(), "-loglevel", "error", "-y", *taken, *made, str(file)]
    # Not imageio-ffmpeg's own writer: it forks, which may block a process with JAX's threads.
    result = subprocess.run(command, input=video.tobytes(), capture_output=True, check=False)
    if result.returncode:
        told = result.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"ffmpeg could not write {file}: {' '.join(told[-3:])}")


def save_video(video: Video, file: Path, fps: int) -> None:
    """Write a GIF or an MP4, as the file's suffix says."""
    (save_gif if file.suffix.lower() == ".gif" else save_mp4)(video, file, fps)


def save_frames(video: Video, folder: Path) -> None:
    """Write every frame as a PNG of a new folder: 0000.png, 0001.png, …"""
    folder.mkdir()
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{number:04d}.png")


def read_frames(path: Path) -> Video:
    """The frames of an image, a GIF, a folder of images in the order of their names, or of what
    ffmpeg reads.

    Raises:
      ValueError: there are none; the file is damaged; or it needs ffmpeg, which is not installed.
    """
    path = path.expanduser()
    files = [path]
    if path.is_dir():
        kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds)
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path} holds no image or video: name a file, or a folder of .png files.")
    frames = [frame for file in files for frame in _frames_of(file)]
    if len({frame.shape for frame in frames}) != 1:
        sizes = sorted({f"{frame.shape[0]}x{frame.shape[1]}" for frame in frames})
        raise ValueError(
            f"the frames in {path} must be of one size; received {', '.join(sizes) or 'none'}."
        )
    return np.stack(frames)


def _frames_of(file: Path) -> list[UInt8[np.ndarray, "H W 3"]]:
    try:
        with Image.open(file) as image:
            return [np.asarray(each.convert("RGB")) for each in ImageSequence.Iterator(image)]
    except UnidentifiedImageError:
        pass
    command = [encoder(), "-loglevel", "error", "-i", str(file), "-f", "image2pipe", "-c:v", "ppm"]
    result = subprocess.run([*command, "-"], capture_output=True, check=False)
    if result.returncode:
        told = result.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"ffmpeg could not read {file}: {' '.join(told[-3:])}")
    frames, stream = [], io.BytesIO(result.stdout)
    while stream.readline() == b"P6\n":  # each frame with its size
        width, height = map(int, stream.readline().split())
        stream.readline()
        content = np.frombuffer(stream.read(3 * width * height), np.uint8)
        frames.append(content.reshape(height, width, 3))
    return frames

"""Videos as files: animated GIF by Pillow, MP4 by the ffmpeg that comes with imageio-ffmpeg.

Videos are uint8 [F, H, W, 3].
"""

import importlib
import subprocess
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

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

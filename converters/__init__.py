"""What travels: PyTorch weights in and out."""

from .errors import CheckpointError, ConversionError, OutputError
from .output import atomic_folder
from .personalised import load_personalised, save_custom_diffusion, save_textual_inversion
from .pytorch import load_changes, load_pytorch, save_changes, save_pytorch
from .segmentation import load_maft_plus, load_open_clip, save_maft_plus

__all__ = [
    "CheckpointError",
    "ConversionError",
    "OutputError",
    "atomic_folder",
    "load_changes",
    "load_maft_plus",
    "load_open_clip",
    "load_personalised",
    "load_pytorch",
    "save_changes",
    "save_custom_diffusion",
    "save_maft_plus",
    "save_pytorch",
    "save_textual_inversion",
]

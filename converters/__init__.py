"""Load and save PyTorch checkpoints: what travels."""

from .compvis import load_single_file, save_single_file
from .errors import CheckpointError, ConversionError, OutputError
from .inspection import inspect_checkpoint
from .lora import load_lora, merge_lora, save_lora
from .output import atomic_folder
from .personalised import load_personalised, save_custom_diffusion, save_textual_inversion
from .pytorch import load_changes, load_pytorch, save_changes, save_pytorch
from .segmentation import load_maft_plus, load_open_clip, save_maft_plus

__all__ = [
    "CheckpointError",
    "ConversionError",
    "OutputError",
    "atomic_folder",
    "inspect_checkpoint",
    "load_changes",
    "load_lora",
    "load_maft_plus",
    "load_open_clip",
    "load_personalised",
    "load_pytorch",
    "load_single_file",
    "merge_lora",
    "save_changes",
    "save_custom_diffusion",
    "save_lora",
    "save_maft_plus",
    "save_pytorch",
    "save_single_file",
    "save_textual_inversion",
]

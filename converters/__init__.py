"""Load and save PyTorch checkpoints: what travels."""

from .additions import merge_parts
from .errors import CheckpointError, ConversionError, OutputError
from .files.output import atomic_folder
from .formats.compvis import load_single_file, save_single_file
from .formats.drawn_with import DrawnWith
from .formats.lora import load_drawn_with, load_lora, merge_lora, save_lora, write_lora
from .formats.personalized import load_personalized, save_custom_diffusion, save_textual_inversion
from .formats.segmentation import load_maft_plus, load_open_clip, save_maft_plus
from .inspection import inspect_checkpoint
from .pytorch import load_changes, load_pytorch, save_changes, save_pytorch

__all__ = [
    "CheckpointError",
    "ConversionError",
    "DrawnWith",
    "OutputError",
    "atomic_folder",
    "inspect_checkpoint",
    "load_changes",
    "load_drawn_with",
    "load_lora",
    "load_maft_plus",
    "load_open_clip",
    "load_personalized",
    "load_pytorch",
    "load_single_file",
    "merge_lora",
    "merge_parts",
    "save_changes",
    "save_custom_diffusion",
    "save_lora",
    "save_maft_plus",
    "save_pytorch",
    "save_single_file",
    "save_textual_inversion",
    "write_lora",
]

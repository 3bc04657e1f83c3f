"""Modules that moved: their old names import the new ones, with a warning, for one more release."""

# Below `conceptax`: the old module -> the new one, and old names in it -> new ones.
MOVED = {
    "converters.compvis": ("converters.formats.compvis", {}),
    "converters.compvis_names": ("converters.formats.compvis_names", {}),
    "converters.compvis_parts": ("converters.formats.compvis_parts", {}),
    "converters.lora": ("converters.formats.lora", {}),
    "converters.output": ("converters.files.output", {}),
    "converters.personalised": (
        "converters.formats.personalized",
        {"load_personalised": "load_personalized"},
    ),
    "converters.safetensors_file": ("converters.files.safetensors_file", {}),
    "converters.segmentation": ("converters.formats.segmentation", {}),
    "converters.weights": ("converters.files.weights", {}),
    "flax_models.stable_diffusion": ("flax_models.pipelines.stable_diffusion", {}),
    "flax_models.stable_diffusion_xl": ("flax_models.pipelines.stable_diffusion_xl", {}),
    "methods.text_to_image": ("methods.diffusion.text_to_image", {}),
    "methods.text_to_video": ("methods.diffusion.text_to_video", {}),
}


class MovedModules:
    """An import hook (`sys.meta_path`) behind all others: asked for what they did not find."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The spec of a moved module, whose loader is this class; None of any other."""
        package, _, old = name.partition(".")
        if package != "conceptax" or old not in MOVED:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, MovedModules)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec):
        """The module that imports usually make."""

    @staticmethod
    def exec_module(module):
        """Look every name up in the new module."""
        import warnings
        from importlib import import_module

        new, names = MOVED[module.__name__.partition(".")[2]]
        target = import_module(f"conceptax.{new}")
        warnings.warn(
            f"{module.__name__} is now conceptax.{new}; its old name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        module.__getattr__ = lambda name: getattr(target, names.get(name, name))

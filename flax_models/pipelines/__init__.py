"""Model families, one per file: what their folders hold, and how their parts work together.

A family is a class of pipelines. What samples, trains and measures asks it, and knows none by name:

* `MODELS`, `TOKENIZERS`: the parts of a folder; `TEXT_TOWERS`: those that read text.
* `tokenize`, `prompt_encoder`: prompts to token ids, and ids to a condition, a pytree that the
  denoiser takes as it is; `for_size` and `without_text` make others of it.
* `latent_shape`, `latent_shape_for`: of the latents for a size in pixels.
* `predictor`: one prediction of the denoiser, with the family's kind of guidance.
* `decode`: latents to pixels.
* `schedule_config`: the scheduler's settings that images are drawn with.

A new family is its file, its models, and a row in `converters.architectures`.
"""

"""`conceptax gna simulate`: the table of what a neighborhood attention visits and saves."""

import dataclasses
from typing import Any

from conceptax.cli.runs import new_json
from conceptax.kernels.gna.presets import Preset, attention_preset
from conceptax.kernels.gna.simulator import simulate, simulate_model
from conceptax.reporting.gna_tables import (
    model_record,
    model_table,
    simulation_record,
    simulation_table,
)
from conceptax.text import write_json

from .commands import Simulate, problem_of

OF_A_MODEL = ("steps", "dense_steps", "linear_rate", "attention_rate")
OF_ONE_CALL = (
    *("dilation", "causal", "tiling", "batch", "heads", "kv_heads", "head_dim", "additional"),
    *("additional_queries", "attention_share", "replaced"),
)


def run(command: Simulate) -> None:
    """Print the table, and write the record if asked to."""
    if command.replaced != 1 and command.attention_share is None:
        raise ValueError("--replaced goes with --attention-share: pass both.")
    _check_absent(command, OF_A_MODEL if command.model is None else OF_ONE_CALL)
    with new_json(command) as file:
        table, record = _one_call(command) if command.model is None else _model(command)
        if file is not None:
            write_json(file, record)
    print(table)
    if command.output is not None:
        print(f"\n{command.output}: all of this")


def _one_call(command: Simulate) -> tuple[str, dict[str, Any]]:
    attention, layout = _attention(command), command.layout
    if attention is None or layout is None:
        raise ValueError("one attention takes --layout and --window, and a whole model --model.")
    problem = problem_of(command, "dilation", "is_causal", "query_tile", "key_tile")
    settings = {"kernel_size": attention.window, "stride": attention.stride}
    if command.attention is not None:
        windows = attention.windows(layout)  # says which layout fits
        settings["kernel_size"] = tuple(window.kernel_size for window in windows)
        if attention.dilation != 1:
            problem["dilation"] = attention.dilation
    same = ("tiling", "batch", "heads", "kv_heads", "head_dim", "additional", "additional_queries")
    options = {name: getattr(command, name) for name in (*same, "mask_every_tile", "gpu")}
    result = simulate(layout, **settings, **problem, **options)
    table = simulation_table(result, command.gpu, command.attention_share, command.replaced)
    record = {"gpu": command.gpu, **simulation_record(result)}
    if command.attention_share is not None:
        record["end_to_end"] = result.end_to_end(command.attention_share, command.replaced)
    return table, record


def _model(command: Simulate) -> tuple[str, dict[str, Any]]:
    assert command.model is not None
    same = ("layout", *OF_A_MODEL, "mask_every_tile", "gpu")
    options = {name: getattr(command, name) for name in same}
    tiles = problem_of(command, "query_tile", "key_tile")
    result = simulate_model(command.model, attention=_attention(command), **tiles, **options)
    record = model_record(result, command.gpu)
    return model_table(record), record


def _attention(command: Simulate) -> Preset | None:
    """The window and stride asked for, if any."""
    if command.attention is not None:
        if command.window is not None or command.stride is not None:
            raise ValueError(
                "--attention has the window and the stride: leave out --window and --stride."
            )
        return attention_preset(command.attention)
    if command.window is None:
        if command.stride is not None:
            raise ValueError("--stride goes with --window: pass both.")
        return None
    given = problem_of(command, "kernel_size", "stride")
    return Preset(given["kernel_size"], 1 if given["stride"] is None else given["stride"])


def _check_absent(command: Simulate, names: tuple[str, ...]) -> None:
    """Refuse flags that change nothing here."""
    default = {field.name: field.default for field in dataclasses.fields(Simulate)}
    for name in names:
        if getattr(command, name) != default[name]:
            flag = name.replace("_", "-")
            says = (
                "goes with --model" if command.model is None else "is said by --model: leave it out"
            )
            raise ValueError(f"--{flag} {says}.")

"""The studio's page, in gradio: what is asked for, and what a job tells, shown as it comes.

The page reads no file and writes none but by `work.save`. Images go to the browser inside the page.
"""

import dataclasses
import os
import shlex
import socket
from collections.abc import Callable, Sequence
from typing import Any

from conceptax.errors import optional
from conceptax.kernels.gna.presets import PRESETS
from conceptax.methods.erasing import METHODS
from conceptax.methods.red_team import ATTACKS
from conceptax.studio import markup, work
from conceptax.studio.jobs import Job
from conceptax.studio.models import Studio
from conceptax.studio.work import Drawing

Parse = Callable[[Any, Sequence[str]], Any]
Explain = Callable[[type], Sequence[tuple[str, str, str]]]

# Settings that have a field of their own; the others are given as flags.
MAIN = ("cycles", "learning_rate", "eta", "anchor")
_LABELS = {
    "cycles": "Cycles",
    "learning_rate": "Learning rate",
    "eta": "Eta: strength of the erasure",
    "anchor": "Anchor: what takes the concept's place",
}
# What the page itself asks the server for; nothing else is answered.
_PATHS = ("/config", "/theme.css", "/favicon.ico", "/manifest.json")
_FOLDERS = ("/assets/", "/static/", "/svelte/", "/_app/")
_CALLS = (
    "info",
    "queue/join",
    "queue/data",
    "heartbeat/",
    "startup-events",
    "reset",
    "cancel",
    "run/",
)
LOCAL = ("127.0.0.1", "localhost", "::1")


def load_gradio() -> Any:
    """The module gradio, told to ask the network for nothing and to keep nothing.

    Raises:
      MissingPackageError: it is not installed.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    return optional("gradio", "ui", "the studio")


def build_page(
    studio: Studio, *, sentence: Callable[[BaseException], str], parse: Parse, explain: Explain
) -> Any:
    """The page of a studio, a `gradio.Blocks`.

    Args:
      studio: with its models.
      sentence: tells people what an exception means.
      parse: gives settings (a dataclass) changed as words of a command line say.
      explain: a type of settings -> how each is given, its default, what it does.
    """
    gr = load_gradio()
    wired = _Wired(gr, studio, sentence)
    own = studio.original.defaults
    is_glyphs = studio.classifier is not None
    prompt = "a red three on brick" if is_glyphs else ""
    with gr.Blocks(title="conceptax studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(markup.head(studio.source))
        with gr.Row():
            edited = gr.Dropdown(
                **_choices(studio), label="Edited model", scale=3, min_width=220, elem_id="edited"
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
            count = gr.Number(
                1, label="Images a prompt", precision=0, minimum=1, maximum=8, min_width=120
            )
        with gr.Accordion("Steps, guidance, size", open=False), gr.Row():
            steps = gr.Number(
                min(own[0], 25), label="Steps", precision=0, minimum=1, maximum=1000, min_width=90
            )
            strength = own[1] if isinstance(own[1], int | float) else 7.5
            guidance = gr.Number(strength, label="Guidance", min_width=90)
            height = gr.Number(None, label="Height, empty: the model's", precision=0, min_width=120)
            width = gr.Number(None, label="Width, empty: the model's", precision=0, min_width=120)
        drawing = [seed, steps, guidance, count, height, width]
        with gr.Tabs():
            with gr.Tab("Draw"):
                asked = gr.Textbox(prompt, label="Prompt", lines=1, elem_id="prompt")
                wired.job(
                    "Draw",
                    lambda job, given, asked, edited: work.draw(
                        studio, job, asked, edited or None, given
                    ),
                    drawing,
                    [asked, edited],
                    submit=asked,
                )
            if studio.is_stable_diffusion:
                with gr.Tab("Bring back"):
                    _attack_tab(wired, drawing, edited, parse, explain)
                with gr.Tab("Erase"):
                    _erase_tab(wired, drawing, edited, parse, explain)
            with gr.Tab("Attention"):
                if excuse := studio.attention_excuse():
                    gr.HTML(markup.note(f"Of {studio.source} there is nothing to pick: {excuse}"))
                else:
                    _attention_tab(wired, drawing, prompt)
        page.load(lambda: gr.update(**_choices(studio)), None, edited, **wired.quiet)
        page.unload(wired.stopper())
    return page


class _Wired:
    """How buttons start jobs and stop them."""

    def __init__(self, gr: Any, studio: Studio, sentence: Callable[[BaseException], str]) -> None:
        self.gr, self.studio, self.sentence = gr, studio, sentence
        self.quiet: dict[str, Any] = {
            "queue": False,
            "show_progress": "hidden",
            "api_visibility": "private",
        }

    def job(
        self,
        name: str,
        do: Callable[..., str],
        drawing: Sequence[Any],
        inputs: Sequence[Any],
        *,
        submit: Any = None,
        after: tuple[Any, Callable[[], Any]] | None = None,
        stops: bool = True,
    ) -> None:
        """A button that starts a job, one that stops it, and what the job shows.

        Args:
          name: on the button.
          do: takes the job, a `Drawing` and the inputs' values.
          drawing, inputs: components.
          submit: a text field in which Enter starts the job too.
          after: a component, and what gives its update when the job is done.
          stops: whether it takes steps, between which it can stop.
        """
        gr, studio = self.gr, self.studio
        owner = name.lower().replace(" ", "-")
        with gr.Row():
            start = gr.Button(name, variant="primary", scale=0, min_width=150, elem_id=owner)
            if stops:
                stop = gr.Button("Stop", scale=0, min_width=90, elem_id=f"{owner}-stop")
                stop.click(self.stopper(owner), None, None, **self.quiet)
        status = gr.HTML(elem_id=f"{owner}-status")
        pictures = gr.HTML(elem_id=f"{owner}-pictures")
        outputs = [status, pictures] + ([after[0]] if after else [])
        more = [gr.skip()] if after else []

        def run(request: gr.Request, *values: Any):  # type: ignore
            shown = None

            def of_values(job: Job) -> str:
                return do(job, _drawing(values[: len(drawing)]), *values[len(drawing) :])

            try:
                for told in studio.run(of_values, (request.session_hash, owner)):
                    same = shown is not None and told.rows is shown
                    shown = told.rows
                    rows = gr.skip() if same else markup.pictures(told.rows)
                    end = [after[1]()] if after and told.ended else more
                    yield [markup.status(told), rows, *end]
            except (Exception, SystemExit) as error:
                yield [markup.failure(self.sentence(error)), gr.skip(), *more]

        for event in [start.click, *([submit.submit] if submit is not None else [])]:
            event(
                run,
                [*drawing, *inputs],
                outputs,
                show_progress="hidden",
                concurrency_limit=None,  # jobs wait in the studio's own line, where they can stop
                api_visibility="private",
            )

    def stopper(self, owner: str | None = None) -> Callable[..., None]:
        """What stops a page's jobs, or those of one kind."""
        gr, studio = self.gr, self.studio

        def stop(request: gr.Request) -> None:  # type: ignore
            mine = request.session_hash
            studio.stop(lambda each: each[0] == mine and owner in (None, each[1]))

        return stop


def _drawing(values: Sequence[Any]) -> Drawing:
    seed, steps, guidance, count, height, width = values
    numbers = {"seed": seed, "steps": steps, "guidance": guidance, "images a prompt": count}
    for name, value in numbers.items():
        if value is None:
            raise ValueError(f"{name} is empty: it takes a number.")
    sides = (None if not side else int(side) for side in (height, width))
    return Drawing(int(seed), int(steps), float(guidance), int(count), *sides)


def _choices(studio: Studio) -> dict[str, Any]:
    """The edited models, the newest chosen."""
    names = list(reversed(studio.edited))
    choices = [*((name, name) for name in names), ("none: the original alone", "")]
    return {"choices": choices, "value": names[0] if names else ""}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


class _Settings:
    """The settings of one of several methods: fields for some, flags for the others."""

    def __init__(
        self,
        gr: Any,
        methods: Any,
        chosen: str,
        main: Sequence[str],
        parse: Parse,
        explain: Explain,
    ) -> None:
        self._gr, self._methods, self._main = gr, methods, main
        self._parse, self._explain = parse, explain
        example = "--batch-size 4" if methods is ATTACKS else "--contexts 24"
        titles = [(method.title, name) for name, method in methods.items()]
        self.method = gr.Dropdown(
            titles, value=chosen, label="How", filterable=False, elem_id=f"{chosen}-how"
        )
        with gr.Row():
            fields = [self._field(chosen, name) for name in main]
        with gr.Accordion("Other settings", open=False):
            flags = gr.Textbox("", label=f"As flags, for example {example}", lines=1)
            table = gr.HTML(self._table(chosen))
        self.components = [self.method, *fields, flags]
        self.method.change(
            lambda method: [
                *(gr.update(**self._state(method, name)) for name in main),
                self._table(method),
            ],
            self.method,
            [*fields, table],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def config(self, method: str, *values: Any) -> Any:
        """The settings that the values of the components give."""
        *main, flags = values
        kind = self._methods[method].config
        named = dict(zip(self._main, main, strict=True))
        given = {
            name: value
            for name, value in named.items()
            if name in _fields(kind) and value is not None
        }
        try:
            words = shlex.split(flags or "")
        except ValueError as error:
            raise ValueError(f"the other settings cannot be read: {error}.") from error
        return self._parse(kind(**given), words)

    def _state(self, method: str, name: str) -> dict[str, Any]:
        kind = self._methods[method].config
        there = name in _fields(kind)
        return {"visible": there, "value": getattr(kind(), name) if there else None}

    def _field(self, method: str, name: str) -> Any:
        label, state = _LABELS.get(name, name.capitalize()), self._state(method, name)
        if name == "anchor":
            return self._gr.Textbox(label=label, min_width=200, **state)
        precision = 0 if name in ("cycles", "steps") else None
        return self._gr.Number(label=label, precision=precision, min_width=120, **state)

    def _table(self, method: str) -> str:
        return markup.settings_table(self._explain(self._methods[method].config))


def _attack_tab(
    wired: _Wired, drawing: Sequence[Any], edited: Any, parse: Parse, explain: Explain
) -> None:
    gr, studio = wired.gr, wired.studio
    with gr.Row():
        concept = gr.Textbox(
            label="Concept that was erased", placeholder="three", min_width=200, elem_id="concept"
        )
        looks = gr.Number(
            4, label="Looks on the way", precision=0, minimum=1, maximum=20, min_width=120
        )
    prompts = gr.Textbox(
        label="Prompts that name it, one a line; without any, some are made", lines=2
    )
    settings = _Settings(gr, ATTACKS, "concept-inversion", ("steps",), parse, explain)

    def do(
        job: Job, given: Drawing, concept: str, edited: str, prompts: str, looks: int, *rest: Any
    ):
        config = settings.config(*rest)
        return work.bring_back(
            studio, job, concept, edited, config, given, prompts=_lines(prompts), looks=int(looks)
        )

    inputs = [concept, edited, prompts, looks, *settings.components]
    wired.job("Bring back", do, drawing, inputs)


def _erase_tab(
    wired: _Wired, drawing: Sequence[Any], edited: Any, parse: Parse, explain: Explain
) -> None:
    gr, studio = wired.gr, wired.studio
    watch = "a red three on brick\na red two on brick" if studio.classifier is not None else ""
    with gr.Row():
        concepts = gr.Textbox(
            label="Concepts to erase, one a line", placeholder="three", lines=2, min_width=200
        )
        watched = gr.Textbox(watch, label="Prompts to watch, one a line", lines=2, min_width=200)
    settings = _Settings(gr, METHODS, "sage", MAIN, parse, explain)
    with gr.Row():
        looks = gr.Number(
            4, label="Looks on the way", precision=0, minimum=1, maximum=20, min_width=120
        )
        retain = gr.Textbox(
            label="Phrases to retain, one a line; without any, the tokenizer's words",
            lines=2,
            min_width=220,
        )
        begin = gr.Checkbox(False, label="Begin with the edited model", min_width=180)

    def do(
        job: Job,
        given: Drawing,
        concepts: str,
        watched: str,
        edited: str,
        begin: bool,
        retain: str,
        looks: int,
        *rest: Any,
    ):
        return work.erase(
            studio,
            job,
            _lines(concepts),
            settings.config(*rest),
            given,
            start=(edited or None) if begin else None,
            retain=_lines(retain),
            watched=_lines(watched),
            looks=int(looks),
        )

    inputs = [concepts, watched, edited, begin, retain, looks, *settings.components]
    after = edited, lambda: gr.update(**_choices(studio))
    wired.job("Erase", do, drawing, inputs, after=after)
    if studio.output is None:
        gr.HTML(
            markup.note(
                "Results are kept in memory until the studio ends; with --output FOLDER they can "
                "be saved below it."
            )
        )
        return
    folder = gr.Textbox(
        label=f"Save the edited model in a new folder below {studio.output}", placeholder="erased"
    )
    wired.job(
        "Save",
        lambda job, _, name, folder: work.save(studio, job, name, folder or ""),
        drawing,
        [edited, folder],
        stops=False,
    )


def _attention_tab(wired: _Wired, drawing: Sequence[Any], prompt: str) -> None:
    gr, studio = wired.gr, wired.studio
    shape = studio.original.latent_shape_for(None, None)
    layout = studio.original.token_layout(shape)
    half = "x".join(str(max(1, side // 2)) for side in layout)
    fitting = [
        name
        for name, preset in PRESETS.items()
        if preset.layout is not None and len(preset.layout) == len(layout)
    ]
    with gr.Row():
        asked = gr.Textbox(prompt, label="Prompt", lines=1, min_width=220, scale=2)
        attention = gr.Dropdown(
            [f"window={half}", *fitting],
            value=f"window={half}",
            allow_custom_value=True,
            label="Attention: a preset, or your own",
            min_width=220,
        )
        dense = gr.Number(None, label="Dense steps first, empty: the preset's", precision=0)
    wired.job(
        "Compare",
        lambda job, given, asked, attention, dense: work.attend(
            studio, job, asked, attention or "", given, dense_steps=dense
        ),
        drawing,
        [asked, attention, dense],
    )
    sides = " × ".join(map(str, layout))
    gr.HTML(markup.note(f"At its own size this model attends over {sides} tokens."))


# ---- the server ----


def serve(page: Any, host: str, port: int) -> str:
    """Serve the page in a thread; its address.

    Nothing is answered but what the page asks for, and on this machine alone only to it.

    Raises:
      OSError: the port is taken, or the host is not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((host.strip("[]"), port))
    gr = load_gradio()
    font = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]
    mono = [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]
    middleware = optional("starlette.middleware", "ui", "the studio").Middleware
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=1,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=font, font_mono=mono),
        css=markup.STYLE.read_text(encoding="utf-8"),
        app_kwargs={"middleware": [middleware(Guard, host=host)]},
    )
    return address


def allowed(path: str, host: str, asked: str) -> bool:
    """Whether a request is answered.

    Args:
      path: of the request.
      host: that the studio is bound to.
      asked: the host that the request names, with its port; on this machine alone, a name that
        another page had pointed here is refused.
    """
    name = asked.rsplit(":", 1)[0].strip("[]") if not asked.endswith("]") else asked.strip("[]")
    if host in LOCAL and name not in LOCAL:
        return False
    if path == "/" or path in _PATHS or path.startswith(_FOLDERS):
        return ".." not in path
    call = path.removeprefix("/gradio_api/")
    return call != path and call.startswith(_CALLS)


class Guard:
    """ASGI middleware that answers 404 to all but what the page asks for."""

    def __init__(self, app: Any, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http":
            asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not allowed(scope["path"], self.host, asked):
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body", "body": b"there is nothing here"})
                return
        elif scope["type"] != "lifespan":
            return
        await self.app(scope, receive, send)

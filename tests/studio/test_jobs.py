"""Jobs, without a model: what they tell, in which order, and how they stop."""

import threading

import numpy as np
import pytest
from personalizing_toy import tiny_pipeline

from conceptax.studio import markup
from conceptax.studio.jobs import Job, Line, Picture, Row, Told
from conceptax.studio.models import Studio
from conceptax.studio.page import allowed

RED = np.full((2, 3, 3), (255, 0, 0), np.uint8)


def test_job_tells_and_ends_with_its_sentence():
    rows = [Row("prompt", (Picture("before", RED),))]
    go = threading.Event()

    def work(job):
        job.tell("half", 0.5, rows)
        assert go.wait(20)
        job.tell("more", 7.0)
        return "done"

    told = Job().run(work)
    first = next(each for each in told if each.said == "half")
    assert (first.done, first.rows, first.ended) == (0.5, tuple(rows), False)
    go.set()
    *_, last = told
    assert (last.said, last.done, last.ended) == ("done", 1.0, True)
    assert last.rows is first.rows  # so that a page need not show them again


def test_job_stops_at_its_next_step_and_keeps_what_it_has():
    job, steps, halted = Job(), [], threading.Event()

    def work(job):
        for step in range(1000):
            steps.append(step)
            job.tell(f"step {step}", step / 1000)
            if step == 3:
                halted.set()
                job._stop.wait(20)
        return "never"

    told = job.run(work)
    next(told)
    assert halted.wait(20)
    job.stop()
    *_, last = told
    assert last.ended and last.said == "Stopped. The last was: step 3." and last.done == 0.003
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [ValueError("a sentence."), SystemExit(130)])
def test_job_raises_what_its_work_raised(error):
    def work(job):
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(Job().run(work))


def test_jobs_take_turns_and_who_waits_can_stop():
    line, go, order = Line(), threading.Event(), []

    def work(name):
        def do(job):
            order.append(name)
            job.tell("works")
            assert go.wait(20)
            return name

        return do

    first, second, third = Job(line), Job(line), Job(line)
    told = first.run(work("first"))
    next(each for each in told if each.said == "works")
    waiting = second.run(work("second"))
    next(each for each in waiting if each.said == "waiting for 1 other job to end")
    behind = third.run(work("third"))
    next(each for each in behind if each.said == "waiting for 2 other jobs to end")
    second.stop()
    assert [*waiting][-1].said.startswith("Stopped.")
    go.set()
    assert [*told][-1].said == "first" and [*behind][-1].said == "third"
    assert order == ["first", "third"]


def test_who_leaves_stops_the_job():
    studio, ended = Studio(tiny_pipeline()), threading.Event()

    def work(job):
        try:
            while True:
                job.tell("on and on")
        finally:
            ended.set()

    told = studio.run(work, "page")
    next(told)
    told.close()
    assert ended.wait(20) and studio.stop() == 0


def test_pages_stop_their_own_jobs():
    studio, left = Studio(tiny_pipeline()), threading.Event()

    def work(job):
        left.wait(20)
        job.tell("never")
        return "never"

    told = studio.run(work, ("mine", "draw"))
    next(told)
    assert studio.stop(lambda owner: owner[0] == "other") == 0
    assert studio.stop(lambda owner: owner == ("mine", "draw")) == 1
    left.set()
    assert [*told][-1].said.startswith("Stopped.")


def test_what_is_shown_holds_no_markup_of_the_prompt():
    evil = "<img src=x onerror=1> {{this}} ${1} `\\"
    shown = markup.pictures([Row(evil, (Picture(evil, RED),))]) + markup.failure(evil)
    shown += markup.status(Told(evil)) + markup.head(evil) + markup.note(evil)
    shown += markup.settings_table([(evil, evil, evil)])
    assert shown.count("<img") == 1 and shown.count("data:image/png;base64,") == 1
    assert not set("{}$`\\") & set(shown)
    assert 'role="alert"' in markup.failure("no") and "progressbar" in markup.status(Told("yes"))
    assert "progressbar" not in markup.status(Told("yes", ended=True))


@pytest.mark.parametrize(
    ("path", "asked", "answered"),
    [
        ("/", "127.0.0.1:7860", True),
        ("/", "localhost:7860", True),
        ("/", "[::1]:7860", True),
        ("/", "evil.example:7860", False),
        ("/", "", False),
        ("/assets/index.js", "127.0.0.1", True),
        ("/assets/../secret", "127.0.0.1", False),
        ("/config", "127.0.0.1", True),
        ("/gradio_api/queue/join", "127.0.0.1", True),
        ("/gradio_api/heartbeat/abc", "127.0.0.1", True),
        ("/gradio_api/upload", "127.0.0.1", False),
        ("/gradio_api/file=/etc/passwd", "127.0.0.1", False),
        ("/gradio_api/proxy=http://example.com", "127.0.0.1", False),
        ("/gradio_api/component_server", "127.0.0.1", False),
        ("/monitoring", "127.0.0.1", False),
        ("/docs", "127.0.0.1", False),
    ],
)
def test_server_answers_only_what_the_page_asks_for(path, asked, answered):
    assert allowed(path, "127.0.0.1", asked) is answered
    if answered:
        assert allowed(path, "0.0.0.0", "my-machine:7860")

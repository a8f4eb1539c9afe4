"""A chat template is a program of a stranger: it ends, whatever it says, and the next one is rendered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headway import ModelError
from plugins.models.chat_template import ChatTemplate, ChatTemplates, TemplateProcess

GOOD = ChatTemplate("{{ messages[0].content }}", Path("good.jinja"))
SEEN = {"messages": [{"role": "user", "content": "hé"}]}

ENDLESS = {
    "loops without output": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls that double": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}"
    ),
}
TOO_MUCH = {
    "a long range": ("\n{% for i in range(10000000) %}x{% endfor %}", r"t\.jinja:2: .*Range too big"),
    "a long text": ("{{ 'x' * 70000000 }}", "renders 70,000,000 characters"),
    "all memory": ("{{ 'x' * 10000000000 }}", "more than 1024 MiB"),
    "all memory of a filter": ("{{ 'x' | center(10000000000) }}", "more than 1024 MiB"),
    "calls without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "no template": ("line\n{% for %}", r"t\.jinja:2: .*is no Jinja template"),
    "a refusal": (
        "\n\n{{ raise_exception('no system') }}",
        r"t\.jinja:3: .*refuses these messages: no system",
    ),
}


@pytest.fixture(scope="module")
def process():
    process = TemplateProcess(seconds=0.1)
    yield process
    process.close()


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template_is_stopped(process, source):
    with pytest.raises(ModelError, match=r"t\.jinja: the chat template takes more than 0\.1 s of CPU time"):
        process.render(ChatTemplate(source, Path("t.jinja")), SEEN)
    assert process.render(GOOD, SEEN) == "hé"


@pytest.mark.parametrize(("source", "message"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_asks_for_too_much_is_refused(source, message):
    process = TemplateProcess()
    with pytest.raises(ModelError, match=message):
        process.render(ChatTemplate(source, Path("t.jinja")), SEEN)
    assert process.render(GOOD, SEEN) == "hé"
    process.close()


def test_messages_that_are_too_large_are_not_sent(tmp_path):
    templates = ChatTemplates(tmp_path, {"chat_template": GOOD.source}, {})
    text = "x" * 40_000_000
    with pytest.raises(ModelError, match="messages of 80,000,008 characters: expected at most 67,108,864"):
        templates.render([{"role": "user", "content": text}, {"role": "user", "content": [{"text": text}]}])


def test_a_template_sees_no_secret_of_the_environment(process, monkeypatch):
    monkeypatch.setenv("HEADWAY_SECRET", "x")
    process.close()
    process.render(GOOD, SEEN)
    assert b"HEADWAY_SECRET" not in Path(f"/proc/{process._process.pid}/environ").read_bytes()


def test_an_answer_to_a_question_that_was_given_up_is_not_taken_for_the_next(process, monkeypatch):
    started = process._started()
    monkeypatch.setattr(
        started.stdout, "readline", lambda: os.kill(os.getpid(), signal.SIGINT), raising=False
    )
    with pytest.raises(KeyboardInterrupt):
        process.render(ChatTemplate("first", Path("t.jinja")), SEEN)
    assert process.render(ChatTemplate("second", Path("t.jinja")), SEEN) == "second"


def test_the_process_ends_with_its_owner():
    code = (
        "import os, signal; from pathlib import Path; from plugins.models.chat_template import *\n"
        "p = TemplateProcess(); p.render(ChatTemplate('x', Path('t')), {}); print(p._process.pid, "
        "flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    child = int(done.stdout)
    assert done.returncode == -signal.SIGKILL
    for _ in range(200):  # until it has seen the end of its input
        if not _runs(child):
            return
        os.sched_yield()
        _wait_a_little()
    pytest.fail(f"process {child} outlives its owner")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_a_little() -> None:
    signal.sigtimedwait([], 0.05)

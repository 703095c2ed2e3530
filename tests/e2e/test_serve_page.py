"""The page in a real browser: chat, stop, reload, and a worker that is killed while it streams."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.browser import browser, page_of, why_no_browser
from tests.support.chains import TinyModel, sections_of, start_all
from tests.support.processes import WorkerProcess
from tests.support.serving import Server, until

pytestmark = pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))

READY = "#state[data-state=ready]"


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as one:
        yield one


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def settle(page: Any) -> str:
    """Wait for the end of the answer, and read it."""
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_selector(".message.assistant .foot")
    return str(page.inner_text(".message.assistant:last-child .text"))


def begun(page: Any) -> None:
    """Wait for the first words of the answer."""
    page.locator(".message.assistant .text", has_text=re.compile(r"\S")).wait_for()


def limit(page: Any, **settings: Any) -> None:
    page.click("#open-settings")
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.keyboard.press("Escape")


def endless(page: Any) -> None:
    """Have answers go on to the limit: a random model may draw its end token at any moment."""

    def without_end(route: Any) -> None:
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})

    page.route("**/v1/chat/completions", without_end)


def test_a_conversation_streams_is_kept_and_can_be_told_anew(opened: Any, server: Server) -> None:
    with page_of(opened) as (page, complaints):
        page.goto(server.url)
        page.wait_for_selector(READY)
        limit(page, max_tokens=12, seed=7, system="Be brief.")
        say(page, "the quick brown fox")
        first = settle(page)
        assert first and "tokens" in page.inner_text(".foot")
        page.reload()
        page.wait_for_selector(".message.assistant")
        assert page.inner_text(".message.assistant .text") == first
        assert page.inner_text("#list .name") == "the quick brown fox"
        assert page.input_value("#system") == "Be brief."
        page.click(".regenerate")
        page.wait_for_selector("#stop:not([hidden]), .foot")
        assert settle(page) == first  # the same seed
        say(page, "and the dog?")
        page.wait_for_selector(".message >> nth=3")
        settle(page)
        assert page.locator(".message").count() == 4
        page.click("#new-chat")
        page.wait_for_selector(".welcome")
        assert complaints == []


def test_stop_ends_the_answer_and_frees_the_workers(opened: Any, server: Server) -> None:
    with page_of(opened) as (page, complaints):
        page.goto(server.url)
        page.wait_for_selector(READY)
        limit(page, max_tokens=4000)
        endless(page)
        say(page, "go on and on")
        begun(page)
        assert server.metric("comboio_requests_running") == 1
        page.click("#stop")
        settle(page)
        until(lambda: server.metric("comboio_requests_running") == 0)
        assert page.locator(".error").count() == 0 and complaints == []


def test_the_train_shows_each_worker_and_moves(opened: Any, server: Server) -> None:
    for scheme, size in (("dark", (1440, 900)), ("light", (390, 844))):
        viewport = {"width": size[0], "height": size[1]}
        with page_of(opened, color_scheme=scheme, viewport=viewport) as (page, complaints):
            page.goto(server.url)
            page.wait_for_selector(READY)
            limit(page, max_tokens=4000)
            endless(page)
            say(page, "x")
            if size[0] < 800:
                page.click("#tab-live")
            page.wait_for_selector("#train .wagon:not(.engine) >> nth=1")
            page.wait_for_selector(".spark", state="attached")
            page.wait_for_selector(".windows .lit")
            assert page.locator(".windows i").count() == 4
            assert page.get_attribute("html", "data-theme") == scheme
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= size[0]
            assert complaints == []


def test_what_a_model_writes_stays_text(opened: Any, server: Server) -> None:
    with page_of(opened) as (page, complaints):
        page.goto(server.url)
        page.wait_for_selector(READY)
        limit(page, max_tokens=2)
        say(page, "<img src=x onerror=alert(1)><b>bold</b>")
        settle(page)
        assert page.locator(".message img, .message b").count() == 0
        nodes = page.evaluate(
            """async () => {
                const { render } = await import('/assets/markdown.js');
                const box = document.createElement('div');
                const said = '# Title\\n\\n**a** `<i>` <script>1</script>\\n\\n- x\\n- y\\n\\n';
                box.append(...render(said + '```\\ncode\\n```'));
                return [box.innerHTML, box.querySelectorAll('script, i').length];
            }"""
        )
        assert nodes[1] == 0 and "<h3>Title</h3>" in nodes[0] and "<pre><code>code" in nodes[0]
        assert complaints == []


def test_a_worker_that_dies_is_seen_and_the_page_goes_on_when_it_is_back(
    opened: Any, tiny: TinyModel
) -> None:
    lines = sections_of(tiny.folder, 2, "--kv-memory", "32MB")
    with ExitStack() as stack:
        workers = start_all(stack, *lines)
        server = stack.enter_context(Server("--workers", workers.option))
        page, complaints = stack.enter_context(page_of(opened))
        page.goto(server.url)
        page.wait_for_selector(READY)
        limit(page, max_tokens=4000)
        endless(page)
        say(page, "go on and on")
        begun(page)
        workers.processes[1].kill()
        page.wait_for_selector("#state[data-state=lost]")
        page.wait_for_selector(f'.wagon.lost[data-address="{workers.addresses[1]}"]')
        health = server.get("/health")
        assert health.status == 503 and health.json["status"] == "lost"
        assert workers.addresses[1] in health.json["reason"]
        assert workers.addresses[1] in page.inner_text("#trouble")
        stack.enter_context(WorkerProcess(*lines[1], "--listen", workers.addresses[1]))
        page.wait_for_selector(READY)
        page.wait_for_selector("#trouble.mended")
        page.wait_for_selector(".wagon.lost", state="detached")
        assert server.get("/health").status == 200
        # The stream itself went on; on a fast machine it may be over by now.
        page.evaluate("document.querySelector('#stop:not([hidden])')?.click()")
        settle(page)
        limit(page, max_tokens=5)
        page.click(".regenerate")
        page.wait_for_selector(".message.assistant .foot")
        assert page.locator(".error").count() == 0
        assert [it for it in complaints if "503" not in it] == []

"""The page in a real browser, and the server as a process of its own."""

import os
import re
import signal
import subprocess
import sys

import httpx2
import pytest
import tiny
from browser import browse


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server process, and the process."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model(**tiny.progressive_parts(), clip=tiny.clip()).save(folder)
    code = "from dalle_jax.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--model", str(folder), "--port", "0"]
    environment = os.environ | {"DALLE_JAX_CACHE": ""}
    with subprocess.Popen(
        [*command, "--max-batch", "4", "--no-warm-up"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            line = process.stdout.readline()
            yield re.search(r"http://127\.0\.0\.1:\d+", line)[0], process
        finally:
            process.kill()


@pytest.fixture
def page(server):
    with browse(server[0], timeout=120) as page:  # the first images compile
        yield page


@pytest.mark.browser
@pytest.mark.slow
def test_a_prompt_entered_before_the_model_is_known_waits_for_it(page):
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload(wait_until="domcontentloaded")
    page.get_by_label("Prompt").fill("red apple")
    page.get_by_label("Images", exact=True).fill("1")
    page.get_by_label("Seed").fill("7")
    page.keyboard.press("Enter")
    assert page.get_by_label("Decoder").input_value() == ""
    held[0].continue_()
    page.locator("article").filter(has_text="seed 7").wait_for()


@pytest.mark.browser
@pytest.mark.slow
def test_people_generate_vary_edit_and_read_errors(page, server):
    page.get_by_label("Prompt").fill("red apple")
    page.get_by_label("Images", exact=True).fill("2")
    page.get_by_label("Seed").fill("7")
    page.keyboard.press("Enter")
    first = page.locator("article").filter(has_text="seed 7")
    first.wait_for()
    scores = first.locator(".score").all_inner_texts()
    assert len(scores) == 2
    assert scores == sorted(scores, key=lambda text: -float(text.split()[-1]))

    first.locator(".images button").first.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename.startswith("red-apple-7-")
    page.get_by_role("button", name="Vary").click()
    page.locator("article").filter(has_text="Varied: red apple").filter(has_text="seed").wait_for()

    first.locator(".images button").first.click()
    page.get_by_role("button", name="Paint to edit").click()
    page.get_by_role("button", name="Generate painted part").click()
    assert page.get_by_text("Paint a part of the image first.").is_visible()
    page.locator("#mask").click(position={"x": 40, "y": 40})
    page.get_by_role("button", name="Generate painted part").click()
    page.locator("article").filter(has_text="Edited: red apple").filter(has_text="seed").wait_for()
    assert page.locator("article").count() == 3

    page.get_by_label("Guidance").fill("")
    page.get_by_label("Prompt").fill("   ")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Prompt is empty; say what the image shows").wait_for()
    page.reload()
    page.get_by_text("16 px").wait_for()


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_fits_a_phone(server):
    with browse(server[0], viewport={"width": 360, "height": 640}) as page:
        page.get_by_text("16 px").wait_for()
        page.get_by_label("Prompt").fill("a" * 200)
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.slow
def test_a_server_process_finishes_what_it_accepted_when_it_is_told_to_end(server):
    address, process = server
    with httpx2.stream(
        "POST",
        f"{address}/v1/images",
        json={"prompt": "red apple", "n": 8, "stream": True, "stages": 3},
        timeout=120,
    ) as answer:
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        text = answer.read().decode()
    assert "event: done" in text
    assert process.wait(60) in (0, -signal.SIGTERM)

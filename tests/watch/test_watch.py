"""What `dalle-jax watch` shows is what stands in the workdir, and nothing else leaves it."""

import http.client
import json
import re
import shutil
import threading
import time

import numpy as np
import pytest
from browser import browse

from dalle_jax.cli import main
from dalle_jax.errors import UserError
from dalle_jax.image.pixels import encode_png
from dalle_jax.watch.page import make_server, page_file
from dalle_jax.watch.run_files import POINTS, read_run

PIXELS = encode_png(np.full((4, 4, 3), 200, np.uint8))


def line(step, **metrics):
    return json.dumps({"step": step, "stage": "prior", "time_s": step * 2.0} | metrics) + "\n"


@pytest.fixture
def run(tmp_path):
    """A prior of 40 steps, ten of them done, and a codec that is done."""
    folder = tmp_path / "mine"
    prior, codec = folder / "prior", folder / "vqgan"
    for path in (prior / "sheets", prior / "checkpoints" / "000010", codec):
        path.mkdir(parents=True)
    (prior / "metrics.jsonl").write_text(
        line(5, loss=3.0, grad_norm=1.0, **{"last/loss": 2.9, "steps_per_s": 0.5})
        + line(10, loss=2.0, grad_norm=None, **{"last/loss": 1.9, "steps_per_s": 0.25})
        + line(10, **{"eval/loss": 2.5, "eval/psnr": 9.0})
        + '{"step": 1'  # cut short
    )
    (prior / "checkpoints" / "000010" / "settings.json").write_text('{"loop": {"steps": 40}}')
    for step in (5, 10):
        (prior / "sheets" / f"prior-{step:06d}.png").write_bytes(PIXELS)
    (prior / "sheets" / "notes.png").write_bytes(b"not ours")
    (codec / "metrics.jsonl").write_text(line(8, pixels=0.5).replace("prior", "vqgan"))
    (folder / "plan.json").write_text('{"steps": {"vqgan": 8}}')
    (folder / "secret.txt").write_text("secret")
    return folder


def test_stages_come_in_their_order_with_steps_time_left_and_sheets(run):
    codec, prior = read_run(run)["stages"]
    assert (codec["name"], codec["step"], codec["steps"], codec["left_s"]) == ("vqgan", 8, 8, None)
    assert (prior["name"], prior["step"], prior["steps"]) == ("prior", 10, 40)
    assert prior["left_s"] == 30 / 0.25
    assert [sheet["path"] for sheet in prior["sheets"]] == [
        "prior/sheets/prior-000005.png",
        "prior/sheets/prior-000010.png",
    ]
    assert read_run(run / "prior")["stages"][0]["folder"] == "."


def test_curves_join_training_and_held_out_and_leave_gaps_out(run):
    _, prior = read_run(run)["stages"]
    curves = {curve["name"]: curve for curve in prior["curves"]}
    assert list(curves) == ["loss", "psnr", "grad_norm", "steps_per_s"]
    assert curves["loss"] == {
        "name": "loss",
        "train": [[5, 3.0], [10, 2.0]],
        "held_out": [[10, 2.5]],
    }
    assert curves["grad_norm"]["train"] == [[5, 1.0]]


def test_long_curves_are_thinned_and_keep_their_end(run):
    lines = "".join(line(step, loss=float(step)) for step in range(1, 2001))
    (run / "prior" / "metrics.jsonl").write_text(lines)
    (loss,) = read_run(run / "prior")["stages"][0]["curves"]
    assert POINTS / 2 <= len(loss["train"]) <= POINTS
    assert loss["train"][-1] == [2000, 2000.0]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing in .* has begun to train yet"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is not a folder; give the --workdir of a run"):
        read_run(tmp_path / "nowhere")


def test_one_file_holds_the_newest_sheet_and_asks_nothing_of_the_network(run, tmp_path, capsys):
    (run / "prior" / "metrics.jsonl").write_text(line(5, **{"loss</script>": 1.0}))
    main(["watch", str(run), "--out", str(tmp_path / "new" / "run.html")])
    out = tmp_path / "new" / "run.html"
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 1
    assert page.count("</script>") == 2  # those of the page
    outside = set(re.findall(r"https?://[^\"' ]+", page)) - {"http://www.w3.org/2000/svg"}
    assert outside == set()


@pytest.fixture
def ask(run):
    server = make_server(run, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def get(path, host=None):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        headers = {} if host is None else {"Host": host}
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    get.port = server.server_port
    yield get
    server.shutdown()
    server.server_close()


def test_the_run_is_served_with_its_sheets_and_nothing_else(ask, run):
    status, page = ask("/")
    assert (status, b"null</script>" in page) == (200, True)
    status, said = ask("/run.json")
    assert (status, json.loads(said)) == (200, read_run(run))
    assert ask("/prior/sheets/prior-000010.png") == (200, PIXELS)
    for path in ("/secret.txt", "/prior/sheets/notes.png", "/prior/sheets/../../secret.txt"):
        assert ask(path)[0] == 404
    assert ask("/%2e%2e/mine/secret.txt")[0] == 404


def test_a_page_of_another_name_cannot_read_the_run(ask):
    assert ask("/run.json", host="evil.example:80")[0] == 421
    assert ask("/run.json", host=f"localhost:{ask.port}")[0] == 200


def test_a_run_that_has_not_begun_is_said_and_looked_for_again(ask, run):
    shutil.move(run / "prior", run / "vqgan" / "away")
    (run / "vqgan" / "metrics.jsonl").unlink()
    assert "has begun to train yet" in json.loads(ask("/run.json")[1])["problem"]


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_draws_the_run_and_follows_it(ask, run):
    with browse(f"http://127.0.0.1:{ask.port}/", viewport={"width": 390, "height": 800}) as page:
        prior = page.locator("#prior")
        prior.wait_for()
        assert "10 of 40 updates" in prior.inner_text()
        assert "held out 2.5" in prior.inner_text()
        assert prior.locator("img").get_attribute("src") == "prior/sheets/prior-000010.png"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        with (run / "prior" / "metrics.jsonl").open("a") as file:
            file.write("\n" + line(15, loss=1.25))
        page.get_by_text("15 of 40 updates").wait_for(timeout=15_000)
        (run / "file.html").write_text(page_file(run))
        page.goto((run / "file.html").as_uri())
        page.locator("#prior img").wait_for()
        assert "training 1.25" in page.locator("#prior").inner_text()
    assert time.time() - read_run(run)["stages"][1]["written"] < 60

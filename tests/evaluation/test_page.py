"""The page of a run: it needs nothing else, tells what is there and what is wrong, and nothing in a run can break it."""

import base64
import io
import json
import re
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.finished_run import EVIL, add_epoch, finished_run, judge, served, started_run
from PIL import Image

from dag import report
from dag.evaluation.page import pictures
from dag.evaluation.page.charts import panels, spread
from dag.evaluation.page.concerns import concerns
from dag.evaluation.page.document import document, write_page
from dag.evaluation.page.facts import DONE, RUNNING, STOPPED, read
from dag.evaluation.page.serve import PageServer
from dag.run.folder import RunFolder

PROMPTS = ["a cat", "a red fox"]


class Page(HTMLParser):
    """What a browser would see of a page: its elements, its text by element id, and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def state(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "run", PROMPTS)


# -- one file -----------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(run.path), "--html"]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report.html'}\n"
    html = (run.path / "report.html").read_text()
    page = Page(html)
    assert page.loaded == ["data:,"], "the empty icon is all that is named"
    addresses = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    assert "@import" not in html and "url(" not in html
    assert "default-src 'none'" in html
    assert page.tags.count("script") == 2
    assert "{{" not in html.replace(page.scripts[1], "")


def test_the_page_has_pictures_curves_and_text(run: RunFolder) -> None:
    page = Page(document(run))
    sheets = page.state["sheets"]
    assert [picture["epoch"] for picture in sheets["pictures"]] == [0, 1, 2]
    assert [picture["reward"] for picture in sheets["pictures"]] == [1.0, 2.0, 3.0]
    assert sheets["rows"] == 2 and sheets["prompts"] == PROMPTS
    assert sheets["ratio"] == pytest.approx(196 / 110)
    for picture, colour in zip(sheets["pictures"], [(255, 0, 0), (255, 165, 0), (0, 128, 0)], strict=True):
        kind, data = picture["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        found = Image.open(io.BytesIO(base64.b64decode(data)))
        assert found.size == (196, 220)
        pixel = found.getpixel((50, 50))
        assert isinstance(pixel, tuple)
        assert all(abs(a - b) < 8 for a, b in zip(pixel, colour, strict=True))
    shown = {panel["id"]: panel for panel in page.state["panels"]}
    assert list(shown) == ["reward", "diversity", "residual", "residuals"], "only what was measured"
    rollouts, evaluated = shown["reward"]["series"]
    assert rollouts["points"] == [[1, 2.5], [2, 3.5]] and rollouts["band"] == [[2.0, 3.0], [3.0, 4.0]]
    assert evaluated["points"] == [[0, 1.0], [1, 2.0], [2, 3.0]]
    for text in (
        "DAG-DB trains the embedded model",
        "8 of 8 trajectories",
        "epoch 2 of 2",
        "some machine",
        "torch 2.0",
    ):
        assert text in page.text, text
    assert f'lora = "{run.path}/lora"\n' in page.text and "ComfyUI/models/loras/" in page.text
    assert "images_per_prompt: 2" in page.text, "the recipe"


def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    plain = Page(document(finished_run(tmp_path / "plain", PROMPTS)))
    folder = tmp_path / "<b onclick=alert(3)>"
    run = finished_run(folder, [EVIL, "a dog"])
    description = run.read_description()
    description["recipe"]["model"]["path"] = EVIL
    description["recipe"]["objective"]["name"] = EVIL
    description |= {"device": EVIL, "commit": EVIL, "versions": {EVIL: EVIL}}
    run.write_description(description)
    evil = Page(document(run))
    assert evil.tags == plain.tags
    assert "{{state}}" in evil.text and EVIL in evil.text
    run = finished_run(tmp_path / "prompts", [EVIL, "a dog"])
    judge(run, "evaluation", {EVIL: 1.0})
    page = Page(document(run))
    assert page.state["sheets"]["prompts"] == [EVIL, "a dog"]
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert "<" not in page.scripts[0], "neither </script nor <!-- can begin"
    assert document(run).count("alert(1)</script>") == 0
    assert EVIL in page.text


def test_a_full_adapter_is_used_as_a_unet(run: RunFolder) -> None:
    description = run.read_description()
    description["recipe"]["adapter"]["kind"] = "full"
    description["recipe"]["model"] |= {"path": "some/model", "revision": "abc"}
    run.write_description(description)
    text = Page(document(run)).text
    assert f'base = "some/model"\ntrained = "{run.path}/lora/unet"\n' in text
    assert "pipe.unet = UNet2DConditionModel.from_pretrained(trained, " in text
    assert 'from_pretrained(base, revision="abc", torch_dtype=dtype)' in text
    assert "ComfyUI" not in text


def test_a_flow_model_is_drawn_without_eta(run: RunFolder) -> None:
    description = run.read_description()
    description["recipe"]["model"]["path"] = "owner/flux"
    description["recipe"]["sampler"] |= {"guidance_scale": 1.0, "guidance_embedding": 2.5}
    description["model"] = {"pipeline": "FluxPipeline", "prediction_type": "velocity", "takes_guidance": True}
    run.write_description(description)
    html = document(run)
    text = Page(html).text
    assert "sigmas=numpy.linspace(1, 1 / steps, steps), guidance_scale=2.5, max_sequence_length=512)" in text
    assert "the steps of the ODE, without noise" in text and "eta=" not in text and "DDIMScheduler" not in text
    assert f"Put <code>{run.path}/lora/lora_kohya.safetensors</code> into" in html and "diffusers' names of" in text
    description["recipe"]["adapter"]["kind"] = "full"
    run.write_description(description)
    text = Page(document(run)).text
    assert f'trained = "{run.path}/lora/transformer"\n' in text
    assert "pipe.transformer = FluxTransformer2DModel.from_pretrained(trained, " in text


# -- missing and damaged parts ------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    page = Page(document(started_run(tmp_path / "run", PROMPTS)))
    assert page.state["panels"] == [] and page.state["sheets"]["pictures"] == []
    assert "Nothing is measured yet" in page.text and "0 of 8 trajectories" in page.text


def test_done_stopped_and_running(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run", PROMPTS)
    add_epoch(run, 0, 2)
    assert read(run).status == STOPPED and "--resume" in Page(document(run)).text
    with run.held():
        assert read(run).status == RUNNING
        assert Page(document(run)).state["running"] is True
        assert "not judged" not in " ".join(concerns(read(run))), "that comes at the end"
    for epoch in (1, 2):
        add_epoch(run, epoch, 2)
    assert read(run).status == DONE
    with run.held():
        assert read(run).status == DONE, "the last epoch is written, whoever holds the folder"


def test_a_damaged_picture_is_left_out_and_named(run: RunFolder) -> None:
    whole = run.sheet(1).read_bytes()
    for damage in (b"", b"no picture", whole[: len(whole) // 2]):
        run.sheet(1).write_bytes(damage)
        page = Page(document(run))
        assert [picture["epoch"] for picture in page.state["sheets"]["pictures"]] == [0, 2]
        assert "samples/epoch_0001.png cannot be read and is left out." in page.text


def test_pictures_of_other_prompts_are_left_out(run: RunFolder) -> None:
    Image.new("RGB", (196, 330)).save(run.sheet(0))
    page = Page(document(run))
    assert [picture["epoch"] for picture in page.state["sheets"]["pictures"]] == [1, 2]
    assert "another number of prompts" in page.text


def test_damaged_metrics_and_recipes_of_other_versions(run: RunFolder) -> None:
    with run.metrics.path.open("a") as file:
        file.write("{broken\n")
    assert "metrics.jsonl cannot be read" in Page(document(run)).text
    run.write_description({"recipe": {"train": "unheard of", "reward": 3}})
    page = Page(document(run))
    assert page.state["sheets"]["rows"] == 1, "one strip, since nothing tells how to cut it"
    assert page.state["sheets"]["prompts"] == []


def test_a_page_that_cannot_be_written_is_one_sentence(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_page", full)
    assert report.main([str(run.path), "--html"]) == 1
    assert capsys.readouterr().err == f"error: {run.path / 'report.html'}: cannot be written: No space left on device\n"


def test_many_large_sheets_stay_below_ten_megabytes(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run", PROMPTS, epochs=40)
    noise = Image.effect_noise((800, 800), 100).convert("RGB")
    noise.save(run.sheet(0), compress_level=0)
    for epoch in range(1, 40):
        run.sheet(epoch).hardlink_to(run.sheet(0))
    sheets, complaints = pictures.read_sheets(run)
    assert not complaints
    epochs = [sheet.epoch for sheet in sheets]
    assert len(epochs) == pictures.MOST_SHEETS and epochs[0] == 0 and epochs[-1] == 39
    assert write_page(run).stat().st_size < 10_000_000


# -- what to look at ----------------------------------------------------------------------------------------------


def told(run: RunFolder) -> str:
    return " ".join(concerns(read(run)))


def changed(path: Path, rows: list[dict[str, Any]]) -> RunFolder:
    run = started_run(path, PROMPTS, epochs=len(rows) - 1)
    for epoch, row in enumerate(rows):
        add_epoch(run, epoch, 2, **row)
    return run


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"diversity": 0.3}, {"diversity": 0.19}], "Diversity fell by 37 %"),
        ([{"diversity": 0.3}, {"diversity": 0.21}], None),
        ([{"noun_top1": 0.9}, {"noun_top1": 0.8}], "the judge saw the prompt's noun in 90 %"),
        ([{"noun_top1": 0.9}, {"noun_top1": 0.87}], None),
        ([{"noun_top1": 0.9}, {"noun_top1": 0.8, "eval_reward_mean": 0.5}], "reward has not risen: 1 before"),
        ([{"residual_rms": rms} for rms in (None, 90, 5, 6, 8, 9)], "Residuals grow: their rms was 5 nats"),
        ([{"residual_rms": rms} for rms in (None, 90, 9, 8, 6, 9)], None),
        ([{"eval_reward_mean": None}] * 2, "There is no fixed evaluation"),
        ([{"diversity": None}] * 2, "Diversity was not measured"),
    ],
)
def test_concerns(tmp_path: Path, rows: list[dict[str, Any]], said: str | None) -> None:
    run = changed(tmp_path / "run", rows)
    judge(run, "evaluation", {})
    if said is None:
        assert told(run) == ""
        assert "No number stands out" in Page(document(run)).text
    else:
        assert said in told(run)
        assert said in Page(document(run)).text


@pytest.mark.parametrize(("own", "is_told"), [(50.0, True), (58.9, False), (61.0, False)])
def test_alignment_against_the_noise_of_other_seeds(run: RunFolder, own: float, is_told: bool) -> None:
    judge(run, "evaluation", {"base": 60.0, "base, other seeds": 59.0, "run": own})
    assert ("follow their prompts less" in told(run)) is is_told


def test_the_newest_judgement_is_shown(run: RunFolder) -> None:
    assert "not judged" in told(run) and "python -m dag.evaluate --run" in Page(document(run)).text
    for number in ("evaluation", "evaluation_002", "evaluation_010"):
        judge(run, number, {"base": 60.0, "run": 61.5})
    (run.path / "evaluation_011").mkdir()
    page = Page(document(run))
    assert "not judged" not in page.text
    assert "A legend of evaluation_010." in page.text and "evaluation_002" not in page.text
    assert page.tags.count("table") == 1 and page.tags.count("td") == 2 and page.tags.count("th") == 4


def test_many_steps_are_drawn_as_eight_lines(run: RunFolder) -> None:
    run.metrics.write({"epoch": 2, "residual_rms_per_step": [float(k + 1) for k in range(100)]})
    residuals = next(panel for panel in panels(read(run)) if panel["id"] == "residuals")
    names = [one["name"] for one in residuals["series"]]
    assert len(names) == 8 and names[0] == "step 0 (noisiest)" and names[-1] == "step 99 (cleanest)"
    assert residuals["log"]
    assert list(spread(3, 8)) == [0, 1, 2] and list(spread(9, 3)) == [0, 4, 8]


# -- the server ---------------------------------------------------------------------------------------------------


def get(address: str, host: str | None = None) -> tuple[int, str, bytes]:
    """(status, type, body) of an answer."""
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read()


def test_the_served_page_follows_the_run(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run", PROMPTS)
    add_epoch(run, 0, 2)
    with run.held(), served(run) as address:
        status, kind, body = get(address)
        assert (status, kind) == (200, "text/html; charset=utf-8")
        page = Page(body.decode())
        assert 'data-live="yes"' in body.decode()
        first = json.loads(get(f"{address}state.json")[2])
        assert (
            first["running"]
            and first["sheets"] == page.state["sheets"]
            and "epoch 0 of 2" in first["fragments"]["summary"]
        )
        (picture,) = first["sheets"]["pictures"]
        assert picture["src"].startswith("pictures/0.jpg?v=")
        status, kind, jpeg = get(address + picture["src"])
        assert (status, kind) == (200, "image/jpeg") and Image.open(io.BytesIO(jpeg)).size == (196, 220)
        for epoch in (1, 2):
            add_epoch(run, epoch, 2)
        second = json.loads(get(f"{address}state.json")[2])
        assert [picture["epoch"] for picture in second["sheets"]["pictures"]] == [0, 1, 2]
        assert not second["running"] and "epoch 2 of 2" in second["fragments"]["summary"]
        assert not (run.path / "report.html").exists(), "the server writes nothing"


def test_the_server_gives_nothing_else_and_nobody_else(run: RunFolder) -> None:
    with served(run) as address:
        for path in ("run.json", "pictures/../run.json", "pictures/7.jpg", "%2e%2e/run.json", "../run.json"):
            assert get(address + path)[0] == 404, path
        assert get(address, host="evil.example:8321")[0] == 403
        assert get(address, host=f"localhost:{address.split(':')[-1].strip('/')}")[0] == 200
        (run.path / "run.json").unlink()
        status, _, body = get(f"{address}state.json")
        assert status == 503 and b"run.json: cannot be read" in body


def test_a_port_that_cannot_be_used_is_one_sentence(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with PageServer(run, 0) as server:
        port = server.server_port
        assert report.main([str(run.path), "--serve", str(port)]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"error: --serve {port}: the port cannot be used (Address already in use); choose another: --serve {port + 1}\n"
    )
    assert report.main([str(run.path), "--serve", "70000"]) == 2
    assert "a port is a number from 0 to 65535" in capsys.readouterr().err

"""view.py: the page's data by hand, what it refuses, and the page in a browser, if there is one."""

import json
import re
import shutil
import subprocess

import pytest
from helpers import fails_with

from lab import view

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
CONFIG = {"preset": "vapo", "steps": 4, "reward_wrong": -1.0, "reward_correct": 1.0, "reward": "",
          "alpha": 1.0, "length_adaptive_gae": True, "lam_policy": 0.5}  # fmt: skip
EVIL = ["<script>", "window.ran = 1", "</script>", "<!--"]
SAMPLES = [
    {"step": step, "problem": "c2", "answer": "z", "correct": step == 4, "finish": "stop",
     "reward": 1.0 if step == 4 else -1.0, "response": "".join(tokens),
     "tokens": tokens, "values": [0.0, 0.5, 0.25, 0.0][: len(tokens)],
     "true": [0.0, 0.5, 1.0, -1.0][: len(tokens)]}
    for step, tokens in ((0, EVIL), (2, ["k", "2"]), (4, ["q", "1"]), (4, ["q", "1", "z", "<eos>"]))
]  # fmt: skip


def write(run_dir, samples, **config):
    """A run directory; returns its name."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps({"settings": CONFIG | config}))
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return str(run_dir)


def data_of(path):
    """(the page, its data)"""
    text = path.read_text()
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_data_by_hand(tmp_path):
    """α = 1 and two tokens: λ = ½. ΔV is (½, −1 − ½) of the critic, so Â = (½ − ½ · 1½, −1½)."""
    run_dir = write(tmp_path / "run", SAMPLES)
    assert view.main(["--run", run_dir]) == view.main([run_dir]) == f"{run_dir}/view.html"
    text, data = data_of(tmp_path / "run" / "view.html")
    assert (data["run"], data["preset"], data["steps"]) == ("run", "vapo", 4)
    assert (data["lowest"], data["highest"]) == (-1, 1)
    assert [answer["step"] for answer in data["answers"]] == [0, 2, 4, 4]
    assert data["answers"][1] == {
        "step": 2, "problem": "c2", "answer": "z", "tokens": ["k", "2"], "correct": False,
        "finish": "stop", "reward": -1.0, "critic": [[0.0, 0.5], [-0.25, -1.5]],
        "truth": [[0.0, 0.5], [-0.25, -1.5]],
    }  # fmt: skip
    assert data["answers"][2]["critic"] == [[0.0, 0.5], [0.75, 0.5]]
    assert re.findall(r"\w+://[^\"]*", text) == ["http://www.w3.org/2000/svg"]  # no network
    assert "src=" not in text and "<link" not in text and len(text) < 30_000


def test_without_piece_3_λ_is_the_flag_and_without_a_world_there_is_no_truth(tmp_path):
    samples = [SAMPLES[1] | {"true": []}]
    view.main([write(tmp_path / "run", samples, length_adaptive_gae=False, lam_policy=0.25)])
    (answer,) = data_of(tmp_path / "run" / "view.html")[1]["answers"]
    assert answer["critic"] == [[0.0, 0.5], [0.125, -1.5]] and "truth" not in answer


def test_the_text_of_a_model_cannot_end_the_data(tmp_path):
    view.main([write(tmp_path / "run", SAMPLES)])
    text, data = data_of(tmp_path / "run" / "view.html")
    assert data["answers"][0]["tokens"] == EVIL and "window.ran" in text
    assert text.count("<script") == 2 and text.count("</script") == 2 and "<!--" not in text


def test_a_large_run_shows_every_second_evaluation_the_last_among_them(
    tmp_path, monkeypatch, capsys
):
    run_dir = write(tmp_path / "run", [SAMPLES[1] | {"step": step} for step in range(8)])
    view.main([run_dir])
    whole = (tmp_path / "run" / "view.html").stat().st_size
    assert view.LIMIT == 2_000_000
    monkeypatch.setattr(view, "LIMIT", whole - 1)
    view.main([run_dir])
    assert [a["step"] for a in data_of(tmp_path / "run" / "view.html")[1]["answers"]] == [
        1,
        3,
        5,
        7,
    ]
    monkeypatch.setattr(view, "LIMIT", 100)
    fails_with(capsys, view.main, [run_dir], "no view of", "more than 100 bytes")


def test_bad_input_ends_with_one_line(tmp_path, capsys):
    old = [{name: x for name, x in line.items() if name != "reward"} for line in SAMPLES]
    without = [line | {"values": []} for line in SAMPLES]
    broken = [SAMPLES[1] | {"values": [0.5, float("nan")]}]
    for argv, said in (
        ([], "give a run directory"),
        (["nowhere"], "no view of nowhere: "),
        ([write(tmp_path / "old", old)], "an earlier revision wrote samples.jsonl"),
        ([write(tmp_path / "grpo", without)], "has no critic"),
        ([write(tmp_path / "empty", [])], "has not come to its first evaluation"),
        ([write(tmp_path / "nan", broken)], "no view of"),
    ):
        fails_with(capsys, view.main, argv, said)


SCRIPT = """
const key = (name) => document.body.dispatchEvent(
  new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
const colours = () => [...document.querySelectorAll(".text span")].map((s) => s.style.background);
const look = () => ({at: $("at").textContent, text: $("answers").innerText, colours: colours(),
  underlined: document.querySelectorAll(".negative").length,
  chosen: [...document.querySelectorAll("article")].findIndex((a) => a.className === "chosen")});
const seen = {first: look(), ran: window.ran === 1};
key("ArrowLeft"); seen.left = look(); key("ArrowRight"); seen.right = look();
for (const button of document.querySelectorAll("#modes button")) {
  button.click(); seen[button.textContent] = look();
}
key("ArrowRight"); seen.end = look(); key("ArrowDown"); seen.down = look();
document.querySelector("article [data-t='1']").dispatchEvent(
  new MouseEvent("mouseover", {bubbles: true}));
seen.pointed = document.querySelector(".said").textContent;
$("length").value = "short"; $("length").onchange(); seen.short = look();
$("verdict").value = "wrong"; $("verdict").onchange(); seen.none = look();
document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    """No error; arrows, switch and filters do what they say; an answer's <script> is not run."""
    view.main([write(tmp_path / "run", SAMPLES)])
    page = tmp_path / "run" / "view.html"
    page.write_text(page.read_text().replace("</body>", f"<script>{SCRIPT}</script></body>"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path}/user", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(done.stdout.split("SEEN")[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert seen["first"]["at"] == "after 0 of 4 rollouts" and not seen["ran"]
    assert all(token in seen["first"]["text"] for token in EVIL)
    assert seen["left"] == seen["first"]
    assert seen["right"]["at"] == "after 2 of 4 rollouts"
    assert "k2" in seen["right"]["text"] and "✗ wrong" in seen["right"]["text"]
    kinds = [seen[kind] for kind in ("V", "ΔV", "advantage")]
    assert len({tuple(look["colours"]) for look in kinds}) == 3
    assert len({look["text"] for look in kinds}) == 1
    assert [look["underlined"] for look in kinds] == [0, 2, 2]  # of the critic and of the truth
    assert len(seen["end"]["colours"]) == 2 * 6 and "✓ right" in seen["end"]["text"]
    assert (seen["end"]["chosen"], seen["down"]["chosen"]) == (0, 1)
    assert seen["pointed"] == "2. critic: V 0.50, ΔV 0.50, Â 0.50 — truth: V 0.50, ΔV 0.50, Â 0.50"
    assert len(seen["short"]["colours"]) == 2 * 2 and seen["none"]["text"] == ""

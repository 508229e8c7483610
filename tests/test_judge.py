"""Answers judged through an endpoint on this machine; scores follow from its replies by plain arithmetic."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from benchmark_files import make_files, records_of
from test_benchmarks import make_model

from clips_core.config import load_config
from clips_core.errors import InputError
from clips_core.folders import read_json, read_manifest
from eval_suites.benchmarks import EvalConfig, load_suite, run_suite, told
from eval_suites.judge import JudgeConfig, check_judged, judge, number

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = 6


class Judge:
    """A server that speaks the chat-completions protocol. `says`: prompt and how often it was asked before → reply."""

    def __init__(self, says: Callable[[str, int], str], name: str = "judge-1"):
        self.says, self.name = says, name
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                [message] = body["messages"]
                with lock:
                    before = Counter(each["messages"][0]["content"] for each in outer.bodies)[message["content"]]
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                choice = {"message": {"content": outer.says(message["content"], before)}, "finish_reason": "stop"}
                data = json.dumps({"model": outer.name, "choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "Judge":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and answers to MM-Vet and POPE that nobody has judged."""
    folder = tmp_path_factory.mktemp("answered")
    data = make_files(folder / "data", ["mmvet", "pope"], n=QUESTIONS)
    suite = {
        "name": "both",
        "tasks": {"mmvet": {"generation": {"max_new_tokens": 3, "min_new_tokens": 1, "temperature": 0}}, "pope": {}},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    run_suite(EvalConfig(make_model(folder / "model"), data, folder / "out", str(folder / "suite.yaml"), partial=True))
    return folder


@pytest.fixture
def run(answered: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be judged."""
    import shutil

    return Path(shutil.copytree(answered / "out" / "real", tmp_path / "real"))


def config(run: Path, server: Judge, **values: Any) -> JudgeConfig:
    return JudgeConfig(run, "judge", server.url, retry_wait=0.01, **values)


def mood(prompt: str, before: int) -> str:
    """A judge whose scores differ from question to question and from time to time: (0.1, 0.2, …) by the prompt's length."""
    return f"{((len(prompt) + before) % 9) / 10} because it is so"


def test_the_figures_are_told_and_what_waits(answered: Path) -> None:
    suite = load_suite(str(answered / "suite.yaml"))
    lines = told(Path("runs/eval/real"), suite, {"pope": {"pope_accuracy": 0.86553, "n": 6000}}, {"pope": [6000, 9000]})
    assert [" ".join(line.split()) for line in lines.splitlines()] == [
        "runs/eval/real:",
        "mmvet waits for its judge: clips-llava eval judge runs/eval/real --model … --endpoint …",
        "pope pope_accuracy 0.8655 (6,000 of 9,000 questions)",
    ]


def test_without_a_judge_there_is_no_score(run: Path) -> None:
    assert set(read_json(run / "results.json")) == {"pope"}
    assert [row["score"] for row in records_of(run, "mmvet")] == [None] * QUESTIONS
    assert all(row["answer"] for row in records_of(run, "mmvet"))
    with pytest.raises(InputError, match=r"mmvet is answered, but not judged, .*: run clips-llava eval judge"):
        check_judged({str(run): read_manifest(run)})


def test_scores_are_the_means_of_the_replies(run: Path) -> None:
    with Judge(mood) as server:
        assert judge(config(run, server, repeats=3)) == [run]
    rows = records_of(run, "mmvet")
    journal = [json.loads(line) for line in (run / "judge-mmvet.jsonl").read_text().splitlines()]
    assert len(journal) == len(server.bodies) == 3 * QUESTIONS
    for row in rows:
        said = sorted(float(each["replies"][-1].split()[0]) for each in journal if each["doc_id"] == row["doc_id"])
        assert sorted(row["scores"]) == said and len(said) == 3
        assert row["score"] == pytest.approx(mean(said))
    results = read_json(run / "results.json")
    assert results["mmvet"] == {
        "gpt_eval_score": pytest.approx(100 * mean(row["score"] for row in rows)),
        "n": QUESTIONS,
    }

    told = read_manifest(run)["outputs"]["judge"]["mmvet"]
    assert (told["model"], told["answered_by"], told["repeats"]) == ("judge", ["judge-1"], 3)
    assert told["mean"] == pytest.approx(mean(row["score"] for row in rows))
    # the standard error of the mean that is the judge's own: of the mean of 3 verdicts, over the questions
    spread = sum(stdev(row["scores"]) ** 2 / 3 for row in rows) ** 0.5 / QUESTIONS
    assert told["judge_error"] == pytest.approx(spread) and spread > 0
    assert told["interval"][0] < told["mean"] < told["interval"][1]
    for name, own in told["categories"].items():
        having = [row["score"] for row in rows if name in row["category"].split(",")]
        assert own == {"score": pytest.approx(mean(having)), "n": len(having)}
    assert len(told["categories"]) >= 2
    check_judged({str(run): read_manifest(run)})


def test_the_prompt_is_mm_vets(run: Path) -> None:
    """Few-shot examples, question, reference with its <OR> set apart, answer: as the publication writes it."""
    with Judge(mood) as server:
        judge(config(run, server, repeats=1))
    asked = {body["messages"][0]["content"] for body in server.bodies}
    for row in records_of(run, "mmvet"):
        [prompt] = [
            text for text in asked if text.endswith(f"\n{row['question']} | red <OR> blue | {row['answer']} |")
        ] or [""]
        assert prompt.startswith("Compare the ground truth and prediction from AI models")
        assert prompt.count("What is x in the equation? | -1 <AND> -5 |") == 5
    told = read_manifest(run)["outputs"]["judge"]["mmvet"]
    assert told["prompt"].endswith("| red <OR> blue | {answer} |")
    assert all(body["temperature"] == 0 and body["max_tokens"] == 128 and "seed" not in body for body in server.bodies)


def test_a_reply_that_is_no_number_is_asked_again(run: Path) -> None:
    def hesitant(prompt: str, before: int) -> str:
        return "I would say good." if before == 0 else "0.5"

    with Judge(hesitant) as server:
        judge(config(run, server, repeats=1, concurrency=1))
    journal = [json.loads(line) for line in (run / "judge-mmvet.jsonl").read_text().splitlines()]
    different = len({body["messages"][0]["content"] for body in server.bodies})
    assert sum(row["replies"] == ["I would say good.", "0.5"] for row in journal) == different
    assert sorted({body["temperature"] for body in server.bodies}) == [0, 0.5]
    assert [row["score"] for row in records_of(run, "mmvet")] == [0.5] * QUESTIONS


def test_lines_are_json_whatever_stands_in_an_answer(run: Path) -> None:
    """U+2028 ends a line for Python's splitlines, but not in JSON; and a kill may cut a character in two."""
    path = run / "mmvet.jsonl"
    rows = records_of(run, "mmvet")
    rows[2]["answer"] = "red\u2028blue\x85é"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with Judge(lambda prompt, before: "0.5 so\u2028it is") as server:
        judge(config(run, server, repeats=1))
        journal = run / "judge-mmvet.jsonl"
        whole = journal.read_bytes()
        journal.write_bytes(whole + '{"doc_id": 0, "replies": ["0.5 é'.encode()[:-1])
        asked = len(server.bodies)
        judge(config(run, server, repeats=1))
        assert len(server.bodies) == asked and journal.read_bytes() == whole
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["score"] for line in lines] == [0.5] * QUESTIONS


def test_no_number_at_all_is_an_error_and_never_a_zero(run: Path) -> None:
    with (
        Judge(lambda prompt, before: "Excellent!") as server,
        pytest.raises(InputError, match=r"no number of 0-1 in 3 replies"),
    ):
        judge(config(run, server, repeats=1))
    assert "mmvet" not in read_json(run / "results.json") and records_of(run, "mmvet")[0]["score"] is None
    with Judge(mood) as server, pytest.raises(InputError, match="is the server running"):
        url = server.url
        server.__exit__()
        judge(JudgeConfig(run, "judge", url, retries=0))
    assert "mmvet" not in read_json(run / "results.json")


def test_judging_goes_on_where_it_stopped(run: Path) -> None:
    silent = 3

    def tired(prompt: str, before: int) -> str:
        return mood(prompt, before) if len(server.bodies) <= silent else "no more"

    with Judge(tired) as server, pytest.raises(InputError, match="run again to go on"):
        judge(config(run, server, repeats=2, concurrency=1))
    kept = (run / "judge-mmvet.jsonl").read_text().splitlines()
    assert len(kept) == silent
    with open(run / "judge-mmvet.jsonl", "a") as file:
        file.write('{"doc_id": 5, "rep')  # a kill in the middle of a line
    with Judge(mood) as server:
        judge(config(run, server, repeats=2))
        assert len(server.bodies) == 2 * QUESTIONS - silent
        judge(config(run, server, repeats=2))
        assert len(server.bodies) == 2 * QUESTIONS - silent, "nothing is asked twice"
        judge(config(run, server, repeats=3))
        assert len(server.bodies) == 3 * QUESTIONS - silent, "a further repeat adds to those that are there"
    assert (run / "judge-mmvet.jsonl").read_text().splitlines()[:silent] == kept
    assert all(len(row["scores"]) == 3 for row in records_of(run, "mmvet"))


def test_different_judges_are_neither_mixed_nor_compared(run: Path, answered: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(run, tmp_path / "other"))
    third = Path(shutil.copytree(run, tmp_path / "third"))
    with Judge(mood) as server, Judge(mood, name="judge-2") as newer:
        judge(config(run, server, repeats=1))
        with pytest.raises(InputError, match=r"holds verdicts by judge .*, and this is stern .*judges are not mixed"):
            judge(JudgeConfig(run, "stern", server.url, repeats=1))
        judge(JudgeConfig(other, "stern", server.url, repeats=1))
        judge(config(third, newer, repeats=1))
    manifests = {str(folder): read_manifest(folder) for folder in (run, other, third)}
    check_judged({name: manifests[name] for name in [str(run)]})
    for second, name in ((other, "stern"), (third, r"judge \(which answers as judge-2\)")):
        with pytest.raises(
            InputError, match=rf"mmvet: scores by different judges are not compared: .* by judge .*, .* by {name}"
        ):
            check_judged({str(folder): manifests[str(folder)] for folder in (run, second)})


def test_a_judged_run_is_still_the_finished_run(answered: Path, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(answered / "out", tmp_path / "out"))
    with Judge(mood) as server:
        assert judge(config(out, server, repeats=1)) == [out / "real"], "the folder above is taken too"
    before = (out / "real/manifest.json").read_bytes()
    run_suite(EvalConfig(answered / "model", answered / "data", out, suite=str(answered / "suite.yaml"), partial=True))
    assert (out / "real/manifest.json").read_bytes() == before


def test_bad_input(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="holds no finished evaluation"):
        judge(JudgeConfig(tmp_path / "nothing", "j", "http://127.0.0.1:9/v1"))
    with pytest.raises(InputError, match="not the files that"):
        judge(
            JudgeConfig(run, "j", "http://127.0.0.1:9/v1", data=make_files(tmp_path / "d", ["mmvet", "pope"], seed=9))
        )
    with pytest.raises(InputError, match="no environment variable NO_SUCH_KEY"):
        judge(JudgeConfig(run, "j", "http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY"))
    with pytest.raises(InputError, match="endpoint: must be an address"):
        load_config(JudgeConfig, None, [f"run={run}", "model=j", "endpoint=localhost"])
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with Judge(mood) as server:
        judge(config(run, server, repeats=1, api_key_env="JUDGE_KEY"))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}
    assert not any("s3cret" in path.read_text() for path in run.iterdir() if path.is_file())


@pytest.mark.parametrize(
    ("reply", "value"),
    [("0.7", 0.7), (" 1.0 |\n", 1.0), ("0", 0.0), ("<think>0.1?</think>\n0.9 is fair", 0.9), ("1.1", None),
     ("-0.1", None), ("nan", None), ("", None), ("Score: 0.5", None)],
)  # fmt: skip
def test_numbers(reply: str, value: float | None) -> None:
    assert number(reply) == value

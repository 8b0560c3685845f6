"""`loramix serve` as a process: it says where it is, answers, and ends well."""

import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from loramix.cli import main
from tests.serve.front import served

ASKED = {"messages": [{"role": "user", "content": "my card was stolen"}], "temperature": 0}


def test_it_answers_and_ends_well_and_starts_again(tmp_path, capsys):
    log = tmp_path / "logs" / "server.log"
    with served("--set", f"log_file={json.dumps(str(log))}") as (process, url):
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "auto", **ASKED}, timeout=60
        )
        assert answer.json()["model"] == "banking"
        streamed = []
        asked = {"model": "auto", "stream": True, **ASKED}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as events:
            streamed = [line for line in events.iter_lines() if line]
        assert streamed[-1] == "data: [DONE]"
        assert main(["run", "--url", url, "--input", '{"prompt": "my card was stolen"}']) == 0
        said = capsys.readouterr().out.strip()
        assert said == answer.json()["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    trace = answer.headers["x-request-id"]
    assert main(["logs", str(log), "--trace", trace]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f"trace={trace}" in line
    assert "stolen" not in log.read_text()
    with served() as (process, url):
        process.send_signal(signal.SIGKILL)
        process.wait()
    with served() as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--host", "0.0.0.0"], "0.0.0.0 lets other machines in"),
        (["serve", "--host", "example.invalid"], "example.invalid lets other machines in"),
        (["serve", "--port", "99999"], "port: input should be less than"),
        (["up", "--set", "nonsense"], "cannot be read; expected a.b=value"),
        (["serve", "-f", "lost.yaml"], "lost.yaml does not exist"),
        (["serve", "--base", "./lost"], "./lost is no folder with a config.json"),
        (["validate", "--set", "router=none", "--set", "default_mix=auto"], "needs the router"),
        (["run", "--input", "{"], "--input is not JSON"),
        (["run", "--input", '{"prompt": "a", "stream": true}'], "leave it out"),
        (["run", "--input", "{}"], 'either "prompt" or "messages"'),
        (["run", "--input", '{"prompt": "a", "messages": []}'], 'either "prompt" or "messages"'),
        (["run", "--url", "http://127.0.0.1:1", "--input", '{"prompt": "a"}'], "does not answer"),
        (["run", "--url", "x", "--set", "port=1", "--input", '{"prompt": "a"}'], "leave -f out"),
        (["logs", "lost.log"], "No such file or directory: lost.log"),
    ],
)
def test_what_cannot_be_served_is_one_line(words, said, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_said_before_a_model_is_opened(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_run_in_process_answers_as_ask_does(capsys):
    body = json.dumps({"prompt": "my card was stolen", "mix": "banking", "temperature": 0})
    assert main(["run", "--input", body, "--json"]) == 0
    response = json.loads(capsys.readouterr().out)
    assert response["model"] == "banking"
    assert main(["ask", "my card was stolen", "-m", "banking", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == response["choices"][0]["message"]["content"]


def test_run_takes_any_way_to_name_a_mix(front, capsys):
    for more in ({"lora": [{"name": "sql"}]}, {"adapter_id": "sql"}, {"model": "sql"}):
        body = {"prompt": "how many singers?", "temperature": 0, "max_tokens": 4, **more}
        words = ["run", "--url", front.url, "--json", "--input", json.dumps(body)]
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "sql"


def test_a_refused_request_fails_the_command(capsys):
    assert main(["run", "--input", '{"prompt": "a", "model": "lost"}']) == 1
    assert "lost" in capsys.readouterr().err


def test_logs_go_on_as_lines_come(tmp_path):
    line = '{"time": "now", "level": "info", "message": "request", "trace": "%s"}\n'
    log = tmp_path / "server.log"
    log.write_text(line % "a" + line % "b")
    words = ["logs", str(log), "--follow", "--lines", "1"]
    command = [sys.executable, "-m", "loramix", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now info request trace=b\n"
        with log.open("a") as more:
            more.write(line % "c")
        assert process.stdout.readline() == "now info request trace=c\n"
        process.kill()


def test_validate_says_what_it_found(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loramix.yaml").write_text("default_mix: sql:0.5\n")
    assert main(["validate"]) == 0
    assert "Good: base pocket" in capsys.readouterr().out

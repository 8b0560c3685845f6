"""`loramix demo` on a terminal: the answers, then a page to chat on until Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import httpx


def test_it_stays_up_with_the_page_and_ends_on_ctrl_c():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "loramix", "demo"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        said = read_until(ours, b"Ctrl-C")
        assert re.search(r"\d+ of 11 answers equal their reference", said)
        url = re.search(r"Chat at (http://127\.0\.0\.1:\d+)", said)[1]
        assert "What would you like to ask?" in httpx.get(url).text
        process.send_signal(2)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal, mark):
    said = b""
    while mark not in said:
        said += os.read(terminal, 4096)
    return said.decode()

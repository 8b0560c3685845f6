"""What a run says while it goes on."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

from loramix.train.log import TrainerLog, entries, loss_plot
from loramix.train.loop import Progress

AT = Progress("a<b", 1, 4, loss=2.0, rate=1e-3, norm=0.5, epoch=0.25, tokens_per_s=10.0)


def written(file, *steps):
    log = TrainerLog(file, every=2)
    for step in steps:
        log(dataclasses.replace(AT, step=step, validation=1.5 if step == 4 else None))
    return entries(file)


def test_a_log_has_llama_factorys_fields(tmp_path):
    found = written(tmp_path / "run" / "log.jsonl", 1, 2, 3, 4)
    assert [entry["current_steps"] for entry in found] == [2, 4, 4]
    assert found[0]["loss"] == 2.0
    assert found[0]["lr"] == 1e-3
    assert found[0]["percentage"] == 50.0
    assert found[0]["elapsed_time"] == "0:00:00"
    assert found[1]["eval_loss"] == 1.5


def test_a_run_that_is_taken_up_forgets_what_it_said_beyond_its_checkpoint(tmp_path):
    file = tmp_path / "log.jsonl"
    written(file, 1, 2, 3)
    with file.open("a") as torn:
        torn.write('{"expert": "a<b", "current_st')
    assert [entry["current_steps"] for entry in written(file, 2, 3, 4)] == [2, 4, 4]


def test_a_plot_is_an_svg_with_a_line_and_dots(tmp_path):
    found = loss_plot(written(tmp_path / "log.jsonl", 1, 2, 3, 4))
    root = ET.fromstring(found)
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags.count("polyline") == 1
    assert tags.count("circle") == 1
    assert "a<b" in [element.text for element in root.iter()]
    assert loss_plot([]) == ""

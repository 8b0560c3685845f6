"""What a run says while it goes on."""

from __future__ import annotations

import dataclasses
import sys
import xml.etree.ElementTree as ET

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loramix.errors import TrainError
from loramix.train.board import Board
from loramix.train.log import TrainerLog, entries
from loramix.train.loop import Progress
from loramix.train.plot import check_plots, loss_plot

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


def test_a_plot_has_the_losses_of_each_expert(tmp_path):
    log = written(tmp_path / "log.jsonl", 1, 2, 3, 4)
    own = texts(loss_plot(log))
    assert {"training", "validation", "step", "loss, nats per learned token"} <= own
    both = texts(loss_plot([*log, *({**entry, "expert": "other"} for entry in log)]))
    assert {"a<b", "a<b validation", "other", "other validation"} <= both
    assert loss_plot(log) == loss_plot(log)
    assert loss_plot([]) == ""


def texts(drawn):
    return {element.text for element in ET.fromstring(drawn).iter()}


def on_board(folder):
    """(step, value) of each tag, as TensorBoard shows them."""
    found = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, round(event.value, 6)) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_sees_each_step_once_however_often_a_run_is_taken_up(tmp_path):
    for steps in ((1, 2, 3), (2, 3, 4)):  # killed behind the checkpoint of step 1
        board = Board(tmp_path, every=1)
        for step in steps:
            measured = 1.5 if step % 2 == 0 else None
            loss = 10 * len(steps) + step + (0.5 if steps[0] == 2 else 0)
            board(dataclasses.replace(AT, name="sql", step=step, loss=loss, validation=measured))
        board.close()
    found = on_board(tmp_path / "sql")
    assert found["train/loss"] == [(1, 31.0), (2, 32.5), (3, 33.5), (4, 34.5)]
    assert found["eval/loss"] == [(2, 1.5), (4, 1.5)]
    assert {"train/learning_rate", "train/grad_norm", "train/epoch"} <= found.keys()


def test_tensorboard_that_is_missing_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainError, match=r"pip install 'loramix\[tensorboard\]'"):
        Board(tmp_path)


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_learned(monkeypatch):
    monkeypatch.setattr("loramix.train.plot.CAN_PLOT", False)
    with pytest.raises(TrainError, match=r"pip install 'loramix\[eval\]'"):
        check_plots()

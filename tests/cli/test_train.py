"""What `loramix train` refuses before it opens anything."""

from __future__ import annotations

import pytest

from loramix.cli.train import train
from loramix.errors import TrainError
from recipes.pocket.experts import PLAN


def test_one_of_several_processes_is_refused_as_each_would_train_everything(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match=r"one of 2 processes .* without torchrun"):
        train([str(PLAN)])

"""Noise in embeddings (NEFTune): as large as the paper says, each row's own, and while learning."""

import dataclasses
import math

import pytest
import torch

from loramix.mixed import MixedModel
from loramix.train.batches import collate, micro_batches
from loramix.train.config import Run
from loramix.train.forward import gates, losses
from loramix.train.learner import Learner
from loramix.train.loop import Stopped, gradients, train
from loramix.train.noise import disturbed, drawn
from tests.tiny import tiny_base
from tests.train.small import SETTINGS, SOUNDS, course, rows_of

NOISY = dataclasses.replace(SETTINGS, noise=5.0)


def embeddings(model, learners, batch):
    """What the first layer is given, without and with noise."""
    layer, seen = model.get_input_embeddings(), []
    with disturbed(model, learners, batch):
        hook = layer.register_forward_hook(lambda _, given, out: seen.append(out))
        layer(batch.ids)
        hook.remove()
    return layer(batch.ids), seen[0]


@pytest.fixture
def learner():
    base = tiny_base()
    made = Learner(course(base, "noisy", settings=NOISY), MixedModel(base.model))
    yield made
    made.mixed.release()


def test_it_is_uniform_and_as_large_as_the_paper_says(learner):
    ids = torch.arange(200)
    noise = drawn(learner, ids, 512)
    most = 5.0 / math.sqrt(200 * 512)
    assert 0.999 * most < noise.abs().max() <= most
    assert abs(noise.mean()) < most / 50
    assert noise.std() == pytest.approx(most / math.sqrt(3), rel=0.01)


def test_a_row_has_its_own_whatever_is_beside_it_and_padding_has_none(learner):
    rows = rows_of(tiny_base())
    found = []
    for batch in (collate(rows), *map(collate, ([row] for row in rows))):
        plain, noisy = embeddings(learner.mixed.model, [learner], batch)
        added = noisy - plain
        for line, start, stop in batch.rows:
            ids = tuple(batch.ids[line, start:stop].tolist())
            found.append((ids, added[line, start:stop].clone()))
            added[line, start:stop] = 0
        assert not added.any()
    together, alone = found[: len(rows)], found[len(rows) :]
    for (ids, first), (same, second) in zip(together, alone, strict=True):
        assert ids == same
        assert first.abs().sum() > 0
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_rows_behind_each_other_in_a_line_have_each_their_own(learner):
    rows = rows_of(tiny_base(), SOUNDS)
    (packed,) = micro_batches([rows], tokens=4096, packing=True)
    assert len(packed.ids) < len(packed.rows) == len(rows)
    plain, noisy = embeddings(learner.mixed.model, [learner], packed)
    for line, start, stop in packed.rows:
        wanted = drawn(learner, packed.ids[line, start:stop], plain.shape[-1])
        torch.testing.assert_close((noisy - plain)[line, start:stop], wanted, rtol=0, atol=1e-6)


def test_every_step_draws_anew(learner):
    ids = torch.arange(5)
    first = drawn(learner, ids, 8)
    assert torch.equal(first, drawn(learner, ids, 8))
    learner.step += 1
    assert not torch.equal(first, drawn(learner, ids, 8))


@pytest.mark.parametrize("run", [Run(), Run(checkpointing=True), Run(micro_rows=1)])
def test_gradients_see_it_and_losses_that_are_only_measured_do_not(run):
    def of(settings):
        base = tiny_base()
        mixed = MixedModel(base.model)
        learner = Learner(course(base, "one", settings=settings), mixed)
        rows = learner.rows()
        (loss,) = gradients(mixed, [learner], [rows], run)
        batch = collate(rows)
        with torch.no_grad(), mixed.active.using(*gates([learner], batch.counts, learning=False)):
            measured = losses(mixed, batch)[0]
        mixed.release()
        return loss, measured.item()

    (plain, measured), (noisy, still) = of(SETTINGS), of(NOISY)
    assert abs(noisy - plain) > 1e-4
    assert measured == still


def test_an_expert_without_noise_learns_as_alone_beside_one_with():
    def weights(*courses):
        base = tiny_base()
        made = train(base, [course(base, name, settings=settings) for name, settings in courses])
        return made[0].pairs

    for settings in (SETTINGS, NOISY):
        other = NOISY if settings is SETTINGS else SETTINGS
        alone, beside = weights(("one", settings)), weights(("one", settings), ("other", other))
        for name, pair in alone.items():
            torch.testing.assert_close(pair.delta(), beside[name].delta(), rtol=1e-3, atol=1e-5)


def test_a_run_that_is_taken_up_again_draws_the_same(tmp_path):
    (whole,) = train(tiny_base(), [course(tiny_base(), "x", settings=NOISY)])
    rounds = iter(range(1, 99))
    run = Run(folder=tmp_path, stopped=lambda: next(rounds) == 3)
    with pytest.raises(Stopped):
        train(tiny_base(), [course(tiny_base(), "x", settings=NOISY)], run)
    (again,) = train(tiny_base(), [course(tiny_base(), "x", settings=NOISY)], Run(folder=tmp_path))
    assert whole.digest == again.digest
    (plain,) = train(tiny_base(), [course(tiny_base(), "x")])
    assert plain.digest != whole.digest

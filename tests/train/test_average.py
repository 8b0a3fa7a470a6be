"""The average of the weights: its formula, that scoring borrows it, and that a fit keeps it."""

from pathlib import Path

import torch
from small_corpus import make_recipe
from torch import nn

from deepmsi.models.deepmsi import DeepMSI
from deepmsi.train.average import WeightAverage
from deepmsi.train.run import train


def test_formula_and_borrowing(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.5)
    expected = 1.0
    for step, weight in enumerate([2.0, -3.0, 5.0, 7.0, 1.0, 0.0, 4.0, 2.0, 9.0, 3.0], start=1):
        model.weight.data.fill_(weight)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    with average.applied():
        torch.testing.assert_close(model.weight.item(), expected, rtol=1e-6, atol=0)
    assert model.weight.item() == 3.0
    average.save(tmp_path)
    other = WeightAverage(model, 0.5)
    other.load(tmp_path)
    other.apply()
    torch.testing.assert_close(model.weight.item(), expected, rtol=1e-6, atol=0)


def test_a_fit_keeps_the_average(split_corpus: Path, tmp_path: Path) -> None:
    kept = {}
    for name, average in (("last", None), ("almost-last", 0.0), ("average", 0.9)):
        recipe = make_recipe(train={"epochs": 1, "average": average, "selection": "last"})
        train(recipe, split_corpus, tmp_path / name)
        kept[name] = DeepMSI.from_pretrained(tmp_path / name / "model").classifier.output.weight
    # With a decay of 0 the average is the weights of the last step.
    torch.testing.assert_close(kept["almost-last"], kept["last"], rtol=0, atol=0)
    assert not torch.equal(kept["average"], kept["last"])

"""Containment in training: what atoms reach on unrelated pictures, and steps in which they fire above it only."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tiny_runs import OPTIONS

from atomtune.backbones import backbone_of
from atomtune.training.batch import lots_of
from atomtune.training.ends import NAME, attach_atoms, training_mode
from atomtune.training.prepare import prepare
from atomtune.training.run import CONTAIN_FROM, Run
from atomtune.tuner import atom_layers, remove_adapter

ONE = dataclasses.replace(OPTIONS, unrelated_pictures=4)


@pytest.fixture
def run(shared: Any, kites: Path, runs: Path) -> Iterator[Run]:
    material = prepare(shared, backbone_of(shared), kites, ONE, runs / "contain")
    assert material.of_class.tolist() == [True, False, False, False]
    attach_atoms(shared, backbone_of(shared), ONE)
    with training_mode(shared.transformer, ONE):
        yield Run(shared, backbone_of(shared), material, ONE, Path("unused"), PartialState(cpu=True))
    remove_adapter(shared.transformer)


def test_reach_is_of_unrelated_pictures_and_not_of_the_class(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.material.far.tolist() == [1, 2, 3]
    run.step(0)
    assert run.reach.keys() == atom_layers(run.base).keys()
    assert any(reach.any() for reach in run.reach.values())
    own = dataclasses.replace(run.material, of_class=torch.ones(4, dtype=torch.bool))
    assert own.far.tolist() == [0, 1, 2, 3], "where all show the class, they are all there is"
    monkeypatch.setattr(type(own), "far", torch.empty(0, dtype=torch.long))
    before = {site: reach.clone() for site, reach in run.reach.items()}
    run.step(1)
    assert all((run.reach[site] <= before[site]).all() for site in before), "it fades, and nothing comes to it"
    assert any((run.reach[site] < before[site]).any() for site in before)


def test_later_steps_draw_how_contained_they_are(run: Run) -> None:
    run.step(0)
    shares = []
    for step in range(40):
        generator = lots_of(run.options, step)
        lot = torch.rand(2, generator=generator)[1].item()
        with run._taking_part(step):
            floors = {site: layer.floors.get(NAME) for site, layer in atom_layers(run.base).items()}
        if step <= CONTAIN_FROM * run.options.steps or lot <= 0.5:
            assert set(floors.values()) == {None}
        else:
            assert all(torch.equal(floor, (2 * lot - 1) * run.reach[site]) for site, floor in floors.items())
            shares.append(2 * lot - 1)
    assert len(shares) > 10
    assert min(shares) < 0.2
    assert max(shares) > 0.8
    assert all(NAME not in layer.floors for layer in atom_layers(run.base).values())


def test_it_can_be_left_off(run: Run) -> None:
    run.options = dataclasses.replace(run.options, contain=False)
    run.step(5)
    assert run.reach == {}

"""A report of a run of somebody's own network: by its factory's name, or once such a name is noted."""

import json
from dataclasses import replace

import pytest
from zoo.mine import stripes

from lhc_bench.reports.report import make_report
from lhc_triton.training import TrainConfig, read_config, train

CONFIG = TrainConfig(
    validation_images=20,
    train_images=100,
    density=0.3,
    in_block=8,
    out_block=8,
    coarse_epochs=2,
    fine_epochs=1,
    batch_size=50,
    precision="fp32",
)


def test_a_run_of_an_own_network_is_reported(tmp_path):
    train(replace(CONFIG, factory="zoo.mine:stripes"), tmp_path / "run", progress=False)
    make_report([tmp_path / "run"], tmp_path / "report")
    assert "zoo.mine:stripes on fashion-mnist" in (tmp_path / "report" / "report.html").read_text()


def test_a_run_of_a_given_model_is_reported_once_its_factory_is_named(tmp_path):
    train(CONFIG, tmp_path / "run", progress=False, model=stripes())
    with pytest.raises(ValueError, match=r"Sequential, given to train\(\): .*set factory to a") as caught:
        make_report([tmp_path / "run"], tmp_path / "report")
    assert "\n" not in str(caught.value)
    named = replace(read_config(tmp_path / "run" / "config.toml"), factory="zoo.mine:stripes")
    (tmp_path / "run" / "config.toml").write_text(named.to_toml())
    make_report([tmp_path / "run"], tmp_path / "report")
    rows = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "zoo.mine:stripes" in json.dumps(rows)

"""A runner reads what is finished, and further seeds run the best of each family."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arms import SMALL as BASE
from arms import Arm, Base, Experiment, Question, stage
from experiments import EXPERIMENTS
from report import BEGIN, END, collect, with_tables
from run import ARM, FOUND, RANKS, _curves, _shares_of_cores, run_experiment

from puma_jax import Embedder
from puma_jax.artifacts import write_json
from puma_jax.errors import ArtifactError, ConfigError
from puma_jax.files import read_json
from puma_jax.training.workdir import as_json

SMALL = Experiment(
    title="Three arms",
    base=BASE,
    start={"cut": stage(2, "2")},
    arms=(
        Arm("one", "one", stage(2, rate=0.1)),
        Arm("low", "two, low", stage(2, rate=0.2), family="two"),
        Arm("high", "two, high", stage(2, rate=0.3), family="two"),
        Arm("lost", "lost", stage(2, rate=0.4), every_seed=False, forgets="layers"),
        Arm("new", "from scratch", stage(2, rate=0.4), every_seed=False, forgets="all"),
        Arm("one-noise", "one, rounded", stage(2, rate=0.1, chunks=2), every_seed=False),
    ),
    questions=(
        Question("two", "one", "Two, or one?"),
        Question("one-noise", "one", "Rounding?"),
        Question("later", "one", "Not finished?"),
    ),
)


class Trainer:
    """Stands in for training: notes the runs, and writes files as `run.measure` does."""

    def __init__(self, model: Path):
        self.model = model
        self.configs: dict = {}

    def __call__(self, config, workdir, reuse):
        self.configs[workdir.name] = config
        *_, stage = config.stages.values()
        rate = stage.optimizer.learning_rate
        queries = np.arange(40)
        # The higher the rate of learning, the more queries are answered.
        hit = queries + 0.5 < 40 * (rate + 0.05 * config.seed)
        if stage.grad_cache_chunks > 1:
            hit[0] = False
        workdir.mkdir(parents=True)
        write_json(workdir / "config.json", as_json(config))
        (workdir / "data/built").mkdir(parents=True)
        (workdir / "stages").mkdir()
        np.savez(
            workdir / RANKS, **{f"set/{pool}": np.where(hit, 0, 9) for pool in ("local", "global")}
        )
        for name in config.stages:
            if name != ARM:
                shutil.copytree(self.model, workdir / name)
        mean = {"local": float(hit.mean()), "global": float(hit.mean())}
        costs = {
            "layers": 2, "steps": 2, "training_flops": 1e12, "embedding_flops": 1e6,
            "seconds_per_step": 1.0, "peak_memory": 2**30, "tokens_per_item": 9.0,
        }  # fmt: skip
        write_json(
            workdir / FOUND,
            {
                "mean": mean, "wrong_modality": 0.0, "curve": [[1, 0, 0], [2, *mean.values()]],
                "versions": {"jax": "1"}, "device": "1 × cpu", **costs,
            },
        )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("experiments")
    trainer = Trainer(tiny.folder)
    results = run_experiment("small", out / "data", out, [3, 4], trainer, {"small": SMALL})
    return out, trainer, results


def test_further_seeds_run_what_is_marked_and_the_best_of_each_family(finished):
    _, _, results = finished
    ran = {name: list(by_seed) for name, by_seed in results["arms"].items()}
    assert ran == {
        "one": ["3", "4"], "low": ["3"], "high": ["3", "4"],
        "lost": ["3"], "new": ["3"], "one-noise": ["3"],
    }  # fmt: skip


def test_all_arms_continue_from_the_model_of_the_start(finished):
    out, trainer, _ = finished
    assert trainer.configs["base"].scratch is not None
    assert trainer.configs["start"].stages == {**BASE.stages, **SMALL.start}
    for name in ("one", "low", "high"):
        config = trainer.configs[name]
        assert config.stages[ARM].model == str(out / "small/start/cut")
        assert config.data.built == out / "base/data/built"
        assert config.scratch is None
    assert trainer.configs["new"].stages[ARM].model == str(out / "base/base")


def test_random_layers_replace_the_decoders_layers_and_nothing_else(finished, tiny):
    _, trainer, _ = finished
    drawn = Embedder.load(trainer.configs["lost"].stages[ARM].model)
    before = Embedder.load(tiny.folder)
    for name, leaf in dataclasses.asdict(before.config.decoder).items():
        assert getattr(drawn.config.decoder, name) == leaf
    layers = drawn.params.decoder.layers.attention.query.kernel
    assert not np.allclose(layers, before.params.decoder.layers.attention.query.kernel)
    np.testing.assert_array_equal(
        drawn.params.decoder.embedding.table, before.params.decoder.embedding.table
    )


def test_what_is_finished_is_read_and_not_run_again(finished, tiny):
    out, _, results = finished
    again = Trainer(tiny.folder)
    found = run_experiment("small", out / "data", out, [3, 4], again, {"small": SMALL})
    assert not again.configs
    assert found == results == read_json(out / "small/results.json")


def test_an_arm_whose_settings_changed_is_refused(finished):
    out, trainer, _ = finished
    other = dataclasses.replace(SMALL, arms=(Arm("one", "one", stage(2, rate=0.5)),))
    with pytest.raises(ArtifactError, match="learning_rate"):
        run_experiment("small", out / "data", out, [3], trainer, {"small": other})


def test_tables_say_which_differences_are_more_than_chance_and_rounding(finished):
    out, _, _ = finished
    content = collect(out / "small", SMALL)
    two, rounding = content["answers"]  # what is not finished is left out
    assert (two["arm"], two["other"]) == ("high", "one")
    assert two["local"]["mean"] == pytest.approx(0.2)
    assert rounding["local"]["mean"] == pytest.approx(-1 / 40)
    page = with_tables(f"# Title\n\nBefore.\n{BEGIN}\nearlier\n{END}\nAfter.\n", content)
    assert page.startswith("# Title\n\nBefore.\n")
    assert page.endswith(f"{END}\nAfter.\n")
    assert "earlier" not in page
    assert "**+20.0** (" in page
    assert "moves the mean by 2.5 points in local pools, 2.5 points in global pools" in page


def test_an_error_of_an_arm_is_said_once(tmp_path):
    """It is printed where the arm runs; running again would not mend it."""
    missing = tmp_path / "missing"
    command = [sys.executable, "benchmarks/experiments/run.py", "pruning"]
    command += ["--data.root", str(missing), "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} is not a folder\n"


def test_curves_take_the_later_line_of_a_step_and_leave_other_stages_out(tmp_path):
    lines = [
        {"stage": stage, "step": step, "loss": loss, "contrastive": loss, "seconds": seconds}
        | {"peak_memory": 10 - seconds}
        for stage, step, loss, seconds in (
            ("arm", 10, 2.0, 9), ("other", 10, 7.0, 0), ("arm", 10, 1.0, 4), ("arm", 20, 0.5, 6)
        )
    ]  # fmt: skip
    lines.append({"stage": "arm", "step": 10, "hit@k local": 0.5, "hit@k global": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _curves(tmp_path / "metrics.jsonl", "arm") == {
        "curve": [[10, 0.5, 0.25]],
        "loss": [[10, 1.0], [20, 0.5]],
        "seconds_per_step": 5,
        "peak_memory": 6,
    }
    assert not _curves(tmp_path / "none.jsonl", "arm")["curve"]


def test_every_question_is_about_arms_of_its_experiment():
    for experiment in EXPERIMENTS.values():
        names = [arm.name for arm in experiment.arms]
        assert len(set(names)) == len(names)
        known = {*names, *(arm.family for arm in experiment.arms)}
        for question in experiment.questions:
            assert {question.arm, question.other} <= known


def test_a_base_with_a_model_of_its_own_starts_from_it_and_asks_for_it(tiny, tmp_path):
    base = Base("other-base", {"whole": stage(2)}, model="other")
    other = dataclasses.replace(SMALL, base=base, start={}, arms=SMALL.arms[:1])
    trainer = Trainer(tiny.folder)
    message = r"other is missing, .*: run python benchmarks/experiments/other.py --out .*/other$"
    with pytest.raises(ConfigError, match=message):
        run_experiment("few", tmp_path / "data", tmp_path, [0], trainer, {"few": other})
    (tmp_path / "other").mkdir()
    run_experiment("few", tmp_path / "data", tmp_path, [0], trainer, {"few": other})
    config = trainer.configs["other-base"]
    assert config.stages["whole"].model == str(tmp_path / "other")
    assert config.scratch is None
    assert trainer.configs["one"].stages[ARM].model == str(tmp_path / "other-base/whole")


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_arms_at_the_same_time_share_the_cores(monkeypatch, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 7}, raising=False)
    shares = _shares_of_cores(count)
    sets = [shares.get() for _ in range(count)]
    assert set().union(*sets) == {0, 1, 4, 5, 7}
    sizes = {len(one) for one in sets}
    assert max(sizes) - min(sizes) <= 1
    assert sum(map(len, sets)) == max(5, count)

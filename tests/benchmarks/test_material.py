"""An arm starts from the model and the data that it names, which are made once."""

import material
from arms import Arm, stage
from experiments import EXPERIMENTS
from material import ARM, Data, data_of, model_of
from recipe import RECIPE


def test_arms_continue_only_arms_before_them():
    for experiment in EXPERIMENTS.values():
        names = [arm.name for arm in experiment.arms]
        assert len({*names}) == len(names)
        for place, arm in enumerate(experiment.arms):
            assert not arm.continues or arm.continues in names[:place]
            if arm.averages:
                kept = next(one for one in experiment.arms if one.name == arm.continues)
                assert kept.settings["checkpoint"].max_to_keep >= arm.averages


def test_an_arm_starts_from_the_model_that_it_names(tmp_path):
    start, scratch, of_seed = (tmp_path / name for name in ("start", "scratch", "seed-0"))
    folders = {
        name: model_of(Arm(name, name, stage(1), **given), start, scratch, of_seed)
        for name, given in {
            "plain": {},
            "new": {"forgets": "all"},
            "further": {"continues": "plain"},
        }.items()
    }
    assert folders == {"plain": start, "new": scratch, "further": of_seed / "plain" / ARM}


def test_negatives_are_mined_and_scored_once_by_the_start(tiny, tmp_path, monkeypatch):
    made = []

    def writes(name, out_at):
        def write(*given):
            made.append((name, *given[:2]))
            given[out_at].mkdir()

        return write

    monkeypatch.setattr(material.mine, "main", writes("mine", 2))
    monkeypatch.setattr(material.score, "main", writes("score", 1))
    monkeypatch.setattr(
        material, "build", lambda settings, _: writes("build", 1)(settings.root, settings.out)
    )
    plain = Data(tmp_path / "mbeir", tmp_path / "built")
    mined = Data(tmp_path / "mined", tmp_path / "built-mined")
    scored = Data(tmp_path / "scored", tmp_path / "built-scored")
    arms = {arm.negatives: arm for arm in RECIPE.arms}
    for _ in range(2):
        found = [
            data_of(arms[kind], tiny.folder, plain, tmp_path)
            for kind in ("none", "mined", "scored")
        ]
        assert found == [plain, mined, scored]
    assert made == [
        ("mine", str(tiny.folder), plain.root),
        ("build", mined.root, mined.built),
        ("score", mined.root, scored.root),
        ("build", scored.root, scored.built),
    ]

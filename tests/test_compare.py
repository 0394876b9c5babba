"""Whether a run is on track: the reference, the band, the likely causes."""

import json
from copy import deepcopy
from dataclasses import asdict

import pytest

from minigen.__main__ import main
from minigen.compare import CURVES, Curve, causes, compare, points, reference
from minigen.methods import METHODS

INFO = {
    "method": "ddpm",
    "method_fields": {"T": 1000},
    "net": {"shape": [3, 32, 32], "width": 32, "blocks": 2, "dropout": 0.1},
    "train": {"batch": 32, "lr": 1e-3, "grad_clip": 1.0, "precision": "fp32", "minutes": None},
    "data": {"n": 50_000},
}


def curve(scale=1.0, wiggle=0.0, n=100, **train):
    info = deepcopy(INFO)
    info["train"] |= train
    images = [320.0 * (i + 1) for i in range(n)]
    return Curve(info, images, [scale * (0.1 + 40 / x) * (1 + wiggle * (-1) ** i) for i, x in enumerate(images)])


def test_a_run_like_the_reference_is_on_track():
    rows = compare(curve(1.03), curve())
    assert [r.images for r in rows] == [4000, 8000, 16000, 32000]  # before, there are too few records to judge
    assert all(r.ok and r.ratio == pytest.approx(0.03) for r in rows) and not causes(curve(1.03), curve(), rows)


def test_the_band_grows_with_the_noise():
    quiet, noisy = compare(curve(1.2), curve())[-1], compare(curve(1.2, wiggle=0.9), curve())[-1]
    assert quiet.band == pytest.approx(0.05, abs=0.01) and not quiet.ok
    assert noisy.band > 0.3 and noisy.ok


def test_likely_causes():
    slow = curve(1.5, lr=1e-5)
    assert causes(slow, curve(), compare(slow, curve()))[0] == "lr is 1e-05, there it is 0.001"
    risen = Curve(INFO, curve().images, [y if i < 70 else 9.0 for i, y in enumerate(curve().loss)])
    assert causes(risen, curve(), compare(risen, curve()))[0].startswith("the loss rises again: a smaller --lr")
    few = curve(0.5)
    few.info["data"]["n"] = 100
    assert "100 images are few" in causes(few, curve(), compare(few, curve()))[0]
    small = curve(0.8, batch=16)
    assert causes(small, curve(), compare(small, curve()))[0] == "the batch is 16, there it is 32"
    strange = curve(1.5)
    assert "look at the data" in causes(strange, curve(), compare(strange, curve()))[0]


def test_points_of_poisson_flow_are_not_its_charges():
    assert points({**INFO, "method_fields": {"small_batch": 16}, "train": {"batch": 4096}}) == 16
    assert points(INFO) == 32


def test_the_reference_has_the_same_method_and_data_the_nearest_width_and_batch(tmp_path):
    known = {}
    for width in (16, 64, 128):
        info = deepcopy(INFO)
        info["net"]["width"] = width
        known[f"ddpm_{width}"] = {"info": info, "images": [1.0], "loss": [1.0]}
    file = tmp_path / "curves.json"
    file.write_text(json.dumps(known))
    assert reference(INFO, file)[0] == "ddpm_16"  # 32 is nearer to 16 than to 64
    again = deepcopy(known["ddpm_16"])
    again["info"]["train"]["batch"] = 128
    file.write_text(json.dumps({"a": again} | known))
    assert reference(INFO, file)[0] == "ddpm_16" and reference(again["info"], file)[0] == "a"
    with pytest.raises(ValueError, match="another loss than that of the references: theirs have T 1000 or T 1000"):
        reference({**INFO, "method_fields": {"T": 50}}, file)
    with pytest.raises(ValueError, match="no reference for ncsn on data of shape 3x32x32"):
        reference({**INFO, "method": "ncsn"}, file)


def test_short_logs_are_refused():
    with pytest.raises(ValueError, match="no stretch in common"):
        compare(Curve(INFO, [1e9], [1.0]), curve())
    with pytest.raises(ValueError, match="too few records"):
        curve().around(700)


def test_every_shipped_reference_is_on_track_with_itself():
    known = json.loads(CURVES.read_text())
    assert {c["info"]["method"] for c in known.values()} == {"dpm", "ncsn", "ddpm", "pfgm", "pfgmpp"}
    for name, c in known.items():
        one = Curve(**c)
        assert not causes(one, one, compare(one, one)), name
        assert reference(one.info)[1].info["data"] == one.info["data"]
    for method in METHODS:  # what the commands of the README train has a reference
        cls = METHODS[method]
        fields = asdict(cls.for_data((1, 8, 8)) if hasattr(cls, "for_data") else cls())
        info = {"method": method, "method_fields": fields, "net": {"shape": [1, 8, 8], "width": 32}}
        assert reference(info | {"train": {"batch": 128}})


def test_the_command_tells_a_wrong_learning_rate(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", "ddpm", "--data", "digits", "--width", "8", "--batch", "256", "--log-every", "1"]
    assert main([*words, "--steps", "50", "--lr", "1e-7", "--device", "cpu", "--out", str(run)]) == 0
    assert main(["compare", str(run)]) == 0
    said = capsys.readouterr().out
    assert "off track; likely: lr is 1e-07, there it is" in said and "reference: ddpm_digits" in said
    (run / "log.csv").unlink()
    assert main(["compare", str(run)]) == 2
    assert "nothing to compare" in capsys.readouterr().err

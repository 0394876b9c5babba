"""What is measured with features: against closed forms, scipy, and cases where the answer can be counted."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from minigen import checkpoint, data, evaluate, features, measure, options
from minigen.__main__ import main

SMALL = ["--width", "8", "--batch", "16", "--warmup", "2", "--device", "cpu", "--T", "20"]
FAST = ["--n", "60", "--steps", "3", "--bits", "0", "--device", "cpu"]


def ok(*words):
    assert main([str(w) for w in words]) == 0


def result(run):
    return json.loads((run / "evaluate.json").read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "digits"
    ok("train", "ddpm", "--data", "digits", "--steps", 4, "--out", run, *SMALL)
    return run


def exact(n, mean, std):
    """Samples whose mean and covariance are exactly these, the latter diag(std**2)."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


DISTANCES = pytest.mark.parametrize("frechet", [evaluate.frechet_distance, features.frechet])


@DISTANCES
def test_frechet_distance_of_gaussians(frechet):
    a, b = exact(400, [0.0, 0, 0], [1.0, 2, 3]), exact(300, [1.0, 0, 2], [2.0, 2, 1])
    # |mean|**2 = 5, and for commuting covariances the rest is the sum of (std_a - std_b)**2
    assert frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a + 1e6, b + 1e6) == pytest.approx(10, rel=1e-3)  # far from 0, in float64


@DISTANCES
def test_frechet_distance_agrees_with_the_square_root_of_the_product(frechet):
    a, b = torch.randn(500, 6) @ torch.randn(6, 6), torch.randn(400, 6) @ torch.randn(6, 6) + 1
    ca, cb = a.double().T.cov(), b.double().T.cov()
    root = scipy.linalg.sqrtm((ca @ cb).numpy()).real.trace()
    expected = (a.double().mean(0) - b.double().mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_few_samples():
    few = torch.randn(5, 20)  # fewer samples than features: singular covariances
    assert evaluate.frechet_distance(few, few + 1) == pytest.approx(20, rel=1e-6)


def test_precision_and_recall_of_a_case_that_can_be_counted():
    # the data: two groups of 8 points on a line, 1 apart; a ball reaches 2 to 3 far with k = 3 neighbors
    line = torch.arange(8.0)[:, None]
    true = torch.cat([line, line + 1000])
    samples = torch.cat([line + 0.5, line + 500])  # one group found, one invented
    assert features.precision_recall(samples, true) == (0.5, 0.5)
    assert features.precision_recall(true, true) == (1.0, 1.0)
    assert features.precision_recall(true + 1e5, true) == (0.0, 0.0)
    narrow = 3.5 + torch.arange(8.0)[:, None] / 100  # all in one place: each is good, the data are not covered
    precision, recall = features.precision_recall(narrow, true)
    assert precision == 1 and recall < 0.2
    assert features.precision_recall(true, narrow) == (recall, precision)  # one is the other, seen from there


def test_balls_reach_to_the_kth_neighbor(monkeypatch):
    x = torch.tensor([0.0, 1.0, 3.0, 7.0, 15.0])[:, None]
    sets = x, torch.tensor([3.9, 4.1, -2.9, -3.1])[:, None]
    # with k = 2 the ball of 0 reaches 3, of 1: 2, of 3: 3 (to 0), of 7: 6, of 15: 12
    assert features._radii(x.double(), 2).sqrt().tolist() == pytest.approx([3, 2, 3, 6, 12])
    inside = (sets[1] - x.T).abs() <= torch.tensor([3.0, 2, 3, 6, 12])
    for rows in (1000, 2):  # the same in parts
        monkeypatch.setattr(features, "ROWS", rows)
        assert features.precision_recall(sets[1], x, k=2)[0] == float(inside.any(1).float().mean())


def test_sets_that_cannot_be_compared_are_refused():
    for a, b in ((torch.zeros(3, 2), torch.zeros(3, 3)), (torch.zeros(1, 2), torch.zeros(3, 2))):
        for distance in (features.frechet, features.precision_recall):
            with pytest.raises(ValueError, match="samples of one shape"):
                distance(a, b)


def test_features_are_those_of_pictures_and_repeat():
    kind, x = features.find("auto", (1, 8, 8)), data.load("digits", "test").x
    assert kind.name == "digits" and "test accuracy 98" in kind.about
    f = kind(x, 17)
    assert f.shape == (300, 32) and torch.equal(f, kind(x, 17))
    with pytest.raises(ValueError, match="pictures in uint8"):
        kind(x.float(), 17)
    assert features.find("none", (1, 8, 8)) is None and features.find("auto", (3, 64, 64)) is None
    with pytest.raises(ValueError, match=r"cifar are of images \(3, 32, 32\)"):
        features.find("cifar", (1, 8, 8))


def test_cifar_features_ship():
    kind = features.find("auto", (3, 32, 32))
    assert kind.name == "cifar" and kind(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), 256).shape == (3, 128)


def test_inception_is_the_network_of_the_literature_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="is not in .*--inception-weights PATH"):
        features.find("inception", (3, 32, 32), offline=True)
    with pytest.raises(ValueError, match="is not in"):
        features.find("inception", (3, 32, 32), weights=tmp_path / "none.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match="cannot be downloaded .*: get https"):
        features.find("inception", (3, 32, 32))
    other = tmp_path / "other.pth"
    other.write_bytes(b"anything")
    with pytest.raises(ValueError, match="is not the Inception network of the literature"):
        features.find("inception", (3, 32, 32), weights=other)


def test_inception_sees_small_gray_digits(tmp_path, monkeypatch):
    class Stub(torch.nn.Module):  # the real one takes a download: this one checks what it is given
        def __init__(self, feature, feature_extractor_weights_path, antialias):
            super().__init__()
            assert feature == 2048 and not antialias
            self.inception = torch.nn.Flatten()

    import torchmetrics.image.fid

    file = tmp_path / "weights.pth"
    file.write_bytes(b"weights")
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", Stub)
    kind = features.find("inception", (1, 8, 8), weights=file)
    f = kind(torch.tensor([0, 16, 8], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(-1, 1, 8, 8), 17)
    assert kind.name == "inception" and f.shape == (3, 192) and f[:, 0].tolist() == [0, 255, 128]


# The command


def test_evaluate_measures_by_features_and_repeats(digits, capsys):
    results = []
    for _ in range(2):
        ok("evaluate", digits, *FAST)
        results.append({k: v for k, v in result(digits).items() if k != "seconds"})
    assert results[0] == results[1]  # bit for bit
    said, first = capsys.readouterr().out, results[0]
    assert first["features"] == "digits" and first["n"] == first["n_data"] == first["n_floor"] == 60
    assert first["frechet_digits"] > 2 * first["frechet_digits_floor"] > 0
    assert 0 <= first["precision_digits"] <= 1 and first["precision_digits_of_true"] > 0.8
    assert first["recall_digits"] < 0.5 < first["recall_digits_of_true"] <= 1
    assert "frechet" not in first and "precision" not in first  # no number without the name of its features
    assert "a classifier of digits, test accuracy 98.67%" in said
    assert "WARNING: n = 60 is below 10,000: the Frechet distance is biased upward" in said
    ok("evaluate", digits, *FAST, "--features", "none")
    assert "WARNING" not in capsys.readouterr().out and not [k for k in result(digits) if "frechet" in k]


def test_a_floor_curve_goes_as_far_as_the_data(digits, tmp_path):
    out = tmp_path / "new" / "floor.json"
    ok("evaluate", digits, *FAST, "--floor", "--split", "train", "--out", out)
    curve = json.loads(out.read_text())["frechet_digits_floor_curve"]
    assert [*curve] == ["250", "500"] and min(curve.values()) > 0  # two halves of the training data


def test_a_floor_falls_as_one_over_n():
    sets = [data.Dataset("noise", torch.randint(256, (1000, 1, 4, 4), dtype=torch.uint8), bins=256) for _ in "ab"]
    pixels = features.Features("pixels", "", lambda x, bins: x.flatten(1))
    curve = measure._floor_curve(pixels, *sets, options.Evaluate(Path()), torch.device("cpu"))
    assert curve["250"] / curve["500"] == pytest.approx(2, rel=0.3)
    assert curve["500"] / curve["1000"] == pytest.approx(2, rel=0.3)


def test_samples_drawn_before_are_measured_alike(digits, tmp_path, capsys):
    ok("evaluate", digits, *FAST)
    drawn = result(digits)
    file = tmp_path / "x.npy"
    ok("sample", digits, "--n", 60, "--steps", 3, "--out", file)
    ok("evaluate", digits, *FAST, "--samples", file)
    read = result(digits)
    same = {"frechet_digits", "precision_digits", "recall_digits", "sliced_wasserstein", "n", "n_data"}
    assert {k: read[k] for k in same} == {k: drawn[k] for k in same}
    assert read["sampler"] == "file x.npy" and read["network_calls"] is None
    np.save(tmp_path / "wrong.npy", np.zeros((5, 3, 8, 8)))
    (tmp_path / "text.npy").write_text("no samples")
    for name, message in (("wrong", "has the shape"), ("text", "holds no samples"), ("none", "No such file")):
        assert main(["evaluate", str(digits), "--samples", str(tmp_path / f"{name}.npy")]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_classifier_of_your_own_gives_features_with_its_name(digits, tmp_path, capsys):
    mine = tmp_path / "mine.safetensors"
    shutil.copy(features.SHIPPED["digits"], mine)
    ok("evaluate", digits, *FAST, "--features", mine)
    assert {"frechet_file_mine", "precision_file_mine"} <= result(digits).keys()
    bad = [("vgg", "unknown features 'vgg'"), ("cifar", "are of images"), ("no.safetensors", "there is no classifier")]
    for name, message in bad:
        assert main(["evaluate", str(digits), "--features", name]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_the_data_may_have_moved_but_not_changed(tmp_path, capsys):
    folder, run = tmp_path / "old", tmp_path / "run"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(folder / split / f"{i}.png")
    ok("train", "ddpm", "--data", f"folder:{folder}", "--steps", 2, "--out", run, *SMALL)
    folder.rename(tmp_path / "new")
    assert main(["evaluate", str(run)]) == 2
    assert re.search("there is no folder", capsys.readouterr().err)
    words = ["--n", 5, "--steps", 2, "--bits", 0]
    ok("evaluate", run, "--data", f"folder:{tmp_path / 'new'}", *words)
    assert result(run)["data"] == f"folder:{tmp_path / 'new'}" and "features" not in result(run)
    # more than half of the training images: the floor takes those of the test split
    ok("evaluate", run, "--data", f"folder:{tmp_path / 'new'}", *words, "--split", "train")
    assert result(run)["n_data"] == 5 and result(run)["n_floor"] == 5
    assert main(["evaluate", str(run), "--data", "digits"]) == 2
    assert re.search("digits has samples of shape", capsys.readouterr().err)
    assert checkpoint.NAME in {p.name for p in run.iterdir()}

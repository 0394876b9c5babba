"""The classifier: its training repeats, its file is data and not code, what ships is as good as it says."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from minigen import classifier, data, seeded
from minigen.__main__ import main

SHIPPED = {name: data.images.ASSETS / f"classifier_{name}.safetensors" for name in ("digits", "cifar10")}


def striped(n, seed=0):
    """Horizontal or vertical stripes with noise: two classes."""
    with seeded(seed):
        labels = torch.randint(2, (n,))
        stripes = (torch.arange(8) // 2 % 2 * 12).expand(n, 1, 8, 8)
        x = torch.where(labels[:, None, None, None] == 1, stripes, stripes.mT) + torch.randint(4, (n, 1, 8, 8))
    return data.Dataset("stripes", x.to(torch.uint8), bins=17, labels=labels)


def test_training_learns_and_repeats():
    train, test = striped(64), striped(40, seed=1)
    config, _ = classifier.preset(train)
    recipe = classifier.ClassifierRecipe(epochs=3, batch=16, lr=0.05, seed=2, shift=1)
    state = torch.get_rng_state()
    first, again = ([*classifier.fit(train, config, recipe)] for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    nets = [runs[-1][0].state_dict() for runs in (first, again)]
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])
    assert first[-1][1]["loss"] == again[-1][1]["loss"]
    assert config.classes == 2 and classifier.accuracy(first[-1][0], test) > 0.95


def test_a_file_holds_the_network_and_no_code(tmp_path):
    config, _ = classifier.preset(striped(8))
    net = classifier.Classifier(config).eval()
    file = tmp_path / "c.safetensors"
    classifier.save(net, file, {"data": "stripes", "accuracy": 0.5})
    back, info = classifier.load(file)
    assert info["data"] == "stripes" and info["accuracy"] == 0.5 and back.config == config
    x = torch.rand(5, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(back(x), net(x), atol=2e-3, rtol=2e-3)  # half precision
    assert back.features(x).shape == (5, 32) and not back.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no classifier"),
        (lambda p: p.write_bytes(b"\x80\x04not safe"), "damaged or not a classifier"),
        (lambda p: save_file({"a": torch.zeros(2)}, p), "holds no classifier"),
        (lambda p: save_file({}, p, metadata={"minigen": '{"kind": "classifier"}'}), "holds no classifier"),
        (
            lambda p: classifier.checkpoint.write(p, {}, {"kind": "classifier", "net": {"shape": [1, 8, 8]}}),
            "does not fit this version",
        ),
        (
            lambda p: classifier.checkpoint.write(
                p, {}, {"kind": "classifier", "net": {"shape": [1, 8, 8], "classes": 2}}
            ),
            "do not fit the network",
        ),
    ],
)
def test_a_bad_file_is_answered_in_one_line(tmp_path, make, message):
    file = tmp_path / "c.safetensors"
    make(file)
    with pytest.raises(ValueError, match=message) as e:
        classifier.load(file)
    assert "\n" not in str(e.value)


def test_images_move_and_turn_as_asked():
    x = torch.arange(2 * 36.0).reshape(1, 2, 6, 6).expand(200, -1, -1, -1)
    random = torch.Generator().manual_seed(0)
    assert torch.equal(classifier._augment(x, 0, False, random), x)
    mirrored = classifier._augment(x, 0, True, random)
    turned = (mirrored == x.flip(3)).flatten(1).all(1)
    assert ((mirrored == x).flatten(1).all(1) ^ turned).all() and 70 < turned.sum() < 130
    moved = classifier._augment(x, 1, False, random)
    middle = {tuple(image[0, 2, 2:4].tolist()) for image in moved}
    assert middle == {(14.0 + 6 * i + j, 15.0 + 6 * i + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_as_good_as_it_says(name):
    net, info = classifier.load(SHIPPED[name])
    assert info["accuracy"] > 0.85 and SHIPPED[name].stat().st_size < 2e6
    assert net.config.shape == {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}[name] and net.config.classes == 10
    if name == "digits":  # the images of the other do not ship
        found = classifier.accuracy(net, data.load("digits", "test"))
        assert found == pytest.approx(info["accuracy"], abs=0.004) and found >= 0.98


@pytest.fixture
def pictures(tmp_path):
    """Two classes of four images in each split."""
    for split in ("train", "test"):
        for name, color in (("dark", 20), ("light", 230)):
            for i in range(4):
                file = tmp_path / "pictures" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (color + i, color, color - i)).save(file)
    return tmp_path / "pictures"


def test_a_folder_of_classes_trains_from_the_command_line(pictures, capsys):
    out = pictures.parent / "new" / "c.safetensors"
    words = ["train", "classifier", "--data", f"folder:{pictures}", "--device", "cpu"]
    assert main([*words, "--out", str(out), "--epochs", "2", "--batch", "4", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"epoch 2/2  loss .* training accuracy .*\n.*c.safetensors: test accuracy [\d.]+% of 8", said)
    _, info = classifier.load(out)
    assert info["recipe"]["seed"] == 3 and info["recipe"]["epochs"] == 2 and info["n_test"] == 8
    assert info["data"] == "folder:pictures" and info["net"]["classes"] == 2  # the name, not the whole path


BAD = [
    ("--data folder:DIR --out OUT --lr -1", "--lr must be positive, got -1"),
    ("--data folder:DIR --out OUT --epochs 0", "--epochs must be positive"),
    ("--data folder:DIR --out DIR/c.pt", "should end in .safetensors"),
    ("--data folder:DIR", "--out"),
    ("--data two_modes --out OUT", "two_modes has no labels: use cifar10, digits, or a folder"),
    ("--data folder:DIR/train/dark/../../flat --out OUT", "has no labels"),
    ("--data folder:DIR --out OUT --device tpu", "--device"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_answered_in_one_line(pictures, words, message, capsys):
    for split in ("train", "test"):
        (pictures / "flat" / split).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(pictures / "flat" / split / "a.png")
    words = words.replace("DIR", str(pictures)).replace("OUT", str(pictures / "c.safetensors"))
    assert main(["train", "classifier", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minigen: ") and said.count("\n") == 1 and re.search(message, said), said
    assert not list(pictures.glob("*.safetensors*"))

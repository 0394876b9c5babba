"""Data by name: what is promised of each kind, what is said when it cannot be had, and the order of the batches."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from minigen import data, images
from minigen.laws import LAWS


@pytest.mark.parametrize("bins", [17, 256])
def test_pixels_survive_the_round_trip(bins):
    k = torch.arange(bins, dtype=torch.uint8)
    x = data.to_float(k, bins)
    assert float(x[0]) == -1 and float(x[-1]) == pytest.approx(1, abs=1e-6)
    assert torch.equal(data.to_uint8(x, bins), k)
    torch.testing.assert_close(x, k / ((bins - 1) / 2) - 1)
    assert torch.equal(data.to_uint8(torch.tensor([-9.0, 9.0]), bins), k[[0, -1]])  # clipped


def test_digits_are_split_without_overlap():
    train, test = data.load("digits"), data.load("digits", "test")
    assert (len(train), len(test), train.shape, train.bins, train.flip) == (1497, 300, (1, 8, 8), 17, False)
    assert int(train.x.min()) == 0 and int(train.x.max()) == 16 and train.x.dtype == torch.uint8
    assert len(train.labels) == 1497 and train.labels.bincount().min() > 100
    ours = {bytes(x.numpy()) for x in train.x}
    assert not any(bytes(x.numpy()) in ours for x in test.x)


def test_laws_are_drawn_once_and_for_all():
    state = torch.get_rng_state()
    for name, law in LAWS.items():
        first, again, test = data.load(name), data.load(name), data.load(name, "test")
        assert torch.equal(first.x, again.x) and first.x.dtype == torch.float32 and len(first) == 50_000
        assert not torch.equal(first.x[:100], test.x[:100])
        torch.testing.assert_close(first.x.mean(0), law().weights @ law().means, atol=0.03, rtol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_names_are_answered_with_what_there_is():
    with pytest.raises(ValueError, match="cifar10, digits, folder:PATH, .*swiss_roll"):
        data.load("cifar11")
    with pytest.raises(ValueError, match="train or test"):
        data.load("digits", "valid")


def save(path, size=(8, 8), mode="RGB", color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_a_folder_of_many_formats_is_read_in_order(tmp_path):
    save(tmp_path / "b" / "2.JPG", color=(200, 10, 10))
    save(tmp_path / "a" / "1.png", mode="L", color=7)
    save(tmp_path / "c.bmp", color=(1, 2, 3))
    save(tmp_path / "d.webp", mode="RGBA", color=(9, 9, 9, 255))
    (tmp_path / "notes.txt").write_text("not an image")
    d = data.load(f"folder:{tmp_path}")
    assert (len(d), d.shape, d.bins, d.flip, d.x.dtype) == (4, (3, 8, 8), 256, True, torch.uint8)
    assert d.x[0].unique().tolist() == [7] and d.x[1, 0].float().mean() > 150
    assert d.x[2, :, 0, 0].tolist() == [1, 2, 3] and d.x.is_contiguous()


def test_subfolders_are_classes(tmp_path):
    for split in ("train", "test"):
        for name in ("b/x/1.png", "b/2.png", "a/3.png"):
            save(tmp_path / split / name)
    assert data.load(f"folder:{tmp_path}").labels.tolist() == [0, 1, 1]
    assert data.load(f"folder:{tmp_path}", "test").labels.tolist() == [0, 1, 1]
    save(tmp_path / "train" / "4.png")
    assert data.load(f"folder:{tmp_path}").labels is None


def test_train_and_test_folders_are_found(tmp_path):
    for split, color in (("train", 1), ("test", 2)):
        save(tmp_path / split / "0.png", color=(color,) * 3)
    for spec in (f"folder:{tmp_path}", f"folder:{tmp_path}/train/"):
        assert int(data.load(spec).x.max()) == 1 and int(data.load(spec, "test").x.max()) == 2
    with pytest.raises(ValueError, match="no test images"):
        data.load(f"folder:{tmp_path}/test", "test")


def broken(path):
    path.write_bytes(b"\x89PNG not really")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.rmdir(), "there is no folder"),
        (lambda p: None, "there are no images"),
        (lambda p: (save(p / "a.png"), save(p / "b.png", (9, 9))), r"mixed size: .*a\.png is 8x8, .*b\.png is 9x9"),
        (lambda p: save(p / "a.png", (8, 6)), r"a\.png is 8x6 pixels, not square"),
        (lambda p: broken(p / "a.png"), r"cannot read the image .*a\.png"),
        (lambda p: (save(p / "a.png"), broken(p / "z.png")), r"cannot read the image .*z\.png"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why_in_one_line(tmp_path, make, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=message) as e:
        data.load(f"folder:{folder}")
    assert "\n" not in str(e.value)


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of four images in the real layout, and three mirrors: absent, wrong, right."""
    base, mirror, wrong = tmp_path / "made" / CIFAR10.base_folder, tmp_path / "mirror", tmp_path / "wrong"
    for folder in (base, mirror, wrong):
        folder.mkdir(parents=True)
    sums = {}
    for name, n in (("data_batch_1", 3), ("test_batch", 1), ("batches.meta", 0)):
        pixels = np.arange(n * 3072, dtype=np.uint8).reshape(n, 3072)
        content = {"data": pixels, "labels": list(range(n)), "label_names": ["a"]}
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    with tarfile.open(mirror / images.CIFAR_FILE, "w:gz") as tar:
        tar.add(base, CIFAR10.base_folder)
    (wrong / images.CIFAR_FILE).write_bytes(b"a page that says sorry")
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setattr(images, "CIFAR_MD5", hashlib.md5((mirror / images.CIFAR_FILE).read_bytes()).hexdigest())
    mirrors = tuple(f"file://{tmp_path}/{name}/" for name in ("absent", "wrong", "mirror"))
    monkeypatch.setattr(images, "CIFAR_MIRRORS", mirrors)
    monkeypatch.delenv("MINIGEN_OFFLINE", raising=False)
    return tmp_path


def test_cifar_comes_from_the_first_mirror_with_the_right_file(fake_cifar):
    root = fake_cifar / "root"
    d = data.load("cifar10", root=root)
    assert (len(d), d.shape, d.bins, d.flip, d.labels.tolist()) == (3, (3, 32, 32), 256, True, [0, 1, 2])
    assert d.x[0, 0, 0, :3].tolist() == [0, 1, 2]  # channels first, rows next
    assert len(data.load("cifar10", "test", root=root)) == 1
    assert not list(root.glob("*.part"))


def test_cifar_placed_by_hand_is_used_offline(fake_cifar, monkeypatch):
    root = fake_cifar / "root"
    monkeypatch.setenv("MINIGEN_DATA", str(root))
    monkeypatch.setenv("MINIGEN_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"put {images.CIFAR_FILE} there"):
        data.load("cifar10")
    root.mkdir()
    (fake_cifar / "mirror" / images.CIFAR_FILE).rename(root / images.CIFAR_FILE)
    assert len(data.load("cifar10")) == 3
    (root / CIFAR10.base_folder / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged: delete that folder"):
        data.load("cifar10")


def test_cifar_that_no_mirror_gives_says_what_to_fetch(fake_cifar, monkeypatch):
    monkeypatch.setattr(images, "CIFAR_MIRRORS", images.CIFAR_MIRRORS[:2])
    with pytest.raises(ValueError, match="no mirror gave CIFAR-10: fetch .* and put it in") as e:
        data.load("cifar10", root=fake_cifar / "root")
    assert "\n" not in str(e.value) and not list((fake_cifar / "root").iterdir())


def test_a_slow_mirror_is_left(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(200_000))
    monkeypatch.setattr(images, "SLOW", 1e15)
    with pytest.raises(TimeoutError, match="slow"):
        images._fetch(f"file://{tmp_path}/a", tmp_path / "b", patience=0)
    images._fetch(f"file://{tmp_path}/a", tmp_path / "b", patience=float("inf"))
    assert (tmp_path / "b").stat().st_size == 200_000


def numbered(n):
    return torch.arange(n, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("batch", [1, 7, 10, 23])  # 7 reaches into the next epoch, 23 is larger than two epochs
def test_every_sample_comes_once_per_epoch(batch):
    stream = data.Batches(numbered(10), batch, seed=3)
    seen = torch.cat([next(stream) for _ in range(40)])[:, 0]
    for epoch in seen[: len(seen) // 10 * 10].split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:20])  # in another order


def test_batches_continue_exactly():
    x = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    one, two = (data.Batches(x, 6, flip=True, seed=1) for _ in range(2))
    for _ in range(5):
        next(one)
    state = {k: v.clone() for k, v in one.state().items()}
    expected = [next(one) for _ in range(9)]
    two.restore(state)
    assert all(torch.equal(next(two), b) for b in expected)


def test_half_of_the_images_are_mirrored():
    x = torch.tensor([0, 255], dtype=torch.uint8).expand(400, 1, 1, 2).contiguous()
    got = torch.cat([next(b) for b in [data.Batches(x, 400, flip=True)] for _ in range(5)])
    assert {tuple(row) for row in got.flatten(1).tolist()} == {(-1.0, 1.0), (1.0, -1.0)}
    assert 0.45 < float((got[:, 0, 0, 0] > 0).float().mean()) < 0.55


def test_batches_of_nothing_are_refused():
    for x, batch in ((numbered(0), 4), (numbered(4), 0)):
        with pytest.raises(ValueError, match="positive size"):
            data.Batches(x, batch)


def test_sixteen_bit_gray_keeps_its_ramp(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    x = data.load(f"folder:{tmp_path}").x
    assert x.shape == (1, 3, 8, 8)
    assert x[0, 0].flatten().tolist() == (ramp.flatten() >> 8).tolist()


def test_others_are_other_samples():
    digits = data.load("digits")
    a, b = digits.samples(700, seed=3), digits.others(700, seed=3)
    assert torch.cdist(a.flatten(1), b.flatten(1)).min() > 0

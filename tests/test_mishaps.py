"""What may go wrong in a day of work: one clear line, nothing lost, no number that only looks good."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from torch import nn

import minigen
from minigen import (
    DDPM,
    DPM,
    PFGM,
    binary,
    checkpoint,
    classifier,
    data,
    evaluate,
    fields,
    fit,
    generate,
    images,
    laws,
    recipe,
    samplers,
    seeded,
)
from minigen.__main__ import main

SMALL = ["--width", "8", "--batch", "16", "--warmup", "2", "--device", "cpu"]


def run(*words):
    return main([str(w) for w in words])


@pytest.fixture
def begun(tmp_path):
    place = tmp_path / "run"
    assert run("train", "ddpm", "--data", "two_modes", "--steps", 4, "--out", place, *SMALL) == 0
    return place


def said(capsys):
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("minigen: ")]
    assert "Traceback" not in text and lines
    return lines[-1]


# files that cannot be written or read


def test_a_full_disk_leaves_the_old_file_and_is_an_os_error(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    checkpoint.write(file, {"x": torch.ones(2)}, {})
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="cannot write .*No space left"):
        checkpoint.write(file, {"x": torch.zeros(2)}, {})
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_may_not_be_read_is_not_called_damaged(begun, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(checkpoint.CheckpointError, match="may not be read"):
        minigen.load(begun)


def test_a_picture_or_a_save_that_fails_does_not_end_the_training(begun, capsys, monkeypatch):
    for file in (begun / "samples").iterdir():
        file.unlink()
    (begun / "samples").rmdir()
    (begun / "samples").write_text("in the way")
    write, failed = checkpoint.write, []

    def once(path, *args):
        if not failed:
            failed.append(path)
            raise OSError("No space left on device")
        write(path, *args)

    monkeypatch.setattr(checkpoint, "write", once)
    words = ["--resume", "--steps", 12, "--save-every", 6, "--device", "cpu"]
    assert run("train", "ddpm", "--out", begun, *words) == 0
    text = capsys.readouterr().err
    assert "No space left on device; the training goes on" in text and "samples" in text
    assert checkpoint.read(begun, with_tensors=False)[1]["step"] == 12 and failed


def test_the_last_save_must_succeed(begun, capsys, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    assert run("train", "ddpm", "--out", begun, "--resume", "--steps", 6, "--device", "cpu") == 2
    assert "No space left" in said(capsys)
    assert checkpoint.read(begun, with_tensors=False)[1]["step"] == 4


def test_outputs_are_tried_before_the_work(begun, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "draw", lambda *a, **k: pytest.fail("drawn in vain"))
    (tmp_path / "folder.png").mkdir()
    assert run("sample", begun, "--out", tmp_path / "folder.png") == 2
    assert "choose another place" in said(capsys)
    (tmp_path / "there.json").mkdir()
    assert run("evaluate", begun, "--out", tmp_path / "there.json") == 2
    assert "choose another place" in said(capsys)
    assert run("evaluate", begun, "--n", 1) == 2
    assert "at least 2" in said(capsys)


def test_numbers_go_into_a_file_of_that_name(begun, tmp_path):
    assert run("sample", begun, "--n", 3, "--steps", 2, "--out", tmp_path / "X.NPY") == 0
    assert np.load(tmp_path / "X.NPY").shape == (3, 2)
    generate.picture(torch.zeros(2, 3, 8, 8), str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").exists()


# folders


def test_two_processes_do_not_share_a_folder(begun, tmp_path, capsys):
    with FileLock(begun / ".lock"):
        assert run("train", "ddpm", "--out", begun, "--resume", "--steps", 6, "--device", "cpu") == 2
    assert "another process trains in" in said(capsys)
    assert run("train", "ddpm", "--out", begun, "--resume", "--steps", 6, "--device", "cpu") == 0


def test_files_of_something_else_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert run("train", "ddpm", "--data", "two_modes", "--steps", 2, "--out", tmp_path, *SMALL) == 2
    assert "holds config.json and no run" in said(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"] and (tmp_path / "config.json").read_text() == "mine"


def test_the_way_to_go_on_can_be_pasted(capsys):
    first = SimpleNamespace(rank=0)
    stopped = SimpleNamespace(processes=first, progress=0.5, step=3, describe=lambda: {"method": "ddpm"})
    fit._farewell(stopped, Path("my run"), 2)
    assert "train ddpm --out 'my run' --resume --snapshots 2" in said(capsys)


def test_a_log_with_broken_bytes_is_read(begun):
    with (begun / "log.csv").open("ab") as f:
        f.write(b"\xff\xfe,1\n")
    assert run("train", "ddpm", "--out", begun, "--resume", "--steps", 30, "--device", "cpu") == 0


def test_an_exported_file_is_not_for_training(begun, tmp_path, capsys):
    assert run("export", begun, tmp_path / "a.safetensors") == 0
    (tmp_path / "a.safetensors").replace(begun / checkpoint.NAME)
    assert run("train", "ddpm", "--out", begun, "--resume", "--steps", 6, "--device", "cpu") == 2
    assert "averaged weights alone" in said(capsys)


@pytest.mark.parametrize("name", ["method", "net", "step", "data"])
def test_a_header_of_another_kind_is_refused(begun, name):
    tensors, info = checkpoint.read(begun)
    checkpoint.write(begun / "b.safetensors", tensors, info | {name: [1]})
    with pytest.raises(checkpoint.CheckpointError, match=f"its {name} is of another kind"):
        minigen.load(begun / "b.safetensors")
    checkpoint.write(begun / "b.safetensors", tensors, info | {"net": info["net"] | {"width": "x"}})
    with pytest.raises(checkpoint.CheckpointError, match="describes no network"):
        minigen.load(begun / "b.safetensors")


# numbers that only look good


def test_samples_that_are_no_numbers_are_refused(begun, tmp_path, capsys):
    def diverged(x, u):
        return x * torch.where(torch.arange(len(x)) == 1, math.nan, 1.0)[:, None]

    with pytest.raises(ValueError, match="1 of 3 samples are not finite"):
        generate.draw(DDPM(), diverged, (3, 2), steps=2)
    np.save(tmp_path / "x.npy", np.full((4, 2), np.nan, np.float32))
    assert run("evaluate", begun, "--samples", tmp_path / "x.npy") == 2
    assert "4 of 4 samples are not finite" in said(capsys)
    np.save(tmp_path / "x.npy", np.zeros((4, 2), np.int64))
    assert run("evaluate", begun, "--samples", tmp_path / "x.npy") == 2
    assert "whole numbers from 0 to 0" in said(capsys)


def test_gray_values_of_another_scale_are_refused(tmp_path, capsys):
    place = tmp_path / "run"
    assert run("train", "ddpm", "--data", "digits", "--steps", 1, "--out", place, *SMALL) == 0
    np.save(tmp_path / "x.npy", np.full((4, 1, 8, 8), 200, np.uint8))
    assert run("evaluate", place, "--samples", tmp_path / "x.npy") == 2
    assert "makes whole numbers from 0 to 16" in said(capsys)


def test_one_picture_has_no_error_bar(tmp_path):
    place = tmp_path / "run"
    words = [*SMALL, "--T", 3]
    assert run("train", "ddpm", "--data", "digits", "--steps", 1, "--out", place, *words) == 0
    assert run("evaluate", place, "--n", 4, "--steps", 2, "--bits", 1, "--features", "none", "--tol", 0.1) == 0
    text = (place / "evaluate.json").read_text()
    assert "NaN" not in text and json.loads(text)["bits_bound_error"] is None


def test_wrong_words_do_not_choose_another_branch():
    for make in (
        lambda: DDPM(variance="fixedlarge"),
        lambda: DDPM(schedule="Linear"),
        lambda: DPM(schedule="linear"),
        lambda: PFGM(target="Denoiser"),
        lambda: DDPM().sigmas(5, "quad"),
    ):
        with pytest.raises(ValueError, match="schedule|variance|target|spacing"):
            make()


def test_a_data_set_is_of_one_kind():
    pixels, points = torch.full((2, 1, 4, 4), 5, dtype=torch.uint8), torch.randn(4, 2)
    for x, bins in ((pixels, 0), (pixels, 5), (points.double(), 0), (points / 0, 0)):
        with pytest.raises(ValueError, match="uint8"):
            data.Dataset("mine", x, bins)
    assert len(data.Dataset("mine", pixels, 6)) == 2 and len(data.Dataset("mine", points)) == 4


def test_what_makes_a_worse_model_is_said(tmp_path, capsys):
    words = ["--data", "two_modes", "--steps", 2, "--width", 8, "--batch", 8, "--device", "cpu"]
    assert run("train", "ddpm", "--out", tmp_path / "a", *words, "--warmup", 2, "--T", 100) == 0
    text = capsys.readouterr().err
    assert "still rises at the end" in text and "after --T 100 steps 36% of the data's variance is left" in text
    assert run("train", "ddpm", "--out", tmp_path / "b", *words, "--T", 100, "--schedule", "cosine") == 0
    assert "minigen:" not in capsys.readouterr().err


def test_a_short_run_warms_up_shortly():
    digits = data.load("digits")
    assert recipe.preset(digits).warmup == recipe.preset(digits, steps=4000).warmup == 200
    assert recipe.preset(digits, steps=100).warmup == 5
    with pytest.raises(ValueError, match="--seed must fit"):
        recipe.TrainConfig(seed=10**20)


def test_a_batch_far_larger_than_the_data_is_the_same_stream():
    x = torch.arange(5, dtype=torch.float32)[:, None]
    few, many = data.Batches(x, 7, seed=3), data.Batches(x, 700, seed=3)
    assert torch.equal(torch.cat([next(few) for _ in range(100)]), next(many))


# folders of images


def paint(path, value=0, size=8, mode="RGB", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value).save(path, **more)


def test_classes_are_those_of_the_training_images(tmp_path):
    for name in ("a", "b", "c"):
        paint(tmp_path / "train" / name / "0.png")
    for name in ("b", "c"):
        paint(tmp_path / "test" / name / "0.png")
    assert images.folder(tmp_path, "test")[1].tolist() == [1, 2]
    assert images.folder(tmp_path / "train", "test")[1].tolist() == [1, 2]
    assert images.folder(tmp_path / "train", "train")[1].tolist() == [0, 1, 2]
    paint(tmp_path / "test" / "d" / "0.png")
    with pytest.raises(ValueError, match="has the class d, and .*train has not"):
        images.folder(tmp_path, "test")


def test_the_reader_of_folders_sees_what_a_person_sees(tmp_path):
    half = Image.new("RGB", (8, 8), "black")
    half.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees, the upper half to the right
    half.save(tmp_path / "a.png", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "._c.png").write_bytes(b"no image")
    paint(tmp_path / ".hidden" / "d.png")
    other = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    paint(other / "e.png", (1, 2, 3))
    (tmp_path / "link").symlink_to(other, target_is_directory=True)
    (tmp_path / "link" / "loop").symlink_to(tmp_path, target_is_directory=True)
    x, _ = images.folder(tmp_path, "train")
    assert len(x) == 3
    assert x[0, :, :, 4:].min() == 255 and x[0, :, :, :4].max() == 0
    assert x[1].min() == 255
    assert x[2, :, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="needs a PATH"):
        data.load("folder:")


def test_mirror_images_may_be_left_out(tmp_path, capsys):
    for k in range(4):
        paint(tmp_path / "letters" / f"{k}.png", (k, k, k))
    place, words = tmp_path / "run", ["--data", f"folder:{tmp_path / 'letters'}", "--device", "cpu"]
    assert run("train", "ddpm", "--steps", 1, "--flip", "off", "--out", place, *words, *SMALL) == 0
    assert checkpoint.read(place, with_tensors=False)[1]["data"]["flip"] is False
    assert run("train", "ddpm", "--resume", "--steps", 2, "--flip", "on", "--out", place, *words) == 2
    assert "--flip on is not what" in said(capsys)
    assert run("train", "ddpm", "--resume", "--steps", 2, "--out", place, *words) == 0
    assert checkpoint.read(place, with_tensors=False)[1]["data"]["flip"] is False
    bad = ["train", "ddpm", "--data", "heart", "--steps", 1, "--flip", "on", "--out", tmp_path / "b"]
    assert run(*bad, *SMALL) == 2
    assert "mirrors images" in said(capsys)


def test_grids_of_ncsn_have_all_levels(tmp_path, monkeypatch):
    """NCSN's T counts the steps at a level, not the levels."""
    asked = []
    draw = fit.draw
    monkeypatch.setattr(fit, "draw", lambda *a, **k: asked.append(k["steps"]) or draw(*a, **k))
    for method, T in (("ncsn", 1), ("ddpm", 5)):
        words = ["--data", "two_modes", "--steps", 1, "--out", tmp_path / method, *SMALL, "--T", T]
        assert run("train", method, *words) == 0
    assert asked == [20, 5]


def test_auto_is_a_device_for_load(begun):
    net = minigen.load(begun, "auto").net
    assert isinstance(net, nn.Module) and not net.training


# numbers at the edges


def test_heun_survives_a_step_that_is_too_long():
    """The first step of a cosine schedule falls by a factor of 1,000; true samples are as far from each other."""
    method, law = DDPM(schedule="cosine", clip=False), laws.two_modes()
    with seeded(1):
        true, other = law.sample(2000), law.sample(2000)
    floor = evaluate.sliced_wasserstein(true, other)
    x, calls = generate.draw(method, method.oracle(law.denoiser), (2000, 2), sampler="heun", steps=25)
    assert evaluate.sliced_wasserstein(x, true) < 3 * floor
    assert calls == 2 * 25 - 2  # the first step and the last are Euler's


def test_whole_numbers_are_no_samples():
    bits = torch.ones(3, 20, dtype=torch.int64)
    with pytest.raises(ValueError, match="floating-point"):
        binary.BinaryDPM(T=5).loss(lambda x, u: torch.zeros_like(x), bits)
    with pytest.raises(ValueError, match="floating-point"):
        DDPM().perturb(bits, torch.tensor([1, 2, 3]), torch.randn(3, 20))


def test_the_solver_takes_a_network_with_gradients():
    scale = nn.Parameter(torch.tensor(0.5))
    out = samplers.rk45(lambda x, sigma: scale * x, torch.ones(2, 2), 1.0, 0.1, 1e-4)
    assert out.x.isfinite().all() and not out.x.requires_grad


def test_the_variance_survives_strong_noise():
    law = laws.two_modes()
    x = torch.randn(50, 2)
    for sigma in (1e2, 1e3, 1e4):
        level = torch.full((50,), sigma)
        of_float, of_double = law.moments(x * sigma, level)[1], law.moments(x.double() * sigma, level.double())[1]
        assert (of_float.double() - of_double).abs().max() < 1e-3 * of_double.max()


def test_a_rate_that_rounds_to_one_is_refused():
    with pytest.raises(ValueError, match="rounds to 1"):
        DPM(T=200, schedule="geometric", alpha_bar_T=1e-10)


def test_a_last_batch_of_one_image():
    x = torch.randint(0, 17, (65, 1, 4, 4), dtype=torch.uint8)
    some = data.Dataset("some", x, 17, labels=torch.arange(65) % 2)
    config, how = classifier.preset(some)
    *_, (_, seen) = classifier.fit(some, config, replace(how, epochs=1, batch=64))
    assert math.isfinite(seen["loss"])


@pytest.mark.parametrize("D", [1e9, 1.1e9, 1e12, 1e15, 1e17])
def test_the_density_of_a_kernel_with_many_dimensions_is_gaussian(D):
    x = 0.7 * torch.randn(4, 3072, dtype=torch.float64)
    assert fields.Kernel(D).log_prob(x, 0.7) == pytest.approx(fields.GAUSSIAN.log_prob(x, 0.7), abs=0.02)

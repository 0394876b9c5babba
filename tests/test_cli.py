"""The command line: every promise of ``python -m minigen``, in this process or in one that can be killed."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import minigen
from minigen import checkpoint
from minigen.__main__ import main
from minigen.laws import LAWS

SMALL = ["--width", "8", "--batch", "16", "--warmup", "2", "--device", "cpu", "--T", "20"]


def ok(*words):
    assert main([str(w) for w in words]) == 0


def rows(run):
    with (run / "log.csv").open() as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "digits"
    ok("train", "ddpm", "--data", "digits", "--steps", 12, "--log-every", 3, "--out", run, *SMALL)
    return run


@pytest.fixture(scope="module")
def modes(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "modes"
    ok("train", "ddpm", "--data", "eight_gaussians", "--steps", 20, "--out", run, *SMALL)
    return run


def test_train_leaves_a_checkpoint_a_log_pictures_and_a_readable_configuration(digits):
    assert [r["step"] for r in rows(digits)] == [3, 6, 9, 12]
    assert all(r["loss"] > 0 and r["images_per_s"] > 0 and r["grad_norm"] > 0 for r in rows(digits))
    assert rows(digits)[0].keys() == {"step", "loss", "grad_norm", "lr", "images_per_s", "seconds"}
    grids = sorted(p.name for p in (digits / "samples").iterdir())
    assert len(grids) == 10 and grids[-1] == "step-000012.png"
    config = json.loads((digits / "config.json").read_text())
    assert config["method_fields"]["T"] == 20 and config["net"]["width"] == 8 and config["train"]["batch"] == 16
    assert Image.open(digits / "loss.png").size[0] > 300
    assert not [p for p in digits.rglob("*.part")]


def test_snapshots_are_kept_along_the_run(tmp_path):
    run = tmp_path / "run"
    ok("train", "ddpm", "--data", "digits", "--steps", 6, "--snapshots", 3, "--out", run, *SMALL)
    kept = sorted((run / "snapshots").iterdir())
    assert [p.stem for p in kept] == ["step-000002", "step-000004", "step-000006"]
    early, late, end = (minigen.load(p).net.state_dict()["enter.weight"] for p in (kept[0], kept[2], run))
    assert torch.allclose(late, end, atol=1e-3) and not torch.allclose(early, late, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "rk45", "paper"])
def test_sample_needs_the_file_alone(digits, tmp_path, capsys, sampler):
    alone = tmp_path / "model.safetensors"
    shutil.copy(digits / checkpoint.NAME, alone)
    ok("sample", alone, "--n", 5, "--steps", 4, "--sampler", sampler, "--out", tmp_path / "new" / "grid.png")
    calls = {"ddim": 4, "heun": 7, "paper": 20}.get(sampler)
    said = capsys.readouterr().out
    assert "5 samples" in said and (calls is None or f" {calls} network calls" in said)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape[0] > 90 and grid.std() > 10


def test_the_same_seed_draws_the_same_samples(digits, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ok("sample", digits, "--n", 3, "--steps", 3, "--seed", seed, "--out", tmp_path / f"{name}.npy")
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert a.shape == (3, 1, 8, 8) and (a == b).all() and (a != c).any()


def test_sampling_in_mixed_precision_gives_nearly_the_same_pictures(digits, tmp_path):
    for kind in ("fp32", "bf16"):
        ok("sample", digits, "--n", 3, "--steps", 3, "--precision", kind, "--out", tmp_path / f"{kind}.npy")
    a, b = (np.load(tmp_path / f"{kind}.npy") for kind in ("fp32", "bf16"))
    assert a.dtype == b.dtype == np.float32 and 0 < np.abs(a - b).mean() < 0.1


def test_points_become_a_scatter_plot(modes, tmp_path):
    ok("sample", modes, "--n", 50, "--steps", 3, "--out", tmp_path / "points.png")
    assert (np.asarray(Image.open(tmp_path / "points.png"))[..., 0] < 255).sum() > 500


def test_evaluate_images(digits, capsys):
    results = []
    for _ in range(2):
        ok("evaluate", digits, "--n", 40, "--steps", 3, "--bits", 2)
        results.append(json.loads((digits / "evaluate.json").read_text()))
    first, second = ({k: v for k, v in r.items() if k != "seconds"} for r in results)
    assert first == second  # same seed, same numbers
    assert first["sliced_wasserstein"] > 2 * first["sliced_wasserstein_floor"] > 0
    assert first["bits_bound"] > 1 and first["bits_n"] == 2 and first["bits_bound_error"] > 0
    facts = {"n": 40, "n_data": 40, "split": "test", "weights": "EMA", "network_calls": 3, "trained_steps": 12}
    assert facts.items() <= first.items()
    assert "sliced_wasserstein_floor" in capsys.readouterr().out


def test_evaluate_points(modes):
    ok("evaluate", modes, "--n", 500, "--steps", 5)
    result = json.loads((modes / "evaluate.json").read_text())
    assert result["modes"] == 8 and len(result["mode_shares"]) == 8 and "bits_bound" not in result
    assert abs(result["energy_distance_floor"]) < 0.02 < result["energy_distance"]


def test_evaluate_against_the_training_images(tmp_path):
    folder, run = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(folder / f"{i}.png")
    ok("train", "ddpm", "--data", f"folder:{folder}", "--steps", 2, "--out", run, *SMALL)
    assert main(["evaluate", str(run), "--n", "4"]) == 2  # there are no test images
    ok("evaluate", run, "--n", 4, "--split", "train", "--steps", 2, "--bits", 0)
    assert json.loads((run / "evaluate.json").read_text())["split"] == "train"


def test_plot(modes, capsys):
    (modes / "loss.png").unlink()
    ok("plot", modes)
    assert (modes / "loss.png").exists()


FEW = ["--width", "8", "--batch", "16", "--warmup", "2", "--device", "cpu", "--steps", "4"]


@pytest.mark.parametrize("data", ["digits", "two_modes"])
def test_ncsn(tmp_path, data):
    """Images get the paper's ladder, points a wider one; what is said on the command line stays."""
    run = tmp_path / "run"
    ok("train", "ncsn", "--data", data, "--T", 3, "--out", run, *FEW)
    fields = json.loads((run / "config.json").read_text())["method_fields"]
    assert fields["T"] == 3
    defaults = {"digits": (10, 2, False), "two_modes": (20, 5, True)}
    assert (fields["L"], fields["sigma_1"], fields["denoise"]) == defaults[data]
    ok("train", "ncsn", "--T", 3, "--out", run, "--resume", "--steps", 6, "--device", "cpu")
    for sampler in ("paper", "ddim", "heun", "rk45"):
        ok("sample", run, "--n", 3, "--steps", 4, "--sampler", sampler, "--out", tmp_path / f"{sampler}.npy")
        assert np.isfinite(np.load(tmp_path / f"{sampler}.npy")).all()
    ok("evaluate", run, "--n", 20, "--steps", 3, "--sampler", "paper")
    assert "bits_bound" not in json.loads((run / "evaluate.json").read_text())  # it has no bound
    assert main(["train", "ncsn", "--resume", "--L", "7", "--out", str(run)]) == 2


def test_resume_goes_on_and_finishing_twice_does_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    ok("train", "ddpm", "--data", "two_modes", "--steps", 6, "--log-every", 2, "--out", run, *SMALL)
    ok("train", "ddpm", "--out", run, "--resume", "--device", "cpu")
    assert "is complete at step 6: give a larger --steps" in capsys.readouterr().out
    ok("train", "ddpm", "--out", run, "--resume", "--steps", 10, "--batch", 16)  # repeating a word is no contradiction
    assert [r["step"] for r in rows(run)] == [2, 4, 6, 8, 10]
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 10


def test_a_time_budget(tmp_path):
    run = tmp_path / "run"
    few = ["--width", 8, "--T", 5, "--device", "cpu"]  # fewer levels than a sample grid would take
    ok("train", "ddpm", "--data", "two_modes", "--minutes", "0.01", "--log-every", 1, "--out", run, *few)
    last = rows(run)[-1]
    assert last["seconds"] >= 0.6  # the budget is used up, and the rate has come down from its peak
    assert last["lr"] < 0.8 * max(row["lr"] for row in rows(run))
    assert json.loads((run / "config.json").read_text())["train"]["steps"] is None


BAD = [
    ("", "COMMAND"),
    ("trian ddpm", "unknown command 'trian': use train, sample, evaluate, compare, export or plot"),
    ("train", "which method\\?"),
    ("train ddpn --data digits --out RUN", "unknown method 'ddpn'"),
    ("train ddpm --data digits", "--out"),
    ("train ddpm --out RUN", "--data is missing: cifar10, digits"),
    ("train ddpm --data nothing --out RUN", "unknown data 'nothing'"),
    ("train ddpm --data folder:DIR/none --out RUN", "there is no folder"),
    ("train ddpm --data folder:DIR/empty --out RUN", "there are no images"),
    ("train ddpm --data folder:DIR/mixed --out RUN", "images of mixed size"),
    ("train ddpm --data cifar10 --offline --out RUN", "CIFAR-10 is not in"),
    ("train ddpm --data digits --out RUN --width 0", "width must be at least 1, got 0"),
    ("train ddpm --data digits --out RUN --width 15", "even and at least 4, got 15"),
    ("train ddpm --data digits --out RUN --minutes inf", "--minutes must be"),
    ("train ddpm --data digits --out RUN --sample-every -1", "--sample-every must be"),
    ("train ddpm --data digits --out RUN --steps 0", "--steps must be positive, got 0"),
    ("train ddpm --data digits --out RUN --batch -4", "--batch must be positive, got -4"),
    ("train ddpm --data digits --out RUN --minutes 0", "--minutes must be positive"),
    ("train ddpm --data digits --out RUN --T 1", "T >= 2"),
    ("train ncsn --data digits --out RUN --sigma-1 0.01", "sigma_1 > sigma_L"),
    ("train ncsn --data digits --out RUN --eps 0.01", "diverge unless 0 < eps < 4 sigma_L"),
    ("train ddpm --data digits --out RUN --width wide", "--width"),
    ("train ddpm --data digits --out RUN --groups 0", "--groups must be at least 1, got 0"),
    ("train ddpm --data digits --out RUN --widht 3", "[Uu]nrecognized"),
    ("train ddpm --data digits --out RUN --device tpu", "--device"),
    ("train ddpm --data digits --out RUN --bogus 3", "Unrecognized options: --bogus"),
    ("sample --n 3", "run"),
    ("train ddpm --out RUN --resume", "holds no run to continue: leave out --resume"),
    ("train ddpm --data digits --out DONE", "already holds a run: add --resume"),
    ("train ddpm --out DONE --resume --batch 7", "--batch 7 is not the 16 of"),
    ("train ddpm --out DONE --resume --width 9", "--width 9 is not the 8 of"),
    ("train ddpm --out DONE --resume --groups 9", "--groups 9 is not the 32 of"),
    ("train ddpm --out DONE --resume --T 50", "is not the DDPM\\(T=20"),
    ("train ddpm --out DONE --resume --data two_modes", "was trained on digits, not on two_modes"),
    ("train ddpm --data digits --out DIR/mixed/a.png", "is a file: --out names the folder"),
    ("sample RUN", "is not a run"),
    ("sample DIR/mixed/a.png", "damaged or not a checkpoint"),
    ("sample DONE --n 0 --out DIR/x.png", "--n must be positive"),
    ("sample DONE --steps 21 --out DIR/x.png", "steps must be between 1 and T = 20"),
    ("sample DONE --n 1 --steps 1 --out DIR/x.nothing", "no kind of file to write samples to"),
    ("sample DONE --sampler leap", "--sampler"),
    ("evaluate RUN", "is not a run"),
    ("evaluate DONE --n -1", "--n must be positive"),
    ("evaluate DONE --bits -1", "--bits must be at least 0"),
    ("evaluate DONE --tol 0", "--tol positive"),
    ("plot RUN", "nothing to plot"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_answered_in_one_line(words, message, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIGEN_DATA", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "mixed" / "b.png")
    swap = {"RUN": tmp_path / "run", "DONE": digits, "DIR": tmp_path}
    for name, path in swap.items():
        words = words.replace(name, str(path))
    before = (digits / checkpoint.NAME).stat().st_mtime_ns
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    if words:
        assert said.startswith("minigen: ") and said.count("\n") == 1 and "Traceback" not in said
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()  # nothing half-made is left behind
    assert (digits / checkpoint.NAME).stat().st_mtime_ns == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("words", ["train ddpm --data digits --out RUN", "sample RUN", "evaluate RUN"])
def test_cuda_that_is_absent_is_said(words, tmp_path, capsys):
    assert main([*words.replace("RUN", str(tmp_path / "run")).split(), "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "minigen: there is no CUDA device here: use --device cpu\n"


@pytest.mark.parametrize("package", ["tyro", "accelerate"])
def test_a_missing_package_is_named(package):
    code = f"import sys; sys.modules['{package}'] = None; from minigen.__main__ import main; sys.exit(main())"
    words = ["train", "ddpm", "--data", "two_modes", "--steps", "1", "--out", os.devnull + "/x"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"minigen: {package} is missing: pip install 'minigen[train]'\n"


def test_help(capsys):
    ok("--help")
    assert "train METHOD --data DATA --out RUN" in capsys.readouterr().out
    ok("train", "ddpm", "--help")
    said = capsys.readouterr().out
    assert all(word in said for word in ("--data", "--minutes", "--resume", "--variance", "--T", *LAWS))
    ok("sample", "--help")
    assert "--sampler" in capsys.readouterr().out


def test_the_fast_recipe_learns_poisson_flow_at_as_many_points_as_others_see_images(tmp_path, capsys):
    run, words = tmp_path / "run", ["--data", "digits", "--recipe", "fast", "--width", 8, "--device", "cpu"]
    ok("train", "pfgm", *words, "--steps", 2, "--large-batch", 200, "--out", run)
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["batch"] == 200 and config["train"]["steps"] == 2
    assert main(["train", "pfgm", "--out", str(run), "--resume", "--recipe", "fast"]) == 2
    assert "--recipe is for a new run" in capsys.readouterr().err


def test_what_the_command_line_names_stays_even_where_it_is_the_usual_value(tmp_path, capsys):
    words = ["--data", "two_modes", "--steps", 1, "--batch", 16, "--width", 8, "--device", "cpu", "--large-batch", 64]
    for out, more, target in (("a", [], "denoiser"), ("b", ["--target", "field"], "field")):
        ok("train", "pfgm", *words, *more, "--out", tmp_path / out)
        assert json.loads((tmp_path / out / "config.json").read_text())["method_fields"]["target"] == target
    again = ["train", "pfgm", "--resume", "--steps", 2, "--out"]
    ok(*again, tmp_path / "b", "--target=field")
    assert main([str(w) for w in [*again, tmp_path / "a", "--target=field"]]) == 2
    assert "leave the options out" in capsys.readouterr().err


def test_a_run_that_failed_in_its_first_step_may_start_again(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = [*map(str, ["train", "ddpm", "--data", "two_modes", *SMALL, "--steps", 2, "--out", run])]
    with monkeypatch.context() as m:
        m.setattr(torch.optim.Adam, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        assert main(words) == 2
    assert "--accumulate" in capsys.readouterr().err and (run / checkpoint.NAME).exists()
    ok(*words, "--accumulate", 2)
    assert main(words) == 2 and "already holds a run" in capsys.readouterr().err


# Interruptions

LONG = ["train", "ddpm", "--data", "eight_gaussians", "--steps", "2000", "--log-every", "10", *SMALL]


def start(run, *more):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "minigen", *LONG, "--out", str(run), *more]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, run, step):
    for _ in range(6000):
        if (run / "log.csv").exists() and (seen := rows(run)) and seen[-1]["step"] >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("the training did not get there")


def comparable(run):
    tensors, info = checkpoint.read(run)
    del info["seconds"]
    return tensors, info, [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows(run)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    process = start(run)
    assert process.wait(300) == 0, process.stderr.read()
    return comparable(run)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, unbroken, how):
    run = tmp_path / "run"
    process = start(run, "--save-every", "70")
    wait_for(process, run, 100)
    process.send_signal(how)
    _, said = process.communicate(timeout=300)
    _, info = checkpoint.read(run, with_tensors=False)
    if how == signal.SIGKILL:
        assert process.returncode == -9 and info["step"] % 70 == 0 and info["step"] >= 70
    else:
        assert process.returncode == 128 + how
        assert said.splitlines()[-1].startswith(f"minigen: stopped at step {info['step']} and saved; continue with: ")
    assert info["step"] < 2000
    with (run / "log.csv").open("a") as f:
        f.write("1990,0.1,")  # a line cut short, and one from beyond the checkpoint
    ok("train", "ddpm", "--out", run, "--resume", "--device", "cpu")
    tensors, rest, log = comparable(run)
    assert (rest, log) == unbroken[1:]  # no step twice, no digit different
    assert not [k for k in unbroken[0] if not torch.equal(tensors[k], unbroken[0][k])]


@pytest.mark.parametrize("method", ["pfgm", "pfgmpp"])
def test_poisson_flow_trains_samples_evaluates_and_resumes(method, tmp_path, capsys):
    words = ["--width", 8, "--batch", 32, "--warmup", 2, "--device", "cpu"]
    for data in ("digits", "two_modes"):
        run = tmp_path / data
        ok("train", method, "--data", data, "--steps", 4, "--log-every", 2, "--out", run, *words)
        ok("evaluate", run, "--n", 20, "--sampler", "euler", "--steps", 3)
        assert json.loads((run / "evaluate.json").read_text())["network_calls"] == 3
        for sampler in ("ddim", "heun", "rk45", "paper"):
            ok("sample", run, "--n", 3, "--steps", 3, "--sampler", sampler, "--out", tmp_path / "grid.png")
        ok("train", method, "--out", run, "--resume", "--steps", 6, "--device", "cpu")
        assert rows(run)[-1]["step"] == 6
    fields = json.loads((tmp_path / "digits" / "config.json").read_text())
    if method == "pfgm":
        assert fields["net"]["out"] == 2 and fields["method_fields"]["target"] == "field"
    plain = [w for w in words if w not in ("--batch", 32)]
    ok("train", method, "--data", "digits", "--steps", 1, "--out", tmp_path / "wide", *plain)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["train"]["batch"] == (1024 if method == "pfgm" else 128)


def test_options_that_were_given_stay_when_the_rest_fits_the_data(tmp_path):
    run = tmp_path / "run"
    words = ["--gamma", 0.4, "--device", "cpu"]
    ok("train", "pfgm", "--data", "two_modes", "--steps", 2, "--batch", 16, "--width", 8, "--out", run, *words)
    ok("train", "pfgm", "--out", run, "--resume", "--steps", 3, *words)
    fields = json.loads((run / "config.json").read_text())["method_fields"]
    assert fields["gamma"] == 0.4 and fields["target"] == "denoiser"
    assert main(["train", "pfgm", "--out", str(run), "--resume", "--steps", "4", "--gamma", "0.5"]) == 2


@pytest.mark.parametrize("data", ["digits", "swiss_roll"])
def test_the_objective_of_2015_with_the_network_of_2020(tmp_path, data):
    run = tmp_path / "run"
    ok("train", "dpm", "--data", data, "--T", 5, "--schedule", "geometric", "--out", run, *FEW)
    info = json.loads((run / "config.json").read_text())
    assert info["method_fields"] | {"T": 5, "schedule": "geometric"} == info["method_fields"]
    assert info["net"]["out"] == (2 if data == "digits" else 4)  # mean and variance
    ok("train", "dpm", "--out", run, "--resume", "--steps", 6, "--device", "cpu")
    for sampler in ("paper", "ddim", "heun"):
        ok("sample", run, "--n", 3, "--steps", 3, "--sampler", sampler, "--out", tmp_path / f"{sampler}.npy")
        assert np.isfinite(np.load(tmp_path / f"{sampler}.npy")).all()
    ok("evaluate", run, "--n", 20, "--steps", 3, "--bits", 2)
    bits = json.loads((run / "evaluate.json").read_text()).get("bits_bound")
    assert (bits is not None) == (data == "digits")


def test_export_tells_nobody_where_the_images_lay(tmp_path):
    place = tmp_path / "private" / "photos" / "train"
    place.mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * i, dtype=np.uint8)).save(place / f"{i}.png")
    run, file = tmp_path / "run", tmp_path / "a.safetensors"
    ok("train", "ddpm", "--data", f"folder:{place.parent}", "--steps", 2, "--out", run, *SMALL)
    ok("export", run, file)
    assert minigen.load(run).data == f"folder:{place.parent}" and minigen.load(file).data == "folder:photos"
    assert b"private" not in file.read_bytes()


def test_export_keeps_what_sampling_needs(tmp_path, capsys):
    run, small, full = tmp_path / "run", tmp_path / "new" / "a.safetensors", tmp_path / "b.safetensors"
    ok("train", "ddpm", "--data", "two_modes", "--out", run, *FEW)
    ok("export", run, small)
    ok("export", run, full, "--precision", "fp32")
    whole = (run / "checkpoint.safetensors").stat().st_size
    assert small.stat().st_size < full.stat().st_size < whole
    words = ["--n", 50, "--sampler", "ddim", "--steps", 3]
    for name in (run, small, full):
        ok("sample", name, *words, "--out", tmp_path / f"{name.stem}.npy")
    x, half, same = (np.load(tmp_path / f"{stem}.npy") for stem in ("run", "a", "b"))
    assert (x == same).all()
    assert np.abs(x - half).max() < 0.05
    capsys.readouterr()
    for file, message in ((small, "exists"), (tmp_path / "c.pt", "should end in .safetensors")):
        assert main(["export", str(run), str(file)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c.pt").exists()

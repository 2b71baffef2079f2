"""utils.py: errors, atomic files, arguments, devices, seeds, pictures."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from utils import UserError, atomic_path, generator, image_grid, save_gif

# --- errors and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("first\nsecond"), 2, "first second"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), 2, "Permission denied: /etc/x"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 2, "--batch-size"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("a shape does not fit"), None, ""),  # a bug keeps its traceback
    ],
)
def test_expected_errors_become_one_line(error, status, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if status else RuntimeError) as exit:
        utils.command_line(main)
    out, err = capsys.readouterr()
    assert not status or exit.value.code == status
    assert out == "" and err.count("\n") == bool(status) and words in err


def test_a_request_to_terminate_leaves_nothing_half_written(tmp_path):
    def main():
        with utils.atomic_path(tmp_path / "x.txt"):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    with pytest.raises(SystemExit) as exit:
        utils.command_line(main)
    assert exit.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_every_script_starts_without_the_modules_that_only_unix_has():
    program = """
import contextlib, io, runpy, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(script, run_name="__main__")
"""
    scripts = [str(path) for path in sorted(utils.ROOT.glob("*.py"))]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, *scripts], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_atomic_path_replaces_whole_files_only(tmp_path):
    path = tmp_path / "new" / "run.txt"
    (tmp_path / "plain").write_text("")
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one" and path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        1 / 0
    utils.check_writable(path)
    utils.check_writable(path.with_name("ü" * 125 + ".json"))  # 255 bytes, as many as a name may have
    assert path.read_text() == "one" and os.listdir(path.parent) == ["run.txt"]


def test_atomic_path_reports_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "file/below", tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="cannot write"):
            utils.check_writable(path)
    with pytest.raises(UserError, match="no space left"), atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):  # another file's fault
        open(tmp_path / "not there")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


# --- devices, seeds, number formats -------------------------------------------------------------------------------


def test_devices():
    assert utils.pick_device("cpu").type == "cpu"
    for name in ("abacus", "cuda:99", "xla"):
        with pytest.raises(UserError, match="no device"):
            utils.pick_device(name)


def test_equal_keys_give_equal_streams_and_others_different_ones():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (2**40,)]
    draws = [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert draws == [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)


def test_pixels_survive_the_model_range():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = utils.to_model(pixels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(utils.to_uint8(x), pixels)
    assert utils.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


# --- pictures and samples -----------------------------------------------------------------------------------------


def test_image_grid(tmp_path):
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 4, 5)
    grid = image_grid(images, columns=2, padding=1)
    assert grid.shape == (2 * 5 + 1, 2 * 6 + 1, 3) and grid.dtype == np.uint8
    assert (grid[1:5, 1:6] == 0).all() and (grid[1:5, 7:12] == 1).all() and (grid[6:10, 1:6] == 2).all()
    assert (grid[6:10, 7:12] == 255).all() and (grid[0] == 255).all()
    assert image_grid(images, columns=9, padding=0, scale=3).shape == (12, 45, 3)
    alone = image_grid(images[:1], columns=2)
    assert alone.shape == (8, 9, 3) and (alone[2:-2, 2:-2] == 0).all() and (alone == 255).sum() == alone.size - 60
    utils.save_grid(images, tmp_path / "new/grid.png", 2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new/grid.png")), image_grid(images, 2))


def gif_frames(path):
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield np.asarray(gif.convert("RGB")).astype(int), dict(gif.info)


GREYS = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)


@pytest.mark.parametrize("palette", [GREYS, np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)])
def test_greys_and_up_to_256_colours_are_exact_in_gifs(palette, tmp_path):
    frames = [np.roll(palette, i, axis=0).reshape(16, 16, 3) for i in range(10)]
    save_gif(frames, tmp_path / "x.gif")
    read = list(gif_frames(tmp_path / "x.gif"))
    assert np.array_equal(np.stack([frame for frame, _ in read]), frames)
    assert [info["duration"] for _, info in read] == [100] * 9 + [1100] and read[0][1]["loop"] == 0


def test_rare_saturated_colours_survive_in_gifs(tmp_path):
    """Small squares of pure colours on a dull, noisy background. Pillow's own palette is wrong there by up to 151."""
    y, x = np.mgrid[:256, :256]
    noise = np.random.default_rng(0).normal(0, 6, (256, 256, 1))
    picture = (np.stack([100 + x / 6, 90 + y / 5, 80 + (x + y) / 9], 2) + noise).astype(np.uint8)
    for i in range(8):
        picture[20 + 25 * i : 26 + 25 * i, 20 + 25 * i : 26 + 25 * i] = [255 * (i >> bit & 1) for bit in range(3)]
    save_gif([255 - picture, picture], tmp_path / "x.gif")
    error = np.abs(list(gif_frames(tmp_path / "x.gif"))[-1][0] - picture)
    assert error.max() <= 20 and error.mean() <= 3

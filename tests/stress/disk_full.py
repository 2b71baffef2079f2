"""Fill the disk under a training run, a sampling, a publishing and an unpacking, and see whether anything is lost.

    python tests/stress/disk_full.py

The disk is a small tmpfs where this process may mount one (root on Linux); elsewhere the system is told to refuse files
beyond a size, which ends a write in the middle just as well. At each of many levels of free space the command must end
with one clear line, the old files must be whole and nothing half-written may be left; with space again, the run goes on
and ends, bit for bit, like one that had space all the time.
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common import final_bits, newest_step, record, states, train_saving_often, unreadable

import ddpm
import download_datasets
import image_data
import utils

STEPS = 6
MESSAGES = ("no space left on the disk", "No space left on device", "File too large", "and the disk has")


@contextlib.contextmanager
def small_disk(size):
    """A folder on a disk of its own of `size` bytes; None where mounting is not permitted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            mounted = False
        try:
            yield Path(folder) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


class Disk:
    """`leave(n)` leaves n bytes free (or allows files of n bytes at most); `free()` gives the space back."""

    def __init__(self, folder, mounted):
        self.folder, self.mounted, self.ballast = folder, mounted, folder / "ballast"
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def leave(self, size):
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.limit[1]))
            return
        filesystem = os.statvfs(self.folder)
        block, free = filesystem.f_frsize, filesystem.f_bavail * filesystem.f_frsize
        self.ballast.write_bytes(b"\0" * max(0, (free - size) // block * block))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)
        self.ballast.unlink(missing_ok=True)


def ending(work):
    """None if `work` succeeds; else the line it ends with. Anything but exit status 2 and one line is an error."""
    err = io.StringIO()
    sys.argv = ["work"]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            utils.command_line(work)
        except SystemExit as exit:
            code = exit.code
    if not code:
        return None
    line = err.getvalue().splitlines()[-1]
    assert code == 2 and line.startswith("work: error: ") and any(m in line for m in MESSAGES), err.getvalue()
    return line


def files(folder):
    """The visible and hidden files of a folder with their contents; the ballast and locks apart."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("ballast", ".lock")}


def fill_under_training(disk, reference_bits, state_size):
    """Levels from nothing at all to almost enough: the run stops at its first, second, ... save."""
    faults = survived = 0
    for level in range(16):
        folder = disk.folder / "run"
        if level % 2:  # every second time there is already something to lose
            train_saving_often(2, folder)
        before = newest_step(folder)
        disk.leave(int(state_size * level / 5) if disk.mounted else int(state_size * level / 17))
        stopped = ending(lambda folder=folder: train_saving_often(STEPS, folder))
        faults += stopped is not None
        whole = not unreadable(folder) and newest_step(folder) >= before
        clean = not list(folder.glob(".*-*.*"))
        disk.free()
        train_saving_often(STEPS, folder)
        survived += (stopped is not None) and whole and clean and final_bits(folder) == reference_bits
        shutil.rmtree(folder)
    return faults, survived


def fill_under_commands(disk, checkpoint, archive):
    """sample, publish and unpack: the output is the old one or nothing, never a part."""

    def sample(suffix):
        line = f"sample --n 200 --steps 2 --device cpu --checkpoint {checkpoint} --out {disk.folder}/x.{suffix}"
        return lambda: ddpm.main(line.split())

    def publish():
        ddpm.main(f"publish --run {checkpoint.parent} --weights raw --out {disk.folder}/x.safetensors".split())

    utils.ROOT = image_data.ROOT = disk.folder
    works = {
        "png": sample("png"),
        "gif": sample("gif"),
        "npz": sample("npz"),
        "safetensors": publish,
        "unpack": lambda: download_datasets.main(["landscapes", "--from", str(archive)]),
    }
    faults = survived = 0
    for name, work in works.items():
        for old in (False, True):
            if old and name != "unpack":  # an older file of that name must stay
                (disk.folder / f"x.{name}").write_bytes(b"the old one")
            before = files(disk.folder)
            for size in (0, 1000, 4096):
                disk.leave(size)
                stopped = ending(work)
                faults += stopped is not None
                survived += stopped is not None and files(disk.folder) == before
                disk.free()
                for path in set(files(disk.folder)) - set(before):
                    path.unlink()
        assert ending(work) is None, name  # with space, it works
        for entry in disk.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return faults, survived


def main():
    from PIL import Image

    with tempfile.TemporaryDirectory() as temporary:
        reference, archive = Path(temporary, "reference"), Path(temporary, "photos.zip")
        train_saving_often(STEPS, reference)
        state_size = states(reference)[-1].stat().st_size
        with zipfile.ZipFile(archive, "w") as file:
            for i in range(20):
                picture = io.BytesIO()
                Image.effect_noise((64, 64), 90).convert("RGB").save(picture, "PNG")
                file.writestr(f"photos/{i}.png", picture.getvalue())
        with small_disk(4 * state_size + 400_000) as mounted:
            folder = mounted or Path(temporary, "disk")
            folder.mkdir(exist_ok=True)
            disk = Disk(folder, mounted is not None)
            training = fill_under_training(disk, final_bits(reference), state_size)
            commands = fill_under_commands(disk, reference / "model.safetensors", archive)
    kind = "a small tmpfs that fills up" if mounted else "files refused beyond a size (RLIMIT_FSIZE)"
    record(
        "disk_full",
        {
            "disk": kind,
            "training": {"faults": training[0], "survived_and_resumed_to_the_same_bits": training[1]},
            "sample_publish_unpack": {"faults": commands[0], "survived_with_nothing_half_written": commands[1]},
        },
    )
    return training[0] == 0 or commands[0] == 0 or training[1] < training[0] or commands[1] < commands[0]


if __name__ == "__main__":
    sys.exit(bool(main()))

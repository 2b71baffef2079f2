"""Kill a tiny training run with SIGKILL, again and again, and see whether anything is lost.

    python tests/stress/kill.py [--kills 100] [--seed 0]

Half of the kills come from outside at a random instant. The other half are aimed: the process kills itself before, in
the middle of, or after one of the file operations of which saving consists. After each kill every file of the run's
folder must be whole and no saved step may be lost; the run is then resumed. Every run that reaches its end must have,
bit for bit, the weights, averages, optimizer and losses of a run that nobody killed.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import final_bits, newest_step, record, states, train_saving_often, unreadable

STEPS = 25


def start(folder, fault=None):
    """Fork a process that trains; `fault` is called in it first. (Importing PyTorch anew each time takes longer.)"""
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            if fault:
                fault()
            train_saving_often(STEPS, folder)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def kill_at_operation(nth, where):
    """Arrange that this process kills itself at its nth file operation: before, in the middle or after it."""
    count = [0]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def aimed(operation, half=None):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] == nth:
                if where == "before":
                    die()
                if where == "middle" and half:
                    half(*args)
                    die()
            result = operation(*args, **kwargs)
            if count[0] == nth:
                die()
            return result

        return run

    def write_half(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])

    os.fsync, os.replace = aimed(os.fsync), aimed(os.replace)
    Path.write_bytes, Path.unlink = aimed(Path.write_bytes, write_half), aimed(Path.unlink)
    Path.touch = aimed(Path.touch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True)  # what PyTorch imports late, once for all

    with tempfile.TemporaryDirectory() as temporary:
        reference, folder = Path(temporary, "reference"), Path(temporary, "run")
        began = time.monotonic()
        assert os.waitpid(start(reference), 0)[1] == 0
        duration = time.monotonic() - began
        expected = final_bits(reference)

        kills = {"at a random instant": 0, "inside a save": 0}
        finished = identical = lost = partial_files = 0
        broken = []
        while sum(kills.values()) < args.kills or folder.exists():
            aimed = kills["inside a save"] < kills["at a random instant"]
            before = newest_step(folder)
            if sum(kills.values()) >= args.kills:
                pid = start(folder)  # enough: let the last run reach its end
            elif aimed:
                nth, where = rng.randint(1, 40), rng.choice(["before", "middle", "after"])
                pid = start(folder, lambda n=nth, w=where: kill_at_operation(n, w))
            else:
                pid = start(folder)
                time.sleep(rng.random() * duration)
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            broken += unreadable(folder) if folder.exists() else []
            lost += newest_step(folder) < before
            partial_files += len(list(folder.glob(".*-*.*"))) if folder.exists() else 0
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                kills["inside a save" if aimed else "at a random instant"] += 1
            elif status == 0:
                finished += 1
                identical += final_bits(folder) == expected
                assert len(states(folder)) <= 2 and not list(folder.glob(".*-*.*"))
                shutil.rmtree(folder)
            else:
                sys.exit(f"a resumed run failed with status {status}: its folder was {os.listdir(folder)}")
            print(f"\r{sum(kills.values())} kills, {finished} runs finished", end="", file=sys.stderr, flush=True)
        print("", *broken, file=sys.stderr)
        record(
            "kill",
            {
                "kills": kills,
                "runs_finished": finished,
                "runs_identical_to_the_unkilled": identical,
                "unreadable_states_or_checkpoints": len(broken),
                "saved_steps_lost": lost,
                "half_written_temporary_files_seen_and_cleared": partial_files,
                "steps_per_run": STEPS,
                "seed": args.seed,
            },
        )
        return identical < finished or broken or lost


if __name__ == "__main__":
    sys.exit(bool(main()))

"""The notebooks as a user sees them: JupyterLab in a real browser (Chromium, without a window).

    pip install playwright        and Chromium or Chrome on the PATH
    python tests/stress/browser.py playground          press the playground's buttons, check what it draws
    python tests/stress/browser.py notebooks [NAME ..] run every cell, keep pictures of the page in build/browser/

The notebooks themselves stay as they are: copies of them run in a temporary folder beside them.
"""

import argparse
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from playwright.sync_api import TimeoutError, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "build/browser"
SETUP = """import sys
sys.path.insert(0, "../..")
import playground
playground.show()"""


@contextlib.contextmanager
def jupyter(folder):
    """JupyterLab's address, serving `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--allow-root", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline:
                sys.exit("JupyterLab did not start within two minutes")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree"
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def opened(paths):
    """A page and the addresses of copies of the notebooks; every message of the page's that is an error is kept."""
    folder = ROOT / "notebooks/.browser"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        for path in paths:
            shutil.copy(path, folder)
        browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        with jupyter(folder) as address, sync_playwright() as player:
            browser = player.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            yield page, [f"{address}/{path.name}" for path in paths]
            browser.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_all(page, address, timeout):
    """Open a notebook, run all of its cells and wait until the kernel rests. Returns the seconds that it took."""
    page.goto(address)
    idle, busy = (page.get_by_text(f"Python 3 (ipykernel) | {state}") for state in ("Idle", "Busy"))
    idle.wait_for(timeout=120_000)
    page.wait_for_timeout(3000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    started = time.monotonic()
    with contextlib.suppress(TimeoutError):  # it may have rested again already
        busy.wait_for(timeout=20_000)
    rested = 0
    while rested < 8:  # between two cells it rests as well, but not for long
        if time.monotonic() - started > timeout:
            raise TimeoutError(f"{address} is not done after {timeout} s")
        page.wait_for_timeout(500)
        rested = rested + 1 if idle.is_visible() else 0
    return time.monotonic() - started - 4  # the rest that was waited for


def check(what, true):
    print(("yes  " if true else "NO   ") + what)
    return bool(true)


def check_playground(args):
    """Every control redraws; of quick clicks the last wins; a drawing of Fashion-MNIST takes under a second."""
    path = PICTURES / "playground.ipynb"
    PICTURES.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SETUP)], metadata=kernel), path)
    results = []
    with opened([path]) as (page, (address,)):
        run_all(page, address, 300)
        picture = page.locator(".jp-OutputArea img.widget-image, .widget-image").first
        picture.wait_for(timeout=120_000)

        def settle():
            """Wait until nothing is drawn any more; the seconds of the last drawing."""
            drawn, quiet = "(document.body.innerText.match(/drawn in ([0-9.]+) s/) || [])[1]", 0
            while quiet < 4:  # a drawing that answers an earlier click may be followed by another
                page.wait_for_timeout(300)
                seconds = page.evaluate(drawn)
                quiet = quiet + 1 if seconds else 0
            return float(seconds)

        def draw(label, action):
            before = page.screenshot(clip=picture.bounding_box())
            action()
            seconds = settle()
            after = page.screenshot(clip=picture.bounding_box())
            results.append(check(f"{label} draws another picture ({seconds:.1f} s)", before != after))
            return seconds, after

        settle()

        def button(name):  # an icon may come before its name
            return page.get_by_role("button", name=re.compile(rf"(^|\W){re.escape(name)}$"))

        height = picture.bounding_box()["height"]
        seconds, trouser = draw("class Trouser", lambda: button("Trouser").click())
        draw("class Bag", lambda: button("Bag").click())
        draw("averaged or raw weights", lambda: page.locator(".widget-checkbox input").first.click())
        draw("and back", lambda: page.locator(".widget-checkbox input").first.click())
        draw("sampler ddim", lambda: button("ddim").click())
        draw("sampler dpm", lambda: button("dpm").click())
        draw("surprise me", lambda: button("surprise me").click())

        def hurry():
            for name in ("Sandal", "Coat", "Dress", "Trouser"):
                button(name).click()

        page.locator(".widget-text input, input[type=number]").first.fill("0")
        page.keyboard.press("Tab")
        settle()
        _, last = draw("the last of four quick clicks", hurry)
        results.append(check("and it is the picture of that class", last == trouser))
        results.append(check("the picture keeps its height", picture.bounding_box()["height"] == height))
        results.append(check(f"a drawing takes under a second ({seconds:.1f} s)", seconds < 1))
        draw("the model CIFAR-10", lambda: button("CIFAR-10").click())
        page.screenshot(path=PICTURES / "playground.png", full_page=True)
    sys.exit(0 if all(results) else 1)


def run_notebooks(args):
    PICTURES.mkdir(parents=True, exist_ok=True)
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    paths = [path for path in paths if not args.names or path.stem in args.names]
    good = True
    with opened(paths) as (page, addresses):
        for path, address in zip(paths, addresses, strict=True):
            seconds = run_all(page, address, 900)
            errors = page.locator('[data-mime-type="application/vnd.jupyter.stderr"] .ansi-red-fg').count()
            good &= check(f"{path.stem} ran in {seconds:.0f} s without an error", errors == 0)
            cells = page.locator(".jp-Notebook .jp-Cell")
            for i in range(cells.count()):
                with contextlib.suppress(Exception):
                    cells.nth(i).scroll_into_view_if_needed(timeout=3000)
                    cells.nth(i).screenshot(path=PICTURES / f"{path.stem}_{i:02}.png")
    sys.exit(0 if good else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("playground").set_defaults(run=check_playground)
    notebooks = commands.add_parser("notebooks")
    notebooks.add_argument("names", nargs="*")
    notebooks.set_defaults(run=run_notebooks)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

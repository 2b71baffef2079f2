"""Point 1: an unconditional DDPM on Fashion-MNIST, and the grid of 4 beta schedules x 3 losses.

    python ddpm_unconditional.py train --schedule cosine --loss huber --epochs 5 --out runs/cosine_huber
    python ddpm_unconditional.py grid --out runs/grid
    python ddpm_unconditional.py sample --checkpoint runs/cosine_huber/model.safetensors --out samples.png
"""

import cli
from utils import command_line


def main(argv=None):
    parser, commands = cli.make_parser(__doc__.splitlines()[0], {"data": "fashion_mnist"})
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command_line(main)

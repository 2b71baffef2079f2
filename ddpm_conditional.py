"""Point 2: a conditional DDPM with classifier-free guidance and EMA.

    python ddpm_conditional.py train --data cifar10 --out runs/cifar10
    python ddpm_conditional.py sample --checkpoint runs/cifar10/model.safetensors --labels 0,1,2 --cfg-scale 3 --out samples.png

Training drops some labels (`training.draw_batch`), so that one network learns the conditional and the unconditional
prediction; sampling combines the two (`ddpm.guided`).
"""

import cli
from utils import command_line


def main(argv=None):
    parser, _ = cli.make_parser(__doc__.splitlines()[0], {"data": "cifar10"}, conditional=True)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command_line(main)

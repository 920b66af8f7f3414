#!/usr/bin/env python
"""Train or evaluate any model of the zoo: ``python train_net.py --config-file FILE [options] [KEY VALUE ...]``."""

import sys

from instseg_ext.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m deepmsi` is the command `deepmsi`, and runs record it as that."""

import sys

from deepmsi.cli import main

sys.argv[0] = "deepmsi"
sys.exit(main())

"Makes `python -m hyperflux`, and so `torchrun -m hyperflux`, the same as the installed command."
from hyperflux.cli import main

if __name__ == '__main__': main()
